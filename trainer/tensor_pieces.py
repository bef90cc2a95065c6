"""A tensor of which this rank holds a run of elements, in the row-major order of the whole: how ZeRO deals parameters to ranks.

torch's distributed checkpoint knows rectangles. A run of elements of a matrix is three of them at most (the rest of a row, whole rows,
the beginning of a row), so it is saved and loaded in place, without a copy and without talking to other ranks, and any other sharding
reads what it wrote. torch finds the three methods with double underscores by name (``torch.distributed._checkpointable``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor


class Box(NamedTuple):
    """A rectangle of a tensor: where it begins and how large it is along each axis."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def boxes(shape: Sequence[int], start: int, count: int) -> Iterator[Box]:
    """The fewest rectangles that together are elements ``start`` to ``start + count`` of a tensor of ``shape``, in their order."""
    if not count:
        return
    if not shape:
        yield Box((), ())
        return
    inner = math.prod(shape[1:])
    row, before = divmod(start, inner)
    if before:
        taken = min(inner - before, count)
        yield from _in_row(shape, row, before, taken)
        row, count = row + 1, count - taken
    if whole := count // inner:
        yield Box((row, *([0] * (len(shape) - 1))), (whole, *shape[1:]))
    yield from _in_row(shape, row + whole, 0, count - whole * inner)


def _in_row(shape: Sequence[int], row: int, start: int, count: int) -> Iterator[Box]:
    for box in boxes(shape[1:], start, count):
        yield Box((row, *box.offsets), (1, *box.sizes))


class PiecewiseTensor(torch.Tensor):
    """Stands for a whole tensor of ``shape``; ``pieces`` are views of what this rank holds. It can be asked for shape and dtype, saved
    and loaded, and nothing else."""

    pieces: dict[tuple[int, ...], torch.Tensor]
    """By where each begins in the whole."""
    boxes: list[Box]

    @staticmethod
    def __new__(cls, shape: Sequence[int], start: int, flat: torch.Tensor) -> PiecewiseTensor:
        """``flat``: this rank's elements, from ``start`` on in the whole; none is legal."""
        self = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=flat.dtype, device=flat.device)
        self.boxes = list(boxes(shape, start, flat.numel()))
        self.pieces = {}
        taken = 0
        for box in self.boxes:
            elements = math.prod(box.sizes)
            self.pieces[box.offsets] = flat.detach()[taken : taken + elements].view(box.sizes)
            taken += elements
        return self

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise TypeError(f"{function} of a tensor that ranks hold in pieces; gather it, or take its pieces")

    def copied(self) -> PiecewiseTensor:
        """The same pieces on the CPU, sharing memory with nothing."""
        copy = PiecewiseTensor(self.shape, 0, torch.empty(0, dtype=self.dtype))
        copy.boxes = self.boxes
        copy.pieces = {offsets: piece.to("cpu", copy=True) for offsets, piece in self.pieces.items()}
        return copy

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        items = []
        for box, chunk in zip(self.boxes, self.__create_chunk_list__(), strict=True):
            data = TensorWriteData(chunk, TensorProperties(dtype=self.dtype), self.shape)
            items.append(WriteItem(MetadataIndex(fqn, torch.Size(box.offsets)), WriteItemType.SHARD, tensor_data=data))
        return items

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self.pieces[tuple(index.offset)]


def is_shared(tensor: torch.Tensor) -> bool:
    """Whether ranks hold parts of ``tensor``, so that their local values may differ."""
    return isinstance(tensor, DTensor | PiecewiseTensor)


def local_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What this rank holds of ``tensor``."""
    if isinstance(tensor, PiecewiseTensor):
        return list(tensor.pieces.values())
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor]
