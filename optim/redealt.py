"""Matrices that tensor-parallel ranks share in parts, dealt anew for a method that updates whole ones.

A rank holds of a matrix a part by rows or by columns, and of that the rows that FSDP2 gives it: a rectangle. For the step the rectangles
of the gradient become rows of the whole matrix, in one all-to-all for all matrices; methods and states know nothing of parts (the states
of m rows on R ranks lie as those of a matrix that FSDP2 alone shards over R ranks, and are saved as that); the update goes the way back.

    rectangles of the gradient --all-to-all--> rows --method over all ranks of a copy--> rows of the update --all-to-all--> rectangles

Legend: t a rank's place in its tensor-parallel group, s among those that shard its part, m = s tp + t among all that hold one copy.
Try alone: ``pytest tests/optim/test_redealt.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

from models.parts import Part
from optim.methods import Rows
from optim.owners import all_to_all
from optim.placement import Placed

Rectangle = tuple[int, int, int, int]
"""First row, row after the last, first column, column after the last, of the whole matrix."""


@dataclass(frozen=True)
class Redealt:
    """One matrix. ``shape``: of the whole; ``dim``: along which ``parts`` tensor-parallel ranks share it; ``shards``: of each part."""

    shape: tuple[int, int]
    dim: int
    parts: int
    shards: int

    @staticmethod
    def of(parameter: Tensor, part: Part) -> Redealt:
        """Of a matrix as ``part`` says; without a mesh (in a plan) one rank holds the part."""
        rows, columns = part.whole_shape(parameter.shape)
        return Redealt((rows, columns), part.dim, part.ranks, 1 if part.model is None else part.model.size(1) // part.ranks)

    @property
    def ranks(self) -> int:
        """Of one copy of the matrix."""
        return self.parts * self.shards

    def held(self, m: int) -> Rectangle:
        """What rank ``m`` has of the parameter and its gradient."""
        s, t = divmod(m, self.parts)
        rows, columns = self.shape
        if self.dim == 1:
            chunk, width = Rows.chunk(rows, s, self.shards), columns // self.parts
            return chunk.first, chunk.first + chunk.count, t * width, (t + 1) * width
        chunk, start = Rows.chunk(rows // self.parts, s, self.shards), t * (rows // self.parts)
        return start + chunk.first, start + chunk.first + chunk.count, 0, columns

    def dealt(self, m: int) -> Rectangle:
        """What rank ``m`` has during the step."""
        chunk = Rows.chunk(self.shape[0], m, self.ranks)
        return chunk.first, chunk.first + chunk.count, 0, self.shape[1]

    def placed(self, part: Part, rank: int | None = None) -> Placed:
        """How the states lie; ``rank``: another one than this (in a plan)."""
        m = rank if rank is not None else part.rank if part.model is None else part.model.get_local_rank(1)
        rows = Rows.chunk(self.shape[0], m, self.ranks)
        if part.model is None:
            return Placed(self.shape, rows)
        return Placed(self.shape, rows, part.model.get_group(1), part.model, (Replicate(), Shard(0)))


def to_rows(tensors: Sequence[Tensor], matrices: Sequence[Redealt], group: dist.ProcessGroup) -> list[Tensor]:
    """This rank's rows of every whole matrix, from its rectangles. Every rank of ``group`` must come with the same matrices."""
    return _moved(tensors, [matrix.held for matrix in matrices], [matrix.dealt for matrix in matrices], group)


def to_parts(tensors: Sequence[Tensor], matrices: Sequence[Redealt], group: dist.ProcessGroup) -> list[Tensor]:
    """The way back: this rank's rectangles, from its rows."""
    return _moved(tensors, [matrix.dealt for matrix in matrices], [matrix.held for matrix in matrices], group)


def _moved(
    tensors: Sequence[Tensor],
    sources: Sequence[Callable[[int], Rectangle]],
    targets: Sequence[Callable[[int], Rectangle]],
    group: dist.ProcessGroup,
) -> list[Tensor]:
    mine, ranks = group.rank(), range(group.size())

    def crossing(i: int, source: int, target: int) -> Rectangle:
        a, b = sources[i](source), targets[i](target)
        first, left = max(a[0], b[0]), max(a[2], b[2])
        return first, max(first, min(a[1], b[1])), left, max(left, min(a[3], b[3]))

    places = range(len(tensors))
    sent = [[_within(x, sources[i](mine), crossing(i, mine, k)).contiguous() for i, x in enumerate(tensors)] for k in ranks]
    crossings = [[crossing(i, k, mine) for i in places] for k in ranks]
    shapes: Any = [[((r[1] - r[0], r[3] - r[2]), x.dtype) for r, x in zip(row, tensors, strict=True)] for row in crossings]
    arrived = all_to_all(sent, shapes, group)
    found = []
    for i, x in enumerate(tensors):
        first, end, left, right = own = targets[i](mine)
        whole = torch.empty(end - first, right - left, dtype=x.dtype, device=x.device)
        for k in ranks:
            _within(whole, own, crossings[k][i]).copy_(arrived[k][i])
        found.append(whole)
    return found


def _within(x: Tensor, own: Rectangle, wanted: Rectangle) -> Tensor:
    """The rectangle ``wanted`` of ``x``, which is the rectangle ``own``; a view."""
    return x[wanted[0] - own[0] : wanted[1] - own[0], wanted[2] - own[2] : wanted[3] - own[2]]
