"""Hierarchical memories (arXiv 2510.02375): a feed-forward with hidden units beside it that are fetched for every document.

    a document has a cluster c_p of the lowest level, and so one of every level above it: c_l = c_{l+1} div branching_{l+1}
    y = SwiGLU(x) + sum over levels l of  D_b^T (silu(G_b x) * (U_b x)),    b = block of cluster c_l

A block is ``units`` hidden units of one cluster in one layer. A hidden unit is one row [gate | up | down] of 3 C numbers in a value
table (`models/value_table.py`) that all these layers share, so it has a row's sharding by columns, sparse gradient, optimizer and
checkpoints. Which block a token uses depends on its document alone: nothing crosses from one token to another, whatever rank holds it.

Rows are fetched in *readings* of some blocks, those that this rank's tokens use: each block multiplies all tokens of its cluster's
documents at once. The backward pass fetches them again instead of keeping what a batch of many documents would have fetched in all.

Legend: B row, T token, C channel, R rows of a reading, S tokens of a piece of a block's, U hidden units of a block.
Try alone: ``pytest tests/models/test_hierarchical.py``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from models.batch import Bounds
from models.config import HierarchicalConfig, ModelConfig
from models.feedforward import SwiGLU, compute_dtype, gated_product, gated_product_backward
from models.repeat import again
from models.value_table import LookUp, ReaderCost, TableReader, Touched, ValueTable

ROWS_AT_ONCE = 4096
"""Of the table that are fetched together; a larger block is fetched whole."""
TOKENS_AT_ONCE = 16_384
"""Of a block that are multiplied together."""

Piece = tuple[tuple[int, int, int], ...]
"""(row, first, end) of local tokens that are multiplied together."""


@dataclass(frozen=True)
class Block:
    """Of one cluster: the rows of one layer that it has, counted from the layer's first, and the local tokens that use them."""

    first: int
    units: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Reading:
    """Blocks that are fetched together, as this rank's part of a reading of all ranks that share the table."""

    blocks: tuple[Block, ...]
    counts: list[int]
    """Rows of every rank."""

    def rows_R1(self, offset: int, device: torch.device) -> Tensor:
        """Rows of the table, int32; ``offset``: of the layer."""
        rows = [torch.arange(offset + b.first, offset + b.first + b.units, dtype=torch.int32, device=device) for b in self.blocks]
        return torch.cat(rows or [torch.zeros(0, dtype=torch.int32, device=device)]).unsqueeze(1)


