"""A checkpoint becomes a directory that ``AutoModelForCausalLM.from_pretrained`` loads: weights, ``config.json``, tokenizer files.

What belongs to a family of Hugging Face's (``families.py``) is written as that; every other model with code of its own
(``modeling_longstride.py`` and what it imports, ``bundle.py``), which needs torch, transformers and pydantic and nothing of this product.
Weights go from file to file one tensor at a time. The directory appears whole, by one rename.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from models.errors import UserError
from models.int8_weight import dequantised
from trainer import config_file
from trainer.checkpoint import CheckpointManager, Refused
from trainer.checkpoint_reader import load_tensors, read_checkpoint_metadata
from trainer.config import RunConfig
from trainer.data.tokenizers import ByteTokenizer, load_tokenizer
from trainer.evals.registry import IdTokenizer, tokenizer_of
from trainer.interchange.bundle import model_sources
from trainer.interchange.byte_tokenizer import tokenizer_files
from trainer.interchange.families import OWN, family_of, hf_config, hf_name
from trainer.interchange.importing import KEPT_FILES, check_target, parameter_shapes
from trainer.interchange.safetensors_files import Planned, write_synced, write_weights
from trainer.planning import model_vocab_size
from trainer.run_dir import RunDir, fsync_directory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARD_BYTES = 5_000_000_000
"""Of one file of weights, at most, as save_pretrained has it."""
_KEPT_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Of a config.json beside the tokenizer: what this product's settings do not say."""


@dataclass(frozen=True)
class Exported:
    """What an export made."""

    step: int
    family: str
    files: list[Path]


