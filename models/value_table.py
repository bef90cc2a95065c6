"""The value table of memory layers: a weighted sum of some rows per token, and a gradient of the rows that were read alone.

    table = ValueTable(rows=65_536, width=256)
    table.begin(bounds)                                   # once in a forward pass, before its first reading
    y_nD = table.read(index_nE, weight_nE, bounds, torch.float32)

A table may be read by many layers. None of them makes a gradient of it: each adds to one collection (`Touched`), and when the last one has
gone backward a single sparse tensor leaves, whose rows are those that were read, in order, each once. Neither forward nor backward makes
anything as large as the table. A second backward pass before ``zero_grad`` takes what the first one left and adds to it.

`look_up` is the seam that parallel/ fills where ranks share the table by columns (``parallel/columns.py``).

Legend: n tokens of all rows of the batch, E entries that a token reads, V rows of the table, D its columns, U rows that were read.
Try alone: ``pytest tests/models/test_value_table.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from models.batch import Bounds
from models.repeat import turns
from models.tables import Columns

AT_ONCE = 1 << 20
"""Elements of entries times columns that are added to a gradient in one go."""


@dataclass
class TouchedRows:
    """The gradient of rows that were read: ``rows_U`` ascending, ``values_UD``."""

    rows_U: Tensor
    values_UD: Tensor


@dataclass(frozen=True)
class Usage:
    """How evenly a table is used."""

    touched: float
    """Share of its rows that were read."""
    kl: float
    """Kullback-Leibler divergence of the weights with which rows were read from equal ones, in nats: 0 where all are used alike, the
    logarithm of the number of rows where one is read alone (arXiv 1907.05242)."""

    @staticmethod
    def of(usage_V: Tensor) -> Usage:
        """Of sums of weights, not all 0."""
        share_V = usage_V.double() / usage_V.double().sum()
        kl = math.log(len(usage_V)) + float(torch.xlogy(share_V, share_V).sum())
        return Usage(float((usage_V > 0).double().mean()), kl)


@dataclass(frozen=True)
class ReaderCost:
    """What one layer that reads a table costs for the given tokens of one rank, the table's part included. Flops count 2 per
    multiply-add."""

    flops_forward: float
    flops_backward: float
    saved_bytes: int
    """Bytes kept from forward to backward, the layer's input included, parameters excluded."""
    exchange_bytes: int
    """Bytes one rank sends in one forward pass where ranks share the table."""


Add = Callable[[Tensor, Tensor, Tensor], None]
"""Takes index_nE, weight_nE and dy_nD of some tokens."""


class LookUp(Protocol):
    """How the rows that a token reads are found and summed. ``LocalLookUp`` here; tables split by columns in parallel/."""

    def forward(self, values_VD: Tensor, index_nE: Tensor, weight_nE: Tensor, dtype: torch.dtype) -> Tensor:
        """y_nD in ``dtype``: for each token the sum of weight times row, over all columns. Not differentiable."""
        ...

    def backward(self, values_VD: Tensor, index_nE: Tensor, weight_nE: Tensor, dy_nD: Tensor, add: Add | None) -> Tensor:
        """The gradient of the weights. ``add`` (None: not wanted) takes what belongs to that of the table: index, weight and gradient of y
        of every token that reads it, in the columns held here, some tokens at a time."""
        ...

    def over_replicas(self, touched: TouchedRows, n_rows: int) -> TouchedRows:
        """Summed over the ranks that hold the same columns for other tokens."""
        ...

    def agreed(self, readings: list[int], device: torch.device) -> list[list[int]]:
        """What every rank that shares the table is to read, in the order of ranks: index rows of each reading, all equally many readings
        (0 rows where a rank has no more). A message, and a wait for it; of a plan's fake ranks each is to read what this one is."""
        ...

    def reading(self, counts: list[int]) -> LookUp:
        """The same for one reading in which ranks have so many index rows."""
        ...


