"""Parts of matrices dealt anew: every rectangle goes to the rows and back, on uneven numbers of rows and with empty ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from optim.redealt import Redealt, to_parts, to_rows
from tests.distributed import run_distributed

MATRICES = [Redealt(shape, dim, 2, 2) for shape, dim in (((8, 6), 0), ((8, 6), 1), ((5, 4), 1), ((2, 8), 0), ((3, 2), 1))]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1), st.integers(1, 4), st.integers(1, 4))
def test_every_element_is_held_once_and_dealt_once(rows: int, columns: int, dim: int, parts: int, shards: int) -> None:
    shape = (rows * parts, columns) if dim == 0 else (rows, columns * parts)
    matrix = Redealt(shape, dim, parts, shards)
    for place in (matrix.held, matrix.dealt):
        seen = torch.zeros(shape)
        for rank in range(matrix.ranks):
            first, end, left, right = place(rank)
            seen[first:end, left:right] += 1
        assert seen.eq(1).all()


def moved() -> list[tuple[torch.Tensor, ...]]:
    """Of every matrix: this rank's rectangle, its rows, and its rectangle again."""
    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    held = [_of(matrix, matrix.held(rank)) for matrix in MATRICES]
    rows = to_rows(held, MATRICES, group)
    return list(zip(held, rows, to_parts(rows, MATRICES, group), strict=True))


def _of(matrix: Redealt, place: Any) -> torch.Tensor:
    whole = torch.arange(matrix.shape[0] * matrix.shape[1], dtype=torch.float32).view(matrix.shape)
    return whole[place[0] : place[1], place[2] : place[3]].clone()


def test_rectangles_become_rows_and_come_back() -> None:
    for rank, found in enumerate(run_distributed(moved, 4)):
        for matrix, (held, rows, back) in zip(MATRICES, found, strict=True):
            assert torch.equal(rows, _of(matrix, matrix.dealt(rank))) and torch.equal(back, held)
            assert rows.shape[1] == matrix.shape[1]
