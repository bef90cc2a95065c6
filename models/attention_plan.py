"""Which blocks make up causal attention: plain integers, no torch.

A query sees the keys of its own document that are not after it and, with a window, fewer than ``window`` tokens away
(itself included). ``plan_tiles`` covers exactly these pairs, each once, by few kernel calls: whole documents as one causal
block, the part of a document that lies in an earlier range as one rectangle, a sliding window as stacks of equal blocks, and
runs of tiny documents packed into small blocks with a mask of their own.

Try alone: ``python -c "from models.attention_plan import *; print(*plan_tiles((0, 4096), (0, 4096), (0, 9, 3000), 512), sep='\\n')"``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

Range = tuple[int, int]
"""Half-open range of token indices."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One kernel call: ``count`` blocks of ``q_len`` queries against ``k_len`` keys, each block ``step`` tokens further on.

    none: every query sees every key. causal: square. band: key minus query index (within the block) from ``low`` to ``high``
    (None: no limit). packed: a square of whole small documents that begin at ``starts``, window ``high`` + 1 if not None.
    """

    kind: Literal["none", "causal", "band", "packed"]
    q_start: int
    q_len: int
    k_start: int
    k_len: int
    count: int = 1
    step: int = 0
    low: int = 0
    high: int | None = None
    starts: tuple[int, ...] = ()
    own: bool = False
    """The block holds each query's own token and is the only one that does: the first and, locally, complete answer."""


class TileLimits(NamedTuple):
    """What bounds the size of a call."""

    block: int | None = None
    """Queries per window block; None: a quarter of the window, 64 to 256 (fastest on CPU, where hidden scores cost time)."""
    keys_per_call: int = 16_384
    """Keys (counted with overlap) in one stack of window blocks."""
    triangle: int = 512
    """Side above which a corner of a window is split rather than masked."""
    small: int = 128
    """Fragments of documents shorter than this share a packed block."""
    packed: int = 256
    """Queries in a packed block."""


DEFAULT_LIMITS = TileLimits()
NATIVE_BAND_LIMITS = TileLimits(block=1 << 40, triangle=1 << 40)
"""For kernels that skip what a band hides: a window is then one call, however long."""


class Pair(NamedTuple):
    """A range of queries and a range of keys, with their offsets in the tensors that hold them."""

    q_range: Range
    q_offset: int
    k_range: Range
    k_offset: int


class RowTiles(NamedTuple):
    """The calls for batch rows ``first`` to ``last`` (exclusive), which have equal documents."""

    first: int
    last: int
    tiles: tuple[Tile, ...]


def sees(q_range: Range, k_range: Range, document_starts: Sequence[int], window: int | None) -> bool:
    """Whether any query of ``q_range`` sees any key of ``k_range`` (the same range, or disjoint from it)."""
    if k_range == q_range:
        return True
    first_query, last_key = q_range[0], k_range[1] - 1
    if last_key >= first_query:
        return False
    in_document = document_starts[bisect_right(document_starts, first_query) - 1] <= last_key
    return in_document and (window is None or first_query - last_key < window)


def plan_tiles(
    q_range: Range, k_range: Range, document_starts: Sequence[int], window: int | None, limits: TileLimits = DEFAULT_LIMITS
) -> list[Tile]:
    """Calls that cover every visible (query, key) pair of two global ranges exactly once, in indices relative to the ranges.

    Args:
        q_range, k_range: equal, or disjoint (ValueError otherwise).
        document_starts: sorted global start of every document of this row; the first is 0.
        window: tokens a query sees, its own included; None for all.
        limits: how large one call may be.
    """
    if window is not None and window < 1:
        raise ValueError(f"model.window is {window}; a token sees at least itself, so it must be 1 or more")
    lookback = None if window is None else window - 1
    if q_range == k_range:
        return _plan_own(q_range, document_starts, lookback, limits)
    if max(q_range[0], k_range[0]) < min(q_range[1], k_range[1]):
        raise ValueError(f"query range {q_range} and key range {k_range} overlap without being equal")
    if not sees(q_range, k_range, document_starts, window):
        return []
    return _plan_earlier(q_range, k_range, document_starts, lookback, limits)


def plan_rows(
    documents: Sequence[tuple[int, ...]], pairs: Sequence[Pair], window: int | None, limits: TileLimits = DEFAULT_LIMITS
) -> tuple[RowTiles, ...]:
    """The calls for all ``pairs`` and batch rows, in local indices; neighbouring rows with equal documents share them.

    Blocks with a query's own token come first. Rows that see nothing are left out.
    """
    groups: list[RowTiles] = []
    first = 0
    while first < len(documents):
        last = first + 1
        while last < len(documents) and documents[last] == documents[first]:
            last += 1
        tiles = [_shift(tile, p) for p in pairs for tile in plan_tiles(p.q_range, p.k_range, documents[first], window, limits)]
        tiles = _join_rectangles(tiles)
        tiles.sort(key=lambda tile: not tile.own)
        if tiles:
            groups.append(RowTiles(first, last, tuple(tiles)))
        first = last
    return tuple(groups)