class LocalLookUp:
    """One process holds the whole table."""

    def forward(self, values_VD: Tensor, index_nE: Tensor, weight_nE: Tensor, dtype: torch.dtype) -> Tensor:
        """See `LookUp.forward`."""
        return weighted_rows(values_VD, index_nE, weight_nE).to(dtype)

    def backward(self, values_VD: Tensor, index_nE: Tensor, weight_nE: Tensor, dy_nD: Tensor, add: Add | None) -> Tensor:
        """See `LookUp.backward`."""
        dy_nD = dy_nD.to(values_VD.dtype)
        if add is not None:
            add(index_nE, weight_nE, dy_nD)
        return weight_gradient(values_VD, index_nE, dy_nD)

    def over_replicas(self, touched: TouchedRows, n_rows: int) -> TouchedRows:
        """See `LookUp.over_replicas`."""
        return touched

    def agreed(self, readings: list[int], device: torch.device) -> list[list[int]]:
        """See `LookUp.agreed`."""
        return [readings]

    def reading(self, counts: list[int]) -> LookUp:
        """See `LookUp.reading`."""
        return self


def weighted_rows(values_VD: Tensor, index_nE: Tensor, weight_nE: Tensor) -> Tensor:
    """For each token the sum of weight times row, in the table's dtype; no copy of the rows is made."""
    if not values_VD.shape[1]:
        return values_VD.new_zeros(len(index_nE), 0)
    return F.embedding_bag(index_nE, values_VD, mode="sum", per_sample_weights=weight_nE.to(values_VD.dtype))


def weight_gradient(values_VD: Tensor, index_nE: Tensor, dy_nD: Tensor) -> Tensor:
    """The products of each token's gradient with the rows that it reads, [n, E]."""
    n, entries = index_nE.shape
    if not values_VD.shape[1]:
        return values_VD.new_zeros(n, entries)
    offsets = torch.arange(0, n * entries, max(1, entries), device=index_nE.device, dtype=index_nE.dtype)
    bag = torch.arange(n, device=index_nE.device, dtype=index_nE.dtype).repeat_interleave(entries, output_size=n * entries)
    flat = torch.ops.aten._embedding_bag_per_sample_weights_backward(dy_nD, values_VD, index_nE.reshape(-1), offsets, bag, 0, -1)
    return flat.view(n, entries)


def read_rows(mask_V: Tensor, at_most: int) -> Tensor:
    """Where ``mask`` is set, ascending. How many that are, only values say: of fake tensors it is as many as there can be."""
    if isinstance(mask_V, FakeTensor):
        return torch.arange(min(at_most, len(mask_V)), device=mask_V.device)
    return mask_V.nonzero().view(-1)


def _with_room(held: TouchedRows | None, more: Tensor, n_rows: int, like_D: Tensor) -> tuple[TouchedRows, Tensor]:
    """What is held with a row for each index in ``more`` too, zero where there was none; and each row's place in it, [V]."""
    if held is not None and len(held.rows_U) == n_rows:
        return held, held.rows_U
    mask_V = torch.zeros(n_rows, dtype=torch.bool, device=more.device)
    mask_V.index_fill_(0, more.reshape(-1).long(), True)
    at_most = more.numel()
    if held is not None:
        mask_V.index_fill_(0, held.rows_U, True)
        at_most += len(held.rows_U)
    rows_U = read_rows(mask_V, at_most)
    place_V = torch.zeros(n_rows, dtype=torch.long, device=more.device)
    place_V.index_copy_(0, rows_U, torch.arange(len(rows_U), device=more.device))
    values_UD = like_D.new_zeros(len(rows_U), like_D.shape[-1])
    if held is not None:
        values_UD.index_copy_(0, place_V[held.rows_U], held.values_UD)
    return TouchedRows(rows_U, values_UD), place_V