def export_model(
    run_dir: RunDir, target: Path, step: int | None = None, dtype: str | None = None, *, shard_bytes: int = SHARD_BYTES
) -> Exported:
    """Write the checkpoint of ``step`` (None: the newest good one) into the new directory ``target``, in ``dtype`` (fp32, bf16, fp16; None:
    as the checkpoint has it, eight-bit weights as fp32). Raises UserError with nothing made: for a target that exists, a checkpoint
    that is missing or damaged, a number that ``dtype`` cannot hold."""
    config = config_file.resolve(run_dir.config)
    check_target(target)
    if config.data.cluster_key is not None:
        raise UserError(
            "hierarchical memories (model.feedforward) fetch parameters by clusters of documents, which transformers does not know: "
            "a run with them cannot be exported"
        )
    checkpoint, found_step = _find(run_dir, config, step)
    _, metadata = read_checkpoint_metadata(checkpoint)
    vocab_size = config.model.vocab_size or model_vocab_size(config, tokenizer_of(config.data).vocab_size)
    family = family_of(config.model)
    plan, source = _plan(config, vocab_size, metadata, family, checkpoint, DTYPES[dtype] if dtype else None)
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        beside = _copy_beside(run_dir, config, temporary)
        content = _config(config, vocab_size, plan, beside)
        write_synced(temporary / "config.json", (json.dumps(content, indent=2) + "\n").encode())
        for name, text in (model_sources() if family == OWN else {}).items():
            write_synced(temporary / name, text.encode())
        write_weights(temporary, plan, source, shard_bytes)
        fsync_directory(temporary)
        if target.exists():
            target.rmdir()  # empty, or it would have been refused
        temporary.rename(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_directory(target.absolute().parent)
    return Exported(found_step, family, sorted(target.iterdir()))


def _find(run_dir: RunDir, config: RunConfig, step: int | None) -> tuple[Path, int]:
    checkpoints = CheckpointManager(run_dir, config.checkpoint)
    if step is None:
        good = checkpoints.latest_good()
        if good is None:
            raise UserError(f"{run_dir.checkpoints} holds no checkpoint; train until one is saved (checkpoint.save_every_steps)")
        return good.path, good.step
    path = run_dir.checkpoint(step)
    if not path.is_dir():
        known = ", ".join(map(str, run_dir.checkpoint_steps())) or "none"
        raise UserError(f"{path} does not exist; checkpoints of this run: {known}")
    if problems := checkpoints.problems(path):
        raise UserError(f"checkpoint {path} is damaged: {Refused(path, problems)}")
    return path, step


# --- weights


def _plan(
    config: RunConfig, vocab_size: int, metadata: Metadata, family: str, checkpoint: Path, dtype: torch.dtype | None
) -> tuple[list[Planned], Callable[[Planned], torch.Tensor]]:
    """The tensors to write, and what reads one of them."""
    shapes = parameter_shapes(config.model.model_copy(update={"vocab_size": vocab_size}))
    names = {hf_name(name, family): name for name in shapes}
    stored: dict[str, TensorStorageMetadata] = {}
    for name in shapes:
        found = metadata.state_dict_metadata.get(f"model.{name}")
        if not isinstance(found, TensorStorageMetadata):
            raise UserError(f"checkpoint {checkpoint}: has no 'model.{name}', which the run's config.yaml describes")
        stored[name] = found

    def written(name: str) -> torch.dtype:
        own = stored[name].properties.dtype
        return dtype or (torch.float32 if own == torch.uint8 else own)

    def read(planned: Planned) -> torch.Tensor:
        name = names[planned.name]
        values = torch.empty(stored[name].size, dtype=stored[name].properties.dtype)
        load_tensors(checkpoint, {f"model.{name}": values}, metadata)
        if values.dtype == torch.uint8:
            values = dequantised(values, shapes[name][1], torch.float32)
        return _narrowed(values, planned)

    return [Planned(name, written(own), shapes[own]) for name, own in names.items()], read


def _narrowed(values: torch.Tensor, planned: Planned) -> torch.Tensor:
    """Rounded to nearest. Raises UserError where a finite number leaves float16's range."""
    result = values.to(planned.dtype)
    if planned.dtype == torch.float16 and not torch.isfinite(result).all() and torch.isfinite(values).all():
        raise UserError(f"--dtype fp16: '{planned.name}' holds numbers up to {float(values.abs().max()):.3g}, fp16 ends at 65504; use bf16")
    return result


# --- the other files


def _config(config: RunConfig, vocab_size: int, plan: list[Planned], beside: dict[str, Any]) -> dict[str, Any]:
    sizes: dict[torch.dtype, int] = {}
    for tensor in plan:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    most = max(sizes, key=lambda dtype: sizes[dtype])
    rope, before = config.model.rope, beside.get("max_position_embeddings")
    stretched = int(rope.factor * rope.original_max_positions) if rope.scaling in ("yarn", "llama3") else 0
    positions = max(config.data.seq_len, before if isinstance(before, int) else stretched)
    kept = {key: beside[key] for key in _KEPT_KEYS if isinstance(beside.get(key), (int, list))}
    return {**hf_config(config.model, vocab_size, str(most).removeprefix("torch."), positions), **kept}


def _copy_beside(run_dir: RunDir, config: RunConfig, target: Path) -> dict[str, Any]:
    """Copy the tokenizer's files, or make those of the built-in one; what a config.json beside them says, if there is one."""
    folder = _beside(run_dir, config)
    if isinstance(made := tokenizer_of(config.data), IdTokenizer):  # its ids are no text: no tokenizer goes with them
        return {"eos_token_id": made.eos_id, "pad_token_id": made.pad_id}
    if folder is None:
        for name, content in tokenizer_files().items():
            write_synced(target / name, content)
        return {"eos_token_id": ByteTokenizer.eos_id, "pad_token_id": ByteTokenizer.pad_id}
    for name in KEPT_FILES:
        if name != "config.json" and (folder / name).is_file():
            write_synced(target / name, (folder / name).read_bytes())
    try:
        content = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        content = {}
    if not isinstance(content, dict) or not content:
        content = {"eos_token_id": load_tokenizer(config.data.tokenizer).eos_id}
    return content


def _beside(run_dir: RunDir, config: RunConfig) -> Path | None:
    """The folder of the files that are not weights: the imported directory's own, else the tokenizer's."""
    if run_dir.huggingface.is_dir():
        return run_dir.huggingface
    if config.data.tokenizer == "bytes":
        return None
    given = Path(config.data.tokenizer).expanduser()
    return given if given.is_dir() else given.parent
