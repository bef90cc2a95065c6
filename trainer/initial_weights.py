"""Begin a run with the weights of a checkpoint instead of random ones: ``train.init_from``.

Only parameters are taken, whatever dtype, sharding or number of ranks they were saved with; the optimizer, the data cursor and the
learning rate's schedule begin anew. The checkpoint is another run's, or what ``longstride import`` made.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from models.errors import UserError
from models.int8_weight import dequantised, group_of, packed_shape
from models.parts import Part
from models.transformer import Transformer
from parallel.tensor_parallel import as_saved
from trainer.checkpoint import CheckpointManager, Refused
from trainer.checkpoint_reader import load_tensors, read_checkpoint_metadata
from trainer.config import RunConfig
from trainer.manifest import MANIFEST_NAME
from trainer.run_dir import RunDir

_ENTRY = "model."


def check_init_from(config: RunConfig, vocab_size: int) -> None:
    """Raise UserError naming file and key unless ``train.init_from`` holds this model's parameters. Reads no weights; one process."""
    if config.train.init_from is None:
        return
    checkpoint = _checkpoint(config.train.init_from)
    with torch.device("meta"):
        model = Transformer(config.model, vocab_size)  # whole: no rank has its part yet
    _, metadata = read_checkpoint_metadata(checkpoint)
    _check(checkpoint, {name: parameter.shape for name, parameter in model.named_parameters()}, metadata)


def fill_from(
    init_from: str,
    model: Transformer,
    checkpoints: CheckpointManager,
    only: Collection[torch.nn.Parameter] | None = None,
    *,
    checked: bool = False,
) -> Path:
    """Give ``model``'s parameters, as they lie on this rank, the values of ``init_from``; all ranks together. Returns the checkpoint.

    One parameter at a time: besides the model a rank holds its share of one. ``only``: the parameters to fill, where the others have no
    memory, and perhaps no shape. ``checked``: this checkpoint was read before. Raises UserError for a checkpoint that is damaged or of
    another model.
    """
    path = checkpoints.ranks.first_does("find train.init_from", lambda: _checkpoint(init_from))
    if not checked and (problems := checkpoints.problems(path)):
        raise UserError(f"train.init_from: checkpoint {path} is damaged: {Refused(path, problems)}")

    def read() -> None:
        _, metadata = read_checkpoint_metadata(path)
        parameters = dict(model.named_parameters())
        parts = model.parts
        whole = {name: p.shape if name not in parts else torch.Size(parts[name].whole_shape(p.shape)) for name, p in parameters.items()}
        if not checked:
            _check(path, whole, metadata)
        for name, parameter in parameters.items():
            if only is not None and not any(parameter is one for one in only):
                continue
            _fill(path, name, parameter, whole[name], parts.get(name), metadata)

    checkpoints.ranks.each(f"load {path}", read)
    return path


def _checkpoint(init_from: str) -> Path:
    """The checkpoint directory that a path means: itself, or the newest one of a run directory."""
    path = Path(init_from)
    if (path / MANIFEST_NAME).is_file():
        return path
    if (steps := RunDir(path).checkpoint_steps()) and not (path / MANIFEST_NAME).exists():
        return RunDir(path).checkpoint(steps[-1])
    if (path / "config.json").is_file():
        raise UserError(f"train.init_from: {path} is a Hugging Face directory; first: longstride import {path} DIR")
    raise UserError(f"train.init_from: {path} holds no checkpoint; give a run directory, one of its checkpoints, or what import made")


def _check(path: Path, shapes: dict[str, torch.Size], metadata: Metadata) -> None:
    stored = {key.removeprefix(_ENTRY): value for key, value in metadata.state_dict_metadata.items() if key.startswith(_ENTRY)}
    differences = [f"'{_ENTRY}{name}' is not in it" for name in shapes if name not in stored]
    differences += [f"'{_ENTRY}{name}' is in it but not in this model" for name in stored if name not in shapes]
    for name in shapes.keys() & stored.keys():
        found = stored[name]
        assert isinstance(found, TensorStorageMetadata)
        if found.size != shapes[name] and not _is_packed(found, shapes[name]):
            differences.append(f"'{_ENTRY}{name}' has shape {tuple(found.size)} in it and {tuple(shapes[name])} in this model")
    if differences:
        more = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
        raise UserError(
            f"train.init_from: checkpoint {path} is of another model: {min(differences)}{more}\n"
            f"take the model section of {path.parent.parent / 'config.yaml'}"
        )


def _is_packed(found: TensorStorageMetadata, shape: torch.Size) -> bool:
    """Whether a parameter of ``shape`` was saved in eight bits."""
    possible = found.properties.dtype == torch.uint8 and len(shape) == 2 and group_of(shape[1]) is not None
    return possible and tuple(found.size) == packed_shape(*shape)


def _fill(path: Path, name: str, parameter: Tensor, whole: torch.Size, part: Part | None, metadata: Metadata) -> None:
    found = metadata.state_dict_metadata[_ENTRY + name]
    assert isinstance(found, TensorStorageMetadata)
    packed = found.size != whole
    if packed and part is not None:
        raise UserError(
            f"train.init_from: '{_ENTRY}{name}' of {path} is in eight bits, which are not dealt out in parts: set parallel.tp=1"
        )
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
    shape = (local.shape[0], found.size[1]) if packed else local.shape
    values = torch.empty(shape, dtype=found.properties.dtype, device=local.device)
    placed = (
        _placed_like(parameter, values, found.size) if part is None else as_saved(_placed_like(parameter, values, parameter.shape), part)
    )
    load_tensors(path, {_ENTRY + name: placed}, metadata)
    with torch.no_grad():
        local.copy_(dequantised(values, parameter.shape[1], torch.float32) if packed else values)


def _placed_like(parameter: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """``values`` as this rank's part of a tensor of ``shape`` that is sharded as ``parameter`` is."""
    if not isinstance(parameter, DTensor):
        return values
    stride = (shape[1], 1) if len(shape) == 2 else parameter.stride()
    return DTensor.from_local(values, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride)
