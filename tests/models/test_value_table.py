"""The value table's gradient: rows that were read alone, exact, of many readings and passes, without anything as large as the table."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from models.batch import Bounds
from models.value_table import AT_ONCE, Usage, ValueTable, add_products

ROWS, WIDTH, ENTRIES = 50, 6, 5


def table_of(rows: int = ROWS, width: int = WIDTH) -> ValueTable:
    table = ValueTable(rows, width).double()
    with torch.no_grad():
        table.draw(torch.Generator().manual_seed(0))
    return table


def entries(n: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(rows, (n, ENTRIES), generator=g, dtype=torch.int32), torch.rand(n, ENTRIES, dtype=torch.float64, generator=g)


def readings(table: ValueTable, x: list[tuple[Tensor, Tensor]]) -> Tensor:
    bounds = Bounds.whole(1, 4)
    table.begin(bounds)
    return sum((table.read(index, weight, bounds, torch.float64).sin().sum() for index, weight in x), torch.zeros(()))


def dense(values: Tensor, x: list[tuple[Tensor, Tensor]]) -> Tensor:
    return sum(((values[index.long()] * weight[..., None]).sum(1).sin().sum() for index, weight in x), torch.zeros(()))


def test_gradients_of_many_readings_and_passes_are_the_dense_ones() -> None:
    """Layers that share a table, micro-batches that add up, until every row has been read."""
    table = table_of()
    values = table.weight.detach().clone().requires_grad_()
    for step in range(6):
        x = [entries(4 + step, ROWS, 10 * step + layer) for layer in range(3)]
        y = readings(table, x)
        y.backward()
        want = dense(values, x)
        want.backward()
        torch.testing.assert_close(y, want, rtol=0, atol=1e-13)
        gradient = table.weight.grad
        assert gradient is not None and gradient.is_sparse and values.grad is not None
        rows = gradient._indices()[0]
        assert torch.equal(rows, values.grad.any(1).nonzero().view(-1))  # each once, in order, and no other
        torch.testing.assert_close(gradient.to_dense(), values.grad, rtol=0, atol=1e-13)
    assert gradient._nnz() == ROWS


def test_gradients_of_weights_are_exact_through_recomputation() -> None:
    table, (index, weight) = table_of(), entries(7, ROWS, 0)
    values = table.weight.detach().clone().requires_grad_()
    bounds = Bounds.whole(1, 7)
    table.begin(bounds)

    def read(w: Tensor) -> Tensor:
        return table.read(index, w, bounds, torch.float64)

    assert torch.autograd.gradcheck(read, [weight.requires_grad_()])
    table.begin(bounds)
    y = checkpoint(lambda w: read(w * 2).cos(), weight, use_reentrant=False)
    y.sum().backward()
    want = (values[index.long()] * 2 * weight[..., None]).sum(1).cos().sum()
    gradient = table.weight.grad
    assert gradient is not None and weight.grad is not None
    for got, expected in zip([gradient.to_dense(), weight.grad], torch.autograd.grad(want, [values, weight]), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


class Largest(TorchDispatchMode):
    """The most elements of any tensor with columns that an operator makes."""

    elements = 0
    known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, Tensor) and not x.is_sparse]
        new = [x.numel() for x in tensors if x.ndim > 1 and x.untyped_storage()._cdata not in self.known]
        self.elements = max(self.elements, *new, 0)
        return out


def test_nothing_as_large_as_the_table_is_made() -> None:
    rows, width = 4096, 64
    table = table_of(rows, width)
    x = [entries(16, rows, seed) for seed in range(2)]
    mode = Largest()
    mode.known = {table.weight.untyped_storage()._cdata}
    with mode:
        readings(table, x).backward()
    assert table.weight.grad is not None and table.weight.grad._nnz() <= 2 * 16 * ENTRIES
    assert mode.elements <= 2 * 16 * ENTRIES * width < rows * width // 20


def test_products_are_added_some_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    index, weight = entries(9, ROWS, 3)
    dy = torch.randn(9, WIDTH, dtype=torch.float64)
    whole = add_products(None, ROWS, index, weight, dy)
    assert AT_ONCE > 9 * ENTRIES * WIDTH
    monkeypatch.setattr("models.value_table.AT_ONCE", 2 * ENTRIES * WIDTH)
    parts = add_products(None, ROWS, index, weight, dy)
    assert torch.equal(whole.rows_U, parts.rows_U) and torch.equal(whole.values_UD, parts.values_UD)


def test_usage_is_told_once() -> None:
    table, x = table_of(), [entries(7, ROWS, seed) for seed in range(2)]
    readings(table, x).backward()
    want = torch.zeros(ROWS).index_put_((torch.cat([i.long() for i, _ in x]),), torch.cat([w.float() for _, w in x]), accumulate=True)
    usage = table.take_usage()
    assert usage is not None and table.take_usage() is None
    torch.testing.assert_close(usage, want)
    assert Usage.of(usage).touched == pytest.approx(float((want > 0).float().mean()))
    assert Usage.of(torch.full((ROWS,), 3.0)).kl == pytest.approx(0, abs=1e-6)
    one = Usage.of(torch.eye(ROWS)[4])
    assert (one.touched, one.kl) == (1 / ROWS, pytest.approx(math.log(ROWS)))


def test_a_table_that_was_not_begun_says_so() -> None:
    index, weight = entries(2, ROWS, 0)
    with pytest.raises(RuntimeError, match=r"ValueTable\.begin"):
        table_of().read(index, weight, Bounds.whole(1, 2), torch.float64)


def test_without_gradients_nothing_is_collected() -> None:
    table, (index, weight) = table_of(), entries(2, ROWS, 0)
    with torch.no_grad():
        bounds = Bounds.whole(1, 2)
        table.begin(bounds)
        y = table.read(index, weight, bounds, torch.float64)
    torch.testing.assert_close(y, (table.weight[index.long()] * weight[..., None]).sum(1).detach(), rtol=0, atol=1e-14)
    assert bounds._cache[table] is None
