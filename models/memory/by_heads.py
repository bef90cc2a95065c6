"""A sequence shared by heads: every rank gets all tokens of some heads, and gives each rank its tokens of what they came to.

For mixers whose heads do not meet between their projections and what is made of their outputs. Tokens are projected where they are, the
projections are exchanged against heads, and a *narrow* mixer, the same one with fewer heads, runs the whole sequence from the state before
it: no halo, no summary, no state that every rank holds. In place of a projection it has the columns of the projected tokens
(`models.linear.Columns`), so that its arithmetic is that of one process.

Legend: B row, T token of this rank, S token of the sequence, C channel, F columns of all projections, E those of a rank's heads, X columns
of all heads' outputs, H head, K and W the two sides of a head's state, G = B * heads of this rank, n tokens before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from models.batch import Bounds, Range
from models.feedforward import compute_dtype
from models.linear import Columns, linear
from models.memory.protocol import State, last_tokens, local_offsets

if TYPE_CHECKING:
    from models.memory.recurrent import RecurrentMixer

Rows = tuple[Range, ...]
"""Rows of a weight, in the order in which a rank's heads want them; several heads of it may share some."""


class Heads(Protocol):
    """How ranks exchange their tokens against heads."""

    rank: int
    ranks: int

    def whole(self, bounds: Bounds) -> Bounds:
        """The bounds of the whole sequence."""
        ...

    def to_heads(self, x_BnF: Tensor, columns: Sequence[Rows], bounds: Bounds) -> Tensor:
        """[B, S, E]: of all tokens of the sequence, in order, this rank's of ``columns`` (one entry per rank; they may overlap)."""
        ...

    def to_tokens(self, o_BSE: Tensor, columns: Sequence[Rows], bounds: Bounds) -> Tensor:
        """[B, n, F]: all ranks' ``columns`` (each in one entry) of this rank's own tokens."""
        ...

    def together(self, x_Bh: Tensor, rows: Rows, n_rows: int) -> Tensor:
        """[B, n_rows, ...] on every rank, from every rank's ``rows`` of it."""
        ...