def _shift(tile: Tile, pair: Pair) -> Tile:
    return replace(tile, q_start=tile.q_start + pair.q_offset, k_start=tile.k_start + pair.k_offset)


def _join_rectangles(tiles: list[Tile]) -> list[Tile]:
    """Neighbouring unmasked rectangles with a common side become one call (zigzag: both halves of a rank at once)."""
    joined: list[Tile] = []
    for tile in tiles:
        last = joined[-1] if joined else None
        if last is not None and last.kind == tile.kind == "none":
            if (last.q_start, last.q_len) == (tile.q_start, tile.q_len) and last.k_start + last.k_len == tile.k_start:
                joined[-1] = replace(last, k_len=last.k_len + tile.k_len)
                continue
            if (last.k_start, last.k_len) == (tile.k_start, tile.k_len) and last.q_start + last.q_len == tile.q_start:
                joined[-1] = replace(last, q_len=last.q_len + tile.q_len)
                continue
        joined.append(tile)
    return joined


def _plan_own(q_range: Range, document_starts: Sequence[int], lookback: int | None, limits: TileLimits) -> list[Tile]:
    """Tiles of a range with itself: one fragment of a document after another."""
    first, last = q_range
    inside = document_starts[bisect_right(document_starts, first) : bisect_left(document_starts, last)]
    edges = [0, *(start - first for start in inside), last - first]
    tiles: list[Tile] = []
    small: list[int] = []  # starts of consecutive small fragments not yet packed
    for start, end in pairwise(edges):
        is_small = end - start < limits.small
        if small and (not is_small or end - small[0] > limits.packed):
            tiles += _pack(small, start, lookback, limits)
            small = []
        if is_small:
            small.append(start)
        else:
            tiles += _plan_fragment(start, end, lookback, limits)
    return tiles + _pack(small, edges[-1], lookback, limits) if small else tiles


def _pack(starts: list[int], end: int, lookback: int | None, limits: TileLimits) -> list[Tile]:
    if len(starts) == 1:
        return _plan_fragment(starts[0], end, lookback, limits)
    first, length = starts[0], end - starts[0]
    return [Tile("packed", first, length, first, length, high=lookback, starts=tuple(s - first for s in starts), own=True)]


def _plan_fragment(start: int, end: int, lookback: int | None, limits: TileLimits) -> list[Tile]:
    """Tiles of tokens [start, end) of one document with themselves."""
    if lookback is None or end - start <= lookback + 1:
        return [Tile("causal", start, end - start, start, end - start, own=True)]
    # The first ``lookback`` queries reach back to the start: causal. After them each block of queries sees a band.
    tiles = [Tile("causal", start, lookback, start, lookback, own=True)] if lookback else []
    block = limits.block or min(256, max(64, 1 << (lookback // 4).bit_length()))
    per_call = max(1, limits.keys_per_call // (block + lookback))
    query = start + lookback
    while query < end:
        count = max(1, min(per_call, (end - query) // block))
        length = min(block, end - query)
        tiles.append(Tile("band", query, length, query - lookback, length + lookback, count, block, 0, lookback, own=True))
        query += length if count == 1 else count * block
    return tiles


def _plan_earlier(q_range: Range, k_range: Range, document_starts: Sequence[int], lookback: int | None, limits: TileLimits) -> list[Tile]:
    """Tiles of queries with keys of an earlier range: only the document that is open at the first query reaches back."""
    (q_first, q_last), (k_first, k_last) = q_range, k_range
    index = bisect_right(document_starts, q_first)
    if index < len(document_starts):
        q_last = min(q_last, document_starts[index])
    k_low = max(k_first, document_starts[index - 1])
    if lookback is None:
        return [Tile("none", 0, q_last - q_first, k_low - k_first, k_last - k_low)]
    k_low = max(k_low, q_first - lookback)
    q_last = min(q_last, k_last + lookback)
    corner = k_low + lookback  # the last query that sees k_low: up to it a rectangle, from it on a triangle
    tiles = []
    if corner > q_first:
        tiles.append(Tile("none", 0, min(corner, q_last) - q_first, k_low - k_first, k_last - k_low))
    side = q_last - corner
    if side > 0:
        tiles += _triangle(corner - q_first, k_low - k_first, side, limits)
        if k_low + side < k_last:
            tiles.append(Tile("none", corner - q_first, side, k_low + side - k_first, k_last - k_low - side))
    return tiles


def _triangle(q_start: int, k_start: int, side: int, limits: TileLimits) -> list[Tile]:
    """Query a of a square sees keys b >= a."""
    if side <= limits.triangle:
        return [Tile("band", q_start, side, k_start, side, low=0, high=None)]
    half = side // 2
    return [
        *_triangle(q_start, k_start, half, limits),
        Tile("none", q_start, half, k_start + half, side - half),
        *_triangle(q_start + half, k_start + half, side - half, limits),
    ]