def add_products(held: TouchedRows | None, n_rows: int, index_nE: Tensor, weight_nE: Tensor, dy_nD: Tensor) -> TouchedRows:
    """``held`` and, for each entry, weight times the token's gradient, in the row that the entry reads. ``held`` is given up."""
    total, place_V = _with_room(held, index_nE, n_rows, dy_nD)
    step = max(1, AT_ONCE // max(1, index_nE.shape[1] * dy_nD.shape[1]))
    parts = [(a, min(a + step, len(dy_nD))) for a in range(0, len(dy_nD), step)]
    for a, b in turns(parts, dy_nD, lambda part: part[1] - part[0]):
        products_tED = weight_nE[a:b, :, None].to(dy_nD.dtype) * dy_nD[a:b, None, :]
        total.values_UD.index_add_(0, place_V[index_nE[a:b].reshape(-1).long()], products_tED.flatten(0, 1))
    return total


def add_rows(held: TouchedRows | None, more: TouchedRows, n_rows: int) -> TouchedRows:
    """Both; ``held`` is given up."""
    if held is None:
        return more
    total, place_V = _with_room(held, more.rows_U, n_rows, more.values_UD)
    total.values_UD.index_add_(0, place_V[more.rows_U], more.values_UD)
    return total


class Touched:
    """Collects the gradient of a table over the readings of one forward pass."""

    def __init__(self, n_rows: int, table: ValueTable) -> None:
        self.n_rows = n_rows
        self.table = table
        self.held: TouchedRows | None = None

    def add(self, index_nE: Tensor, weight_nE: Tensor, dy_nD: Tensor) -> None:
        """One reading's part."""
        self.table.count(index_nE, weight_nE)
        self.held = add_products(self.held, self.n_rows, index_nE, weight_nE, dy_nD)


class _Root(torch.autograd.Function):
    """Stands for the table in the graph of one forward pass: every reading depends on it, so its backward comes after theirs."""

    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, table: ValueTable, touched: Touched) -> Tensor:
        ctx.table, ctx.touched = table, touched
        return weight_VD.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        table, touched = ctx.table, ctx.touched
        held, touched.held = touched.held, None
        if held is None:  # nothing was read here, but perhaps by a replica
            nothing = table.weight.detach().new_zeros(0, table.weight.shape[1])
            held = TouchedRows(torch.zeros(0, dtype=torch.long, device=nothing.device), nothing)
        held = table.look_up.over_replicas(held, touched.n_rows)
        if not len(held.rows_U):
            return None, None, None
        before, table.weight.grad = table.weight.grad, None
        if before is not None:
            held = add_rows(TouchedRows(before._indices()[0], before._values()), held, touched.n_rows)
            del before
        shape = (touched.n_rows, held.values_UD.shape[1])
        gradient = torch.sparse_coo_tensor(held.rows_U[None], held.values_UD, shape, is_coalesced=True, check_invariants=False)
        if isinstance(held.values_UD, FakeTensor):  # on the way through autograd it would be copied, and of a fake one nothing is left then
            table.weight.grad, gradient = gradient, None
        return gradient, None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, root: Tensor, index_nE: Tensor, weight_nE: Tensor, table: ValueTable, touched: Touched | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.table, ctx.touched = table, touched
        ctx.save_for_backward(index_nE, weight_nE)
        return table.look_up.forward(table.weight.detach(), index_nE, weight_nE, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        index_nE, weight_nE = ctx.saved_tensors
        table: ValueTable = ctx.table
        wanted = ctx.needs_input_grad[0]
        add = ctx.touched.add if wanted else None
        dweight_nE = table.look_up.backward(table.weight.detach(), index_nE, weight_nE, grads[0].contiguous(), add)
        droot = table.weight.new_zeros(()) if wanted else None
        return droot, None, dweight_nE.to(weight_nE.dtype), None, None, None


def _as_it_is(bounds: Bounds) -> Bounds:
    return bounds


class TableReader(nn.Module):
    """Base of feed-forwards that read a value table of the model, which is none of their own modules."""

    def __init__(self, table: ValueTable) -> None:
        super().__init__()
        self._table = (table,)  # in a tuple: not a submodule
        self.held: Callable[[Bounds], Bounds] = _as_it_is
        """Of a block's tokens those that this layer gets: fewer where tensor-parallel ranks have parts of the residual stream."""

    @property
    def table(self) -> ValueTable:
        """What it reads."""
        return self._table[0]

    def forward(self, x_BTC: Tensor, bounds: Bounds) -> Tensor:
        """Same shape, in the dtype of products."""
        raise NotImplementedError

    def cost(self, batch_size: int, tokens: int, itemsize: int, shards: int = 1) -> ReaderCost:
        """Arithmetic and bytes for ``tokens`` per row on one of ``shards`` ranks that share the table. ``itemsize``: of an
        activation."""
        raise NotImplementedError


class ValueTable(nn.Module):
    """``rows`` x ``width`` numbers, of which this rank may hold some columns (``keep_columns``). See the module."""

    row_sparse = ("weight",)

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.rows, self.width = rows, width
        self.look_up: LookUp = LocalLookUp()
        self.columns = Columns(width, 0, width)
        self.usage_V: Tensor | None = None
        """Sum of the weights with which each row was read since somebody asked (``take_usage``), by all ranks that share it."""
        self.weight = nn.Parameter(torch.empty(rows, width))
        self._tag()

    def keep_columns(self, columns: Columns, look_up: LookUp) -> None:
        """Hold only these columns from now on, with undefined values, and read through ``look_up``."""
        self.columns, self.look_up = columns, look_up
        self.weight = nn.Parameter(torch.empty(self.rows, columns.count, dtype=self.weight.dtype, device=self.weight.device))
        self._tag()

    def _tag(self) -> None:
        self.weight.columns = self.columns  # pyright: ignore[reportAttributeAccessIssue]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ValueTable:
        super()._apply(fn, recurse)  # may make another parameter
        self._tag()
        return self

    def count(self, index_nE: Tensor, weight_nE: Tensor) -> None:
        """Note what was read."""
        if self.usage_V is None:
            self.usage_V = torch.zeros(self.rows, dtype=torch.float32, device=index_nE.device)
        self.usage_V.index_add_(0, index_nE.reshape(-1).long(), weight_nE.reshape(-1).float())

    def take_usage(self) -> Tensor | None:
        """``usage_V``, which begins anew; None if nothing was read."""
        usage_V, self.usage_V = self.usage_V, None
        return usage_V

    def draw(self, generator: torch.Generator) -> None:
        """Initial values (``drawn``), the same whatever columns are held; some rows at a time."""
        step = max(1, AT_ONCE // max(1, self.width))
        for first in range(0, self.rows, step):
            drawn = self.drawn(min(step, self.rows - first), generator)
            self.weight[first : first + len(drawn)].copy_(drawn[:, self.columns.first : self.columns.first + self.columns.count])

    def drawn(self, rows: int, generator: torch.Generator) -> Tensor:
        """Initial values of the next ``rows`` rows, all columns: normal with standard deviation ``width ** -0.5``."""
        return torch.empty(rows, self.width).normal_(0, self.width**-0.5, generator=generator)

    def begin(self, bounds: Bounds) -> None:
        """Before the first reading of a forward pass over what ``bounds`` describes."""
        touched = Touched(self.rows, self)
        bounds._cache[self] = (_Root.apply(self.weight, self, touched), touched) if torch.is_grad_enabled() else None

    def begun(self, bounds: Bounds) -> tuple[Tensor, Touched | None]:
        """What a reading depends on in the graph, and what collects its gradient (None: not wanted). Raises RuntimeError as `read`."""
        if self not in bounds._cache:
            raise RuntimeError("a value table was read before ValueTable.begin; the Transformer calls it once in a forward pass")
        return bounds._cache[self] or (self.weight.detach().new_zeros(()), None)

    def read(self, index_nE: Tensor, weight_nE: Tensor, bounds: Bounds, dtype: torch.dtype) -> Tensor:
        """y_nD in ``dtype``, over all columns: for each token the sum of weight times row. ``index_nE``: int32 or int64.

        Raises RuntimeError where ``begin`` was not called for ``bounds``."""
        root, touched = self.begun(bounds)
        with torch.autocast(index_nE.device.type, enabled=False):
            return _Read.apply(root, index_nE, weight_nE, self, touched, dtype)  # type: ignore[return-value]
