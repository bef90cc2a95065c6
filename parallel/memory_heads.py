"""Tokens against heads of a memory: two all-to-alls per layer and direction (`models/memory/by_heads.py`).

A rank sends every rank the columns of its heads, of its own tokens, and gets the columns of its own heads of all tokens, in the order of
the sequence. What the heads came to goes the other way. Each is the other's backward; columns that several heads share (keys of a group of
heads) are sent to each rank that wants them, and their gradients are added.

Every rank of the group must call these, forward and backward, in the same order.

Legend: B row, n tokens of a rank, S tokens of all ranks, F columns of all heads, E columns of one rank's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.batch import Bounds, Range
from models.memory.by_heads import Rows, width_of
from parallel.sequence import Layout, check_ranges, ranges_for

Held = list[tuple[Range, ...]]
"""The tokens of every rank."""


class HeadsOverRanks:
    """`models.memory.protocol.Heads` over a group; ``parts`` as for `parallel.state_passing.RingCarry`."""

    def __init__(self, group: dist.ProcessGroup | None, layout: Layout, parts: int = 1) -> None:
        self.group, self.parts = group, parts
        self.layout: Layout = layout
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def whole(self, bounds: Bounds) -> Bounds:
        """See `Heads.whole`; the same object for all layers of a pass."""
        key = "whole sequence"
        if key not in bounds._cache:
            bounds._cache[key] = bounds.with_ranges(((0, bounds.seq_len),))
        return bounds._cache[key]

    def to_heads(self, x_BnF: Tensor, columns: Sequence[Rows], bounds: Bounds) -> Tensor:
        """See `Heads.to_heads`. Raises ValueError if ``bounds`` is not this rank's part."""
        return _ToHeads.apply(self.group, self._held(bounds), columns, x_BnF)  # type: ignore[return-value]

    def to_tokens(self, o_BSE: Tensor, columns: Sequence[Rows], bounds: Bounds) -> Tensor:
        """See `Heads.to_tokens`."""
        return _ToTokens.apply(self.group, self._held(bounds), columns, o_BSE)  # type: ignore[return-value]

    def together(self, x_Bh: Tensor, rows: Rows, n_rows: int) -> Tensor:
        """See `Heads.together`; one all-reduce, and one backward."""
        return _Together.apply(self.group, rows, n_rows, x_Bh)  # type: ignore[return-value]

    def _held(self, bounds: Bounds) -> Held:
        check_ranges(bounds, self.layout, self.rank, self.ranks, self.parts)
        return [ranges_for(self.layout, bounds.seq_len, r, self.ranks, bounds.documents, parts=self.parts) for r in range(self.ranks)]


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, held: Held, columns: Sequence[Rows], x_BnF: Tensor) -> Tensor:
        ctx.args, ctx.width = (group, held, columns), x_BnF.shape[-1]
        return _there(x_BnF, columns, held, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, Tensor]:
        group, held, columns = ctx.args
        return None, None, None, _back(grads[0], columns, held, group, ctx.width)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, held: Held, columns: Sequence[Rows], o_BSE: Tensor) -> Tensor:
        ctx.args = group, held, columns
        return _back(o_BSE, columns, held, group, sum(width_of(each) for each in columns))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, Tensor]:
        group, held, columns = ctx.args
        return None, None, None, _there(grads[0], columns, held, group)


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, rows: Rows, n_rows: int, x_Bh: Tensor) -> Tensor:
        ctx.group, ctx.rows = group, rows
        whole, offset = x_Bh.new_zeros(len(x_Bh), n_rows, *x_Bh.shape[2:]), 0
        for first, last in rows:
            whole[:, first:last] = x_Bh[:, offset : offset + last - first]
            offset += last - first
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, Tensor]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return None, None, None, torch.cat([total[:, first:last] for first, last in ctx.rows], 1)


def _there(x_BnF: Tensor, columns: Sequence[Rows], held: Held, group: Any) -> Tensor:
    """[B, S, E]: this rank's columns of all tokens, from every rank's tokens of all columns."""
    B, n, _ = x_BnF.shape
    rank, widths = dist.get_rank(group), [width_of(each) for each in columns]
    message = x_BnF.new_empty(B * n * sum(widths))
    sizes = [B * n * width for width in widths]
    for block, wanted, width in zip(message.split(sizes), columns, widths, strict=True):
        to, offset = block.view(B, n, width), 0
        for first, last in wanted:
            to[..., offset : offset + last - first] = x_BnF[..., first:last]
            offset += last - first
    arriving_PBnE = x_BnF.new_empty(len(held), B, n, widths[rank])
    dist.all_to_all_single(arriving_PBnE.view(-1), message, [sizes[rank]] * len(held), sizes, group=group)
    out_BSE = x_BnF.new_empty(B, len(held) * n, widths[rank])
    for part_BnE, ranges in zip(arriving_PBnE, held, strict=True):
        offset = 0
        for a, b in ranges:
            out_BSE[:, a:b] = part_BnE[:, offset : offset + b - a]
            offset += b - a
    return out_BSE


def _back(o_BSE: Tensor, columns: Sequence[Rows], held: Held, group: Any, width: int) -> Tensor:
    """[B, n, width]: all columns of this rank's tokens, from every rank's columns of all tokens; where ranks have the same column, their
    sum, in float32 (float64)."""
    B, S, E = o_BSE.shape
    n = S // len(held)
    message_PBnE = o_BSE.new_empty(len(held), B, n, E)
    for part_BnE, ranges in zip(message_PBnE, held, strict=True):
        offset = 0
        for a, b in ranges:
            part_BnE[:, offset : offset + b - a] = o_BSE[:, a:b]
            offset += b - a
    widths = [width_of(each) for each in columns]
    sizes = [B * n * each for each in widths]
    arriving = o_BSE.new_empty(sum(sizes))
    dist.all_to_all_single(arriving, message_PBnE.view(-1), sizes, [B * n * E] * len(held), group=group)
    shared = sum(widths) != width
    wide = torch.promote_types(o_BSE.dtype, torch.float32)
    out = o_BSE.new_zeros(B, n, width, dtype=wide) if shared else o_BSE.new_empty(B, n, width)
    for block, found, each in zip(arriving.split(sizes), columns, widths, strict=True):
        part, offset = block.view(B, n, each), 0
        for first, last in found:
            of_heads = part[..., offset : offset + last - first]
            if shared:
                out[..., first:last] += of_heads
            else:
                out[..., first:last] = of_heads
            offset += last - first
    return out.to(o_BSE.dtype)
