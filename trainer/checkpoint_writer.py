"""Write the tensors of a checkpoint, either the live ones or a copy on the CPU taken at one moment.

torch's own stagers are not used for the copy (2.13): one leaves 0-dim DTensors aliased to the live ones and copies gradients,
the other copies the device mesh. Here the DTensors only say which piece a rank holds; the values come from the copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from trainer.tensor_pieces import PiecewiseTensor


def local_copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This rank's values on the CPU, sharing memory with nothing."""
    return {
        name: tensor.copied() if isinstance(tensor, PiecewiseTensor) else local_values(tensor).to("cpu", copy=True)
        for name, tensor in tensors.items()
    }


def local_values(tensor: torch.Tensor) -> torch.Tensor:
    """The part of ``tensor`` that this rank holds, without gradient history."""
    values = tensor.detach()
    return values.to_local() if isinstance(values, DTensor) else values


class _CopiesPlanner(DefaultSavePlanner):
    """Plans from the live tensors' shapes and shards, writes the copies' values."""

    def __init__(self, copies: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Any:
        copy = self._copies[index.fqn]
        return copy.__get_tensor_shard__(index) if isinstance(copy, PiecewiseTensor) else copy


def write_tensors(
    writer: FileSystemWriter,
    tensors: Mapping[str, torch.Tensor],
    copies: Mapping[str, torch.Tensor] | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Write ``tensors`` (values from ``copies`` if given) on all ranks of ``group`` together; None: this process alone.

    Raises torch's CheckpointException on all ranks if one of them cannot write.
    """
    planner = DefaultSavePlanner() if copies is None else _CopiesPlanner(copies)
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    save(detached, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
