"""Rank arithmetic, and the same arithmetic in real process groups."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from models.errors import UserError
from parallel.config import ParallelConfig
from parallel.dims import ParallelDims
from parallel.mesh import build_mesh
from tests.distributed import run_distributed


def test_cp_varies_fastest() -> None:
    dims = ParallelDims(dp_replicate=2, dp_shard=3, cp=4)
    assert dims.world_size == 24
    assert [dims.cp_rank(rank) for rank in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [dims.dp_rank(rank) for rank in (0, 3, 4, 23)] == [0, 0, 1, 5]
    assert (dims.dp, dims.shard) == (6, 12)


def test_wrong_world_size_names_both_numbers_and_the_keys() -> None:
    with pytest.raises(UserError, match=r"= 6 ranks, but 4 were started.*parallel\.cp"):
        ParallelDims.from_config(ParallelConfig(dp_shard=3, cp=2), world_size=4)


def _groups() -> tuple[list[int], list[int], int, int]:
    mesh = build_mesh(ParallelDims(dp_replicate=2, cp=2), "cpu")
    return dist.get_process_group_ranks(mesh.cp_group), dist.get_process_group_ranks(mesh.shard_group), mesh.cp_rank, mesh.dp_rank


def test_groups_of_a_real_mesh() -> None:
    assert run_distributed(_groups, 4) == [
        ([0, 1], [0, 1], 0, 0),
        ([0, 1], [0, 1], 1, 0),
        ([2, 3], [2, 3], 0, 1),
        ([2, 3], [2, 3], 1, 1),
    ]
