"""Value tables shared by columns: readings, gradients and bytes sent are those of one process, on any number of ranks, ragged or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from models.batch import Bounds
from models.tables import Columns
from models.value_table import ValueTable
from parallel import columns as module
from parallel.columns import ColumnLookUp, CopiedLookUp, columns_for, sent_bytes
from tests.distributed import run_distributed

ROWS, ENTRIES = 40, 6
CASES = [
    # width, tokens of every rank (cut to the ranks there are), tokens per tile
    (8, [5, 5, 5, 5], 16_384),
    (7, [5, 5, 5, 5], 2),
    (10, [4, 0, 7, 3], 3),
    (3, [2, 6, 1, 5], 16_384),
]


def inputs(width: int, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(width)
    values = torch.randn(ROWS, width, dtype=torch.float64, generator=g)
    index = torch.randint(ROWS - 3, (tokens, ENTRIES), generator=g, dtype=torch.int32)
    weight = torch.rand(tokens, ENTRIES, dtype=torch.float64, generator=g)
    return values, index, weight, torch.randn(tokens, width, dtype=torch.float64, generator=g)


def dense(values: Tensor, index: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y and the gradients of the table and the weights, all rows picked out and summed; the table is read twice."""
    values, weight = values.clone().requires_grad_(), weight.clone().requires_grad_()
    y = (values[index.long()] * weight[..., None]).sum(1)
    again = (values[index.flip(0).long()] * weight.detach().flip(0)[..., None]).sum(1)
    dvalues, dweight = torch.autograd.grad((y * dy).sum() + (again * dy).sum(), [values, weight])
    return y.detach(), dvalues, dweight


def table_of(values: Tensor, columns: Columns, look_up: object) -> ValueTable:
    table = ValueTable(ROWS, values.shape[1])
    table.keep_columns(columns, look_up)  # pyright: ignore[reportArgumentType]
    table.double()
    table.weight.data.copy_(values[:, columns.first : columns.first + columns.count])
    return table


def read(table: ValueTable, index: Tensor, weight: Tensor, other: tuple[Tensor, Tensor], dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    bounds = Bounds.whole(1, max(1, len(index)))
    table.begin(bounds)
    weight = weight.clone().requires_grad_()
    y = table.read(index, weight, bounds, torch.float64)
    ((y * dy).sum() + (table.read(*other, bounds, torch.float64) * dy).sum()).backward()
    assert table.weight.grad is not None and weight.grad is not None
    return y.detach(), table.weight.grad, weight.grad


def on_ranks() -> list[tuple]:
    world, rank = dist.get_world_size(), dist.get_rank()
    found = []
    for width, tokens, tile in CASES:
        counts = tokens[:world]
        values, index, weight, dy = inputs(width, sum(counts))
        mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        ragged = len(set(counts)) > 1
        module.TILE_TOKENS = tile
        first, count = columns_for(width, rank, world)
        look_up = ColumnLookUp(dist.group.WORLD, width)  # pyright: ignore[reportArgumentType]
        readings = look_up.agreed([counts[rank]] * (rank + 1), torch.device("cpu"))
        assert readings == [[counts[r]] * (r + 1) + [0] * (world - r - 1) for r in range(world)]
        look_up = look_up.reading(counts) if ragged else look_up
        table = table_of(values, Columns(width, first, count), look_up)
        sent: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            count_bytes(patch, rank, world, sent)
            y, gradient, dweight = read(table, index[mine], weight[mine], (index.flip(0)[mine], weight.flip(0)[mine]), dy[mine])
        expected = sent_bytes(counts, rank, ENTRIES, width, 8, 8)
        found.append((mine, (first, count), y, gradient.to_dense(), gradient._nnz(), dweight, sum(sent), 2 * sum(expected), ragged))
    return [*found, over_copies()]


def count_bytes(patch: pytest.MonkeyPatch, rank: int, world: int, sent: list[int]) -> None:
    """Note what this rank's messages hold for others."""
    exchange, gather = dist.all_to_all_single, dist.all_gather_into_tensor

    def counted_exchange(out: Tensor, x: Tensor, received: list[int], split: list[int], **rest: Any) -> None:
        sent.append((sum(split) - split[rank]) * x.element_size())
        exchange(out, x, received, split, **rest)

    def counted_gather(out: Tensor, x: Tensor, **rest: Any) -> None:
        sent.append((world - 1) * x.numel() * x.element_size())
        gather(out, x, **rest)

    patch.setattr(dist, "all_to_all_single", counted_exchange)
    patch.setattr(dist, "all_gather_into_tensor", counted_gather)


def over_copies() -> tuple[Tensor, Tensor]:
    """Every rank has the whole table and tokens of its own: the gradient is that of all of them, on every rank."""
    world, rank = dist.get_world_size(), dist.get_rank()
    values, index, weight, dy = inputs(4, 3 * world)
    table = table_of(values, Columns(4, 0, 4), CopiedLookUp(dist.group.WORLD))  # pyright: ignore[reportArgumentType]
    mine = slice(3 * rank, 3 * rank + 3)
    for _ in range(2):  # the second adds to the first
        _, gradient, _ = read(table, index[mine], weight[mine], (index.flip(0)[mine], weight.flip(0)[mine]), dy[mine])
    return gradient.to_dense() / 2, dense(values, index, weight, dy)[1]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_columns_read_as_one_table(world: int) -> None:
    answers = run_distributed(on_ranks, world)
    for case, (width, tokens, _) in enumerate(CASES):
        values, index, weight, dy = inputs(width, sum(tokens[:world]))
        y, dvalues, dweight = dense(values, index, weight, dy)
        for answer in answers:
            mine, (first, count), got_y, got_dvalues, rows, got_dweight, sent, expected, ragged = answer[case]
            torch.testing.assert_close(got_y, y[mine], rtol=0, atol=1e-13)
            torch.testing.assert_close(got_dvalues, dvalues[:, first : first + count], rtol=0, atol=1e-12)
            torch.testing.assert_close(got_dweight, dweight[mine], rtol=0, atol=1e-12)
            assert rows == len(index.unique())
            assert sent == expected or ragged  # where lengths differ, messages are filled up to the longest
    for got, want in (answer[-1] for answer in answers):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_columns_are_dealt_as_torch_deals_a_dim() -> None:
    for width in range(1, 12):
        for ranks in range(1, 6):
            chunks = [chunk.tolist() for chunk in torch.arange(width).chunk(ranks)]
            dealt = [list(range(first, first + count)) for first, count in (columns_for(width, rank, ranks) for rank in range(ranks))]
            assert dealt == chunks + [[]] * (ranks - len(chunks))
