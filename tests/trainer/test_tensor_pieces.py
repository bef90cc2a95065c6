"""Runs of elements as rectangles, and checkpoints of tensors that ranks hold in such runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.distributed import run_distributed
from tests.trainer.small_run import manager
from trainer.tensor_pieces import PiecewiseTensor, boxes

SHAPES = {"matrix": (5, 7), "vector": (9,), "cube": (3, 4, 5), "small": (1, 1)}
CUT = {"matrix": 17, "vector": 4, "cube": 31, "small": 0}
"""Where the second rank's elements begin: in the midst of a row; of ``small`` the first rank holds none."""


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_rectangles_are_the_elements_in_their_order(shape: list[int], data: st.DataObject) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    start = data.draw(st.integers(0, whole.numel()))
    count = data.draw(st.integers(0, whole.numel() - start))
    found = list(boxes(shape, start, count))
    cut = [whole[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))].reshape(-1) for box in found]
    assert torch.cat([torch.empty(0, dtype=torch.long), *cut]).tolist() == list(range(start, start + count))
    assert len(found) <= max(1, 2 * len(shape) - 1)


def test_it_is_no_tensor_to_compute_with() -> None:
    piece = PiecewiseTensor((4, 3), 2, torch.ones(5))
    assert piece.shape == (4, 3) and piece.numel() == 12
    assert [tuple(each.shape) for each in piece.pieces.values()] == [(1, 1), (1, 3), (1, 1)]
    with pytest.raises(TypeError, match="ranks hold in pieces"):
        torch.add(piece, 1)


def values() -> dict[str, torch.Tensor]:
    return {name: torch.arange(float(math.prod(shape))).view(shape) for name, shape in SHAPES.items()}


def pieces(source: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """This rank's elements of every tensor, flat, and the tensors that stand for the whole."""
    rank, flats, found = dist.get_rank(), {}, {}
    for name, whole in source.items():
        start, end = (0, CUT[name]) if rank == 0 else (CUT[name], whole.numel())
        flats[name] = whole.reshape(-1)[start:end].clone()
        found[name] = PiecewiseTensor(whole.shape, start, flats[name])
    return flats, found


def saved_and_loaded(folder: str) -> list[str]:
    """Runs of elements to shards of rows and back, live and from copies in the background; what went wrong."""
    wrong: list[str] = []
    mesh = init_device_mesh("cpu", (2,))
    for step, asynchronous in ((1, False), (2, True)):
        checkpoints = manager(f"{folder}/{step}", asynchronous=asynchronous)
        mine, shared = pieces(values())
        checkpoints.save(step, {"model": shared})
        if asynchronous:
            for flat in mine.values():
                flat.zero_()  # the copy is what is written
        checkpoints.wait()
        rows: dict[str, Any] = {name: distribute_tensor(torch.zeros_like(whole), mesh, [Shard(0)]) for name, whole in values().items()}
        checkpoints.load(checkpoints.run_dir.checkpoint(step), {"model": rows})
        wrong += [f"rows of {name}" for name, whole in values().items() if not torch.equal(rows[name].full_tensor(), whole)]
        checkpoints.save(step + 10, {"model": rows}, block=True)
        flats, again = pieces({name: torch.full_like(whole, -1) for name, whole in values().items()})
        checkpoints.load(checkpoints.run_dir.checkpoint(step + 10), {"model": again})
        expected = pieces(values())[0]
        wrong += [f"elements of {name}" for name in flats if not torch.equal(flats[name], expected[name])]
    return wrong


def test_runs_of_elements_and_shards_of_rows_read_each_other(tmp_path: Path) -> None:
    assert run_distributed(saved_and_loaded, 2, str(tmp_path)) == [[], []]
