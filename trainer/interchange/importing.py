"""A Hugging Face model directory becomes a directory that a run can begin from: weights as a checkpoint, settings, tokenizer files.

    DIR/config.yaml                  settings of a run that begins from these weights (train.init_from)
    DIR/checkpoints/step_00000000/   the weights, in the dtype of the files, in the format of every checkpoint
    DIR/huggingface/                 config.json, tokenizer and generation files, for data.tokenizer and for the way back
    DIR/imported.json                where it came from

Weights go from file to file one tensor at a time. The directory appears whole, by one rename.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer
from trainer import config_file
from trainer.checkpoint import CheckpointManager
from trainer.checkpoint_writer import write_tensors
from trainer.config import CheckpointSection, RunConfig
from trainer.interchange.families import BUFFERS, OWN, hf_name, model_config, read_hf_config
from trainer.interchange.safetensors_files import Weights, open_weights, write_synced
from trainer.run_dir import RunDir, fsync_directory
from trainer.state import TrainState

KEPT_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Everything else of a model directory stays where it is: code of the model's own in particular is not taken over."""
MAX_KEPT_BYTES = 256 << 20


def import_model(source: Path, target: Path, base: RunConfig, tell: Callable[[str], None]) -> RunConfig:
    """Make ``target`` from the model directory ``source``; ``base`` gives the settings that are not the model's. Returns the settings
    written. Raises UserError with nothing made: for a target that exists, a model that this product does not have, a tensor that is
    missing, left over or of another shape."""
    file = source / "config.json"
    model = model_config(read_hf_config(source), file)
    weights = open_weights(source)
    places = _places(model, weights, file, tell)
    check_target(target)
    config = _settings(base, model, source, target.absolute())
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        made = RunDir(temporary)
        made.huggingface.mkdir(parents=True)
        for kept in _kept_files(source):
            write_synced(made.huggingface / kept.name, kept.read_bytes())
        write_synced(made.imported, (json.dumps({"from": str(source.absolute()), "dtype": _dtype(places, weights)}) + "\n").encode())
        write_synced(made.config, config_file.dump(config).encode())
        _write_checkpoint(made, places, weights)
        for folder in (made.huggingface, temporary):
            fsync_directory(folder)
        if target.exists():
            target.rmdir()  # empty, or it would have been refused
        temporary.rename(target)
    except OSError as error:
        raise UserError(f"cannot make {target}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_directory(target.absolute().parent)
    return config


def check_target(target: Path) -> None:
    """Refuse a place where something is already, and make the directory around it."""
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise UserError(f"{target}: exists and is not an empty directory; nothing is overwritten: choose another name or remove it")
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {target}: {error.strerror or error}") from None


def _kept_files(source: Path) -> Iterator[Path]:
    for name in KEPT_FILES:
        file = source / name
        if file.is_file():
            if file.stat().st_size > MAX_KEPT_BYTES:
                raise UserError(f"{file}: is larger than {MAX_KEPT_BYTES >> 20} MiB, which no file of a tokenizer is")
            yield file


def _settings(base: RunConfig, model: ModelConfig, source: Path, target: Path) -> RunConfig:
    """``base`` with the imported model, its tokenizer where it has one this product reads, and these weights to begin from."""
    values = base.model_dump()
    values["model"] = model.model_dump()
    values["train"]["init_from"] = str(target)
    if (source / "tokenizer.json").is_file():
        values["data"]["tokenizer"] = str(RunDir(target).huggingface)
    return RunConfig.model_validate(values)


# --- which tensor is which parameter


def _places(model: ModelConfig, weights: Weights, file: Path, tell: Callable[[str], None]) -> dict[str, str]:
    """Parameter -> tensor of the files. Raises UserError unless there is exactly one of the right shape for each."""
    family = json.loads(file.read_bytes())["model_type"]
    expected = parameter_shapes(model)
    places = {name: hf_name(name, family) for name in expected}
    if family != OWN and model.tie_embeddings:
        _check_tied(weights, tell)
    left = set(weights.names) - set(places.values()) - ({"lm_head.weight"} if model.tie_embeddings else set())
    left = {name for name in left if not BUFFERS.fullmatch(name)}
    for name, tensor in places.items():
        entry = weights.entries.get(tensor)
        if entry is None:
            raise UserError(f"{file.parent}: no file holds '{tensor}' ({file.name} describes it as model {name})")
        if entry.shape != expected[name]:
            raise UserError(f"{entry.file}: '{tensor}' has shape {entry.shape}, {file} describes {expected[name]}")
        weights.dtype(tensor)
    if left:
        first = min(left)
        raise UserError(f"{weights.entries[first].file}: holds '{first}' ({len(left)} such), which {file} does not describe")
    return places


def _check_tied(weights: Weights, tell: Callable[[str], None]) -> None:
    """Old files hold the output matrix of a tied model too; it must be the embedding."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if head in weights.entries and embedding in weights.entries:
        if not torch.equal(weights.read(head), weights.read(embedding)):
            raise UserError(
                f"{weights.entries[head].file}: '{head}' differs from '{embedding}', which tie_word_embeddings says it is; "
                "set tie_word_embeddings false in config.json if they are two matrices"
            )
        tell(f"'{head}' is the embedding (tie_word_embeddings) and is stored once")


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of every parameter of the model; nothing is allocated. ``model.vocab_size`` must be set."""
    assert model.vocab_size is not None
    with torch.device("meta"):
        empty = Transformer(model, model.vocab_size)
    return {name: tuple(parameter.shape) for name, parameter in empty.named_parameters()}


def _dtype(places: Mapping[str, str], weights: Weights) -> str:
    """Of most of the weights, as config.json spells it."""
    sizes: dict[str, int] = {}
    for tensor in places.values():
        name = str(weights.dtype(tensor)).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + weights.entries[tensor].size
    return max(sizes, key=lambda name: sizes[name])


# --- the checkpoint


class _Streamed(Mapping[str, Tensor]):
    """The weights under their names in a checkpoint, each read when it is asked for."""

    def __init__(self, places: Mapping[str, str], weights: Weights) -> None:
        self._places, self._weights = places, weights

    def __getitem__(self, key: str) -> Tensor:
        return self._weights.read(self._places[key.removeprefix("model.")])

    def __iter__(self) -> Iterator[str]:
        return (f"model.{name}" for name in self._places)

    def __len__(self) -> int:
        return len(self._places)


class _StreamingCheckpoints(CheckpointManager):
    """Writes placeholders' values from ``source`` instead of from memory."""

    source: _Streamed

    def _storage_writer(self, folder: Path) -> FileSystemWriter:
        # torch (2.13) holds what it has written until a file is finished: a file for each tensor.
        return FileSystemWriter(folder, sync_files=True, overwrite=False, single_file_per_rank=False)

    def _write_tensors(self, folder: Path, content: Any) -> None:
        write_tensors(self._storage_writer(folder), content.tensors, self.source, self.ranks.group)


def _write_checkpoint(run_dir: RunDir, places: Mapping[str, str], weights: Weights) -> None:
    run_dir.checkpoints.mkdir()
    checkpoints = _StreamingCheckpoints(run_dir, CheckpointSection())
    checkpoints.source = _Streamed(places, weights)
    placeholders = {name: _placeholder(weights.entries[tensor].shape, weights.dtype(tensor)) for name, tensor in places.items()}
    checkpoints.save(0, {"model": placeholders, "train": TrainState().to_json()})
    checkpoints.close()


def _placeholder(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of this shape that takes the memory of one number."""
    return torch.zeros((), dtype=dtype).expand(*shape)