def deal_heads(n_heads: int, ranks: int) -> list[Range]:
    """The heads of every rank, as equal as they can be."""
    return [(r * n_heads // ranks, (r + 1) * n_heads // ranks) for r in range(ranks)]


def rows_of(n_heads: int, heads: Range, width: int, copies: int = 1) -> Rows:
    """The rows of ``heads`` in a weight of ``copies`` x ``n_heads`` x ``width`` rows."""
    first, last = heads
    return tuple(((copy * n_heads + first) * width, (copy * n_heads + last) * width) for copy in range(copies))


def taken(x: Tensor, rows: Rows, dim: int = 0) -> Tensor:
    """``rows`` of ``x`` along ``dim``."""
    parts = [x.narrow(dim, first, last - first) for first, last in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def width_of(rows: Rows) -> int:
    """How many they are."""
    return sum(last - first for first, last in rows)


def through_heads(mixer: RecurrentMixer, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
    """`RecurrentMixer.forward` where `Carry.heads` says that heads are exchanged."""
    heads, weights = mixer.carry.heads, mixer.weights()
    assert heads is not None
    dealt = deal_heads(mixer.n_heads, heads.ranks)
    rows = [mixer.head_rows(each) for each in dealt]
    offsets = local_offsets(bounds)
    pieces = [x_BTC[:, a:b] for a, b in pairwise(offsets)]
    tiles = [tile for piece, span in zip(pieces, bounds.ranges, strict=True) for tile in mixer.tiles(piece, span)]
    project = partial(projected, mixer.projections)
    f_BTF = _joined([mixer.run(bounds, span, project, weights, x) for span, x in tiles])
    f_BSE = heads.to_heads(f_BTF, [columns_of(mixer.projections, weights, each) for each in rows], bounds)
    mine, own = rows[heads.rank], dealt[heads.rank]
    start = state or mixer.init_state(len(x_BTC), x_BTC.device, torch.promote_types(x_BTC.dtype, torch.float32))
    before_BnE = f_BSE.new_zeros(len(x_BTC), mixer.halo, f_BSE.shape[-1])
    if state is not None and mixer.halo:
        before_BnF = project(weights, start["conv"].to(x_BTC.dtype))
        before_BnE = taken(before_BnF, columns_of(mixer.projections, weights, mine), dim=-1)
    initial_BHKW = start["state"].to(torch.promote_types(x_BTC.dtype, torch.float32))
    state_GKW = taken(initial_BHKW, mixer.state_rows(own), dim=1).flatten(0, 1)
    o_BSX, state_GKW = _recur(mixer, own, narrow_weights(mixer, weights, mine), bounds, tiles, f_BSE, before_BnE, state_GKW)
    o_BTX = heads.to_tokens(o_BSX, [mixer.output_rows(each) for each in dealt], bounds)
    outs = o_BTX.split([x.shape[1] for _, x in tiles], dim=1)
    y_BTC = _joined([mixer.run(bounds, span, mixer.write, weights, x, o) for (span, x), o in zip(tiles, outs, strict=True)])
    if state is None:
        return y_BTC, {}
    final_BHKW = heads.together(state_GKW.unflatten(0, (len(x_BTC), -1)), mixer.state_rows(own), initial_BHKW.shape[1])
    return y_BTC, mixer._state_after(x_BTC, state, final_BHKW, [], [], bounds)


def _recur(
    mixer: RecurrentMixer,
    own: Range,
    weights: Any,
    bounds: Bounds,
    tiles: Sequence[tuple[Range, Tensor]],
    f_BSE: Tensor,
    before_BnE: Tensor,
    state_GKW: Tensor,
) -> tuple[Tensor, Tensor]:
    """Outputs of this rank's heads and their state after the sequence, in as many turns as there are tiles of its own tokens: a turn of
    fewer heads and more tokens is as large as a tile."""
    heads, narrow = mixer.carry.heads, mixer.narrowed(own)
    assert heads is not None
    whole, S, outs = heads.whole(bounds), f_BSE.shape[1], []
    ends = [S * (j + 1) // len(tiles) for j in range(len(tiles))]
    for (span, _), a, b in zip(tiles, [0, *ends[:-1]], ends, strict=True):
        f = f_BSE[:, a:b]
        o, state_GKW = mixer.run(bounds, span, partial(narrow.recur, whole, (a, b)), weights, f, before_BnE, state_GKW)
        outs.append(o.to(compute_dtype(f)))
        before_BnE = last_tokens(before_BnE, f, mixer.halo)
    return _joined(outs), state_GKW


def projected(names: Sequence[str], weights: Any, x_BTC: Tensor) -> Tensor:
    """[B, T, F]: what all projections ``names`` make of tokens."""
    return torch.cat([linear(x_BTC, getattr(weights, name)) for name in names], -1)


def columns_of(names: Sequence[str], weights: Any, rows: Mapping[str, Rows]) -> Rows:
    """Where ``rows`` of the projections ``names`` stand in what `projected` gives."""
    found, offset = [], 0
    for name in names:
        found += [(offset + first, offset + last) for first, last in rows[name]]
        offset += getattr(weights, name).shape[0]
    return tuple(found)


def narrow_weights(mixer: RecurrentMixer, weights: Any, rows: Mapping[str, Rows]) -> Any:
    """``weights`` of some heads: columns of what arrives in place of projections, of other parameters their rows."""
    narrow, offset = {}, 0
    for name in mixer.projections:
        narrow[name] = Columns(offset, offset + width_of(rows[name]))
        offset = narrow[name].last
    narrow |= {name: taken(getattr(weights, name), each) for name, each in rows.items() if name not in mixer.projections}
    return weights._replace(**narrow)


def exchanged_numbers(mixer: RecurrentMixer) -> int:
    """How many numbers a token has in the two messages of a forward pass: projections to heads, outputs back."""
    heads = mixer.carry.heads
    assert heads is not None
    dealt = deal_heads(mixer.n_heads, heads.ranks)
    there = sum(width_of(mixer.head_rows(each)[name]) for each in dealt for name in mixer.projections)
    return there + sum(width_of(mixer.output_rows(each)) for each in dealt)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