def blocks_of(bounds: Bounds, settings: HierarchicalConfig) -> list[Block]:
    """The blocks that the tokens held here use: level after level, in the order of clusters. Raises ValueError for a cluster that the
    settings do not have."""
    spans = _spans(bounds)
    if spans and not (min(spans) >= 0 and max(spans) < settings.clusters[-1]):
        raise ValueError(f"clusters {min(spans)} to {max(spans)} are not in 0..{settings.clusters[-1] - 1}")
    found, first = [], 0
    for clusters, units in zip(settings.clusters, settings.units, strict=True):
        below = settings.clusters[-1] // clusters
        of_level: dict[int, list[tuple[int, int, int]]] = {}
        for leaf, held in spans.items():
            of_level.setdefault(leaf // below, []).extend(held)
        found += [Block(first + cluster * units, units, _pieces(sorted(held))) for cluster, held in sorted(of_level.items())]
        first += clusters * units
    return found


def _spans(bounds: Bounds) -> dict[int, list[tuple[int, int, int]]]:
    """Of every cluster of the lowest level: (row, first, end) of its tokens held here, in local indices."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    offsets = [0, *accumulate(end - start for start, end in bounds.ranges)]
    for row, stretches in enumerate(bounds.clusters):
        starts = [start for start, _ in stretches]
        for (low, high), offset in zip(bounds.ranges, offsets, strict=False):
            for i in range(max(0, bisect_right(starts, low) - 1), bisect_left(starts, high)):
                first, end = max(low, starts[i]), min(high, starts[i + 1] if i + 1 < len(starts) else bounds.seq_len)
                if first < end and stretches[i][1] != -1:
                    found.setdefault(stretches[i][1], []).append((row, offset + first - low, offset + end - low))
    return found


def _pieces(spans: list[tuple[int, int, int]]) -> tuple[Piece, ...]:
    """``spans`` in pieces of at most TOKENS_AT_ONCE tokens, neighbours in one."""
    pieces: list[list[tuple[int, int, int]]] = []
    room = 0
    for row, first, end in spans:
        while first < end:
            if not room:
                pieces.append([])
                room = TOKENS_AT_ONCE
            taken = min(room, end - first)
            last = pieces[-1][-1] if pieces[-1] else None
            if last is not None and last[0] == row and last[2] == first:
                pieces[-1][-1] = (row, last[1], first + taken)
            else:
                pieces[-1].append((row, first, first + taken))
            first, room = first + taken, room - taken
    return tuple(tuple(piece) for piece in pieces)


def _readings(blocks: list[Block]) -> list[list[Block]]:
    found: list[list[Block]] = []
    held = ROWS_AT_ONCE
    for block in blocks:
        if held + block.units > ROWS_AT_ONCE:
            found.append([])
            held = 0
        found[-1].append(block)
        held += block.units
    return found


def plan_readings(bounds: Bounds, layer: HierarchicalMemory) -> list[Reading]:
    """The readings of one layer, equally many on all ranks that share its table; kept in ``bounds`` for all layers. All ranks must ask."""
    table, key = layer.table, ("hierarchical", layer.table)
    if key not in bounds._cache:
        own = _readings(blocks_of(layer.held(bounds), layer.settings))
        every = table.look_up.agreed([sum(block.units for block in blocks) for blocks in own], table.weight.device)
        n = len(every[0])
        own += [[]] * (n - len(own))
        bounds._cache[key] = [Reading(tuple(own[i]), [counts[i] for counts in every]) for i in range(n)]
    return bounds._cache[key]


def _taken(x_BTC: Tensor, piece: Piece) -> Tensor:
    """x_SC: a view where it is one run of tokens."""
    parts = [x_BTC[row, first:end] for row, first, end in piece]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _added(y_BTC: Tensor, piece: Piece, part_SC: Tensor) -> None:
    offset = 0
    for row, first, end in piece:
        y_BTC[row, first:end].add_(part_SC[offset : offset + end - first])
        offset += end - first


class _Fetched(torch.autograd.Function):
    """x_BTC -> what all blocks make of it. Keeps x alone."""

    @staticmethod
    def forward(
        ctx: Any, root: Tensor, x_BTC: Tensor, table: ValueTable, touched: Touched | None, offset: int, plan: list[Reading]
    ) -> Tensor:
        ctx.table, ctx.touched, ctx.offset, ctx.plan = table, touched, offset, plan
        ctx.save_for_backward(x_BTC)
        y_BTC = torch.zeros_like(x_BTC)
        for reading in plan:
            rows_RW = _fetch(table, reading, offset, x_BTC.dtype)[3]
            begin = 0
            for block in reading.blocks:
                gate_UC, up_UC, down_UC = rows_RW[begin : begin + block.units].chunk(3, dim=1)
                begin += block.units
                for piece in block.pieces:
                    x_SC = _taken(x_BTC, piece)
                    _added(y_BTC, piece, gated_product(x_SC @ gate_UC.t(), x_SC @ up_UC.t()) @ down_UC)
        return y_BTC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_BTC,) = ctx.saved_tensors
        table: ValueTable = ctx.table
        wanted = ctx.needs_input_grad[0]
        add = ctx.touched.add if wanted else None
        dx_BTC = torch.zeros_like(x_BTC)
        for reading in ctx.plan:
            with again():
                look_up, index_R1, ones_R1, rows_RW = _fetch(table, reading, ctx.offset, x_BTC.dtype)
            # A block of many tokens is worked on in pieces, whose gradients are summed.
            drows_RW = torch.zeros_like(rows_RW, dtype=torch.promote_types(rows_RW.dtype, torch.float32))
            begin = 0
            for block in reading.blocks:
                own = slice(begin, begin + block.units)
                begin += block.units
                for piece in block.pieces:
                    dx_SC = _block_backward(_taken(grads[0], piece), _taken(x_BTC, piece), rows_RW[own], drows_RW[own])
                    _added(dx_BTC, piece, dx_SC)
            look_up.backward(table.weight.detach(), index_R1, ones_R1, drows_RW.to(rows_RW.dtype), add)
        return table.weight.new_zeros(()) if wanted else None, dx_BTC, None, None, None, None


def _fetch(table: ValueTable, reading: Reading, offset: int, dtype: torch.dtype) -> tuple[LookUp, Tensor, Tensor, Tensor]:
    """How it is read, index_R1 and weight_R1 (all 1), and the rows themselves in ``dtype``."""
    look_up = table.look_up.reading(reading.counts)
    index_R1 = reading.rows_R1(offset, table.weight.device)
    ones_R1 = torch.ones(index_R1.shape, dtype=table.weight.dtype, device=index_R1.device)
    return look_up, index_R1, ones_R1, look_up.forward(table.weight.detach(), index_R1, ones_R1, dtype)


def _block_backward(dy_SC: Tensor, x_SC: Tensor, rows_UW: Tensor, drows_UW: Tensor) -> Tensor:
    """The gradient of x_SC; adds those of a block's rows to ``drows``."""
    gate_UC, up_UC, down_UC = rows_UW.chunk(3, dim=1)
    dgate_UC, dup_UC, ddown_UC = drows_UW.chunk(3, dim=1)
    with again():
        gate_SU, up_SU = x_SC @ gate_UC.t(), x_SC @ up_UC.t()
        hidden_SU = gated_product(gate_SU, up_SU)
    ddown_UC.add_(hidden_SU.t() @ dy_SC)
    dgate_SU, dup_SU = gated_product_backward(dy_SC @ down_UC.t(), gate_SU, up_SU)
    dgate_UC.add_(dgate_SU.t() @ x_SC)
    dup_UC.add_(dup_SU.t() @ x_SC)
    return torch.addmm(dgate_SU @ gate_UC, dup_SU, up_UC)


class BlockTable(ValueTable):
    """The hidden units of all blocks: one row each, [gate | up | down]."""

    def __init__(self, rows: int, d_model: int, gate_std: float, down_std: float) -> None:
        super().__init__(rows, 3 * d_model)
        self.stds = (gate_std, gate_std, down_std)

    def drawn(self, rows: int, generator: torch.Generator) -> Tensor:
        """See `ValueTable.drawn`: those of a dense feed-forward."""
        drawn_R3C = torch.empty(rows, 3, self.width // 3).normal_(0, 1, generator=generator)
        return drawn_R3C.mul_(torch.tensor(self.stds).view(3, 1)).flatten(1)


class HierarchicalMemory(TableReader):
    """One layer's feed-forward: the anchor's, and its documents' blocks of ``table`` from row ``offset`` on."""

    def __init__(self, config: ModelConfig, table: ValueTable, offset: int) -> None:
        super().__init__(table)
        self.settings, self.offset = config.hierarchical, offset
        self.dense = SwiGLU(config.d_model, config.ff_width)

    def forward(self, x_BTC: Tensor, bounds: Bounds) -> Tensor:
        """Same shape, in the dtype of products. Documents without a cluster, and bounds without any, get the dense part alone."""
        plan = plan_readings(bounds, self)
        root, touched = self.table.begun(bounds)
        dtype = compute_dtype(x_BTC)
        with torch.autocast(x_BTC.device.type, enabled=False):
            inputs = root, x_BTC.to(dtype), self.table, touched, self.offset, plan
            fetched_BTC: Tensor = _Fetched.apply(*inputs)  # type: ignore[assignment]
        return self.dense(x_BTC) + fetched_BTC

    def oracle(self, x_BTC: Tensor, bounds: Bounds, values_VW: Tensor) -> Tensor:
        """The same from the whole table, token by token, by plain operations that autograd knows: slow, for tests."""
        beside, out = self.dense, []
        places = [t for start, end in bounds.ranges for t in range(start, end)]
        for row, stretches in enumerate(bounds.clusters):
            for x_C, place in zip(x_BTC[row], places, strict=True):
                y_C = beside.w_down(torch.nn.functional.silu(beside.w_gate(x_C)) * beside.w_up(x_C))
                leaf = [cluster for start, cluster in stretches if start <= place][-1]
                begin = self.offset
                for level, units in enumerate(self.settings.units):
                    if leaf >= 0:
                        cluster = leaf
                        for split in self.settings.branching[:level:-1]:
                            cluster = cluster // split
                        for unit in values_VW[begin + cluster * units : begin + (cluster + 1) * units]:
                            gate_C, up_C, down_C = unit.chunk(3)
                            y_C = y_C + torch.nn.functional.silu(x_C @ gate_C) * (x_C @ up_C) * down_C
                    begin += self.settings.clusters[level] * units
                out.append(y_C)
        return torch.stack(out).view_as(x_BTC)

    def cost(self, batch_size: int, tokens: int, itemsize: int, shards: int = 1) -> ReaderCost:
        """See `TableReader.cost`; every token has a cluster, and every row ``planned_documents`` of different ones."""
        n, wide = batch_size * tokens, max(4, itemsize)
        C, hidden, units = self.dense.w_up.in_features, self.dense.w_up.out_features, sum(self.settings.units)
        forward = 6.0 * n * C * (hidden + units)
        levels = zip(self.settings.units, self.settings.clusters, strict=True)
        rows = sum(per_cluster * min(batch_size * self.settings.planned_documents, clusters) for per_cluster, clusters in levels)
        columns = -(-3 * C // shards)
        sent = rows * (4 + wide) * (shards - 1) + rows * (shards - 1) * columns * itemsize if shards > 1 else 0
        return ReaderCost(forward, 2 * forward + 4.0 * n * C * units, n * (C + 3 * hidden) * itemsize, sent)
