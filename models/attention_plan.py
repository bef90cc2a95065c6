"""Which blocks make up attention: plain integers, no torch.

A query sees the keys of its own document that are not after it, those of the document's *prefix* also when they are, and with a window
only those fewer than ``window`` tokens away, before or after (itself included). ``plan_tiles`` covers exactly these pairs, each once,
by few kernel calls: whole documents as one causal block, a prefix as one square, the part of a document that lies in another range as
one rectangle, a sliding window as stacks of equal blocks, and runs of tiny documents packed into small blocks with a mask of their own.

Try alone: ``python -c "from models.attention_plan import *; print(*plan_tiles((0, 4096), (0, 4096), (0, 9, 3000), 512), sep='\\n')"``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

Range = tuple[int, int]
"""Half-open range of token indices."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One kernel call: ``count`` blocks of ``q_len`` queries against ``k_len`` keys, each block ``step`` tokens further on.

    none: every query sees every key. causal: square. band: key minus query index (within the block) from ``low`` to ``high``
    (None: no limit). packed: a square of whole small documents that begin at ``starts``, window ``high`` + 1 if not None, with prefixes
    that end at ``prefix_ends`` (empty: none).
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
    prefix_ends: tuple[int, ...] = ()
    own: bool = False
    """The block holds each query's own token and is the only one that does: the first and, locally, complete answer."""


class TileLimits(NamedTuple):
    """What bounds the size of a call, and what the kernel is told."""

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
    kernel: str = "auto"
    """One of ``models.kernels``; ``auto``: the first that takes the block."""
    scale: float | None = None
    """Factor of the scores; None: 1/sqrt(head size)."""


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
    kernel: str = "auto"
    scale: float | None = None


def sees(q_range: Range, k_range: Range, document_starts: Sequence[int], window: int | None, prefix_ends: Sequence[int] = ()) -> bool:
    """Whether any query of ``q_range`` sees any key of ``k_range`` (the same range, or disjoint from it)."""
    if k_range == q_range:
        return True
    if k_range[0] < q_range[0]:
        first_query, last_key = q_range[0], k_range[1] - 1
        in_document = document_starts[_document(document_starts, first_query)] <= last_key
        return in_document and (window is None or first_query - last_key < window)
    last_query, first_key = q_range[1] - 1, k_range[0]
    document = _document(document_starts, first_key)
    in_prefix = bool(prefix_ends) and document_starts[document] <= last_query and first_key < prefix_ends[document]
    return in_prefix and (window is None or first_key - last_query < window)


def plan_tiles(
    q_range: Range,
    k_range: Range,
    document_starts: Sequence[int],
    window: int | None,
    limits: TileLimits = DEFAULT_LIMITS,
    prefix_ends: Sequence[int] = (),
) -> list[Tile]:
    """Calls that cover every visible (query, key) pair of two global ranges exactly once, in indices relative to the ranges.

    Args:
        q_range, k_range: equal, or disjoint (ValueError otherwise).
        document_starts: sorted global start of every document of this row; the first is 0.
        window: tokens a query sees on a side, its own included; None for all.
        limits: how large one call may be.
        prefix_ends: where the prefix of every document ends (its start: no prefix); empty when no document has one.
    """
    if window is not None and window < 1:
        raise ValueError(f"model.window is {window}; a token sees at least itself, so it must be 1 or more")
    lookback = None if window is None else window - 1
    if q_range == k_range:
        return _plan_own(q_range, document_starts, lookback, limits, prefix_ends)
    if max(q_range[0], k_range[0]) < min(q_range[1], k_range[1]):
        raise ValueError(f"query range {q_range} and key range {k_range} overlap without being equal")
    if not sees(q_range, k_range, document_starts, window, prefix_ends):
        return []
    if k_range[0] < q_range[0]:
        return _plan_earlier(q_range, k_range, document_starts, lookback, limits)
    return _plan_later(q_range, k_range, document_starts, lookback, limits, prefix_ends)


def plan_rows(
    documents: Sequence[tuple[int, ...]],
    pairs: Sequence[Pair],
    window: int | None,
    limits: TileLimits = DEFAULT_LIMITS,
    prefixes: Sequence[tuple[int, ...]] = (),
) -> tuple[RowTiles, ...]:
    """The calls for all ``pairs`` and batch rows, in local indices; neighbouring rows with equal documents and prefixes share them.

    Blocks with a query's own token come first. Rows that see nothing are left out. ``prefixes``: see ``Bounds``.
    """
    groups: list[RowTiles] = []
    first = 0
    rows = list(zip(documents, prefixes or [()] * len(documents), strict=True))
    while first < len(rows):
        last = first + 1
        while last < len(rows) and rows[last] == rows[first]:
            last += 1
        starts, ends = rows[first]
        tiles = [_shift(tile, p) for p in pairs for tile in plan_tiles(p.q_range, p.k_range, starts, window, limits, ends)]
        tiles = _join_triangles(_join_rectangles(tiles))
        tiles.sort(key=lambda tile: not tile.own)
        if tiles:
            groups.append(RowTiles(first, last, tuple(tiles), limits.kernel, limits.scale))
        first = last
    return tuple(groups)


def _shift(tile: Tile, pair: Pair) -> Tile:
    return replace(tile, q_start=tile.q_start + pair.q_offset, k_start=tile.k_start + pair.k_offset)


def _join_rectangles(tiles: list[Tile]) -> list[Tile]:
    """Neighbouring unmasked rectangles with a common side become one call (zigzag: both halves of a rank at once)."""
    joined: list[Tile] = []
    for tile in tiles:
        last = joined[-1] if joined else None
        if last is not None and last.kind == tile.kind == "none" and not (last.own or tile.own):
            if (last.q_start, last.q_len) == (tile.q_start, tile.q_len) and last.k_start + last.k_len == tile.k_start:
                joined[-1] = replace(last, k_len=last.k_len + tile.k_len)
                continue
            if (last.k_start, last.k_len) == (tile.k_start, tile.k_len) and last.q_start + last.q_len == tile.q_start:
                joined[-1] = replace(last, q_len=last.q_len + tile.q_len)
                continue
        joined.append(tile)
    return joined


def _join_triangles(tiles: list[Tile]) -> list[Tile]:
    """Two causal squares that follow one another here, and the rectangle of the second one's queries with the first one's keys, become one
    causal square: a zigzag rank's own tokens of one document, however far apart in the sequence."""
    causal = {tile.q_start: tile for tile in tiles if tile.kind == "causal" and tile.own and tile.q_start == tile.k_start}
    others = [tile for tile in tiles if causal.get(tile.q_start) is not tile]
    for tile in list(others):
        first, second = causal.get(tile.k_start), causal.get(tile.q_start)
        if tile.kind != "none" or tile.own or first is None or second is None or first.q_start + first.q_len != second.q_start:
            continue
        if (tile.k_len, tile.q_len) == (first.q_len, second.q_len):
            length = first.q_len + second.q_len
            causal[first.q_start] = replace(first, q_len=length, k_len=length)
            del causal[second.q_start]
            others.remove(tile)
    return [*causal.values(), *others]


def _document(document_starts: Sequence[int], token: int) -> int:
    """The index of the document that holds ``token``."""
    return bisect_right(document_starts, token) - 1


class _Fragment(NamedTuple):
    """Tokens of one document, those before ``prefix`` of its prefix."""

    start: int
    end: int
    prefix: int


def _fragments(q_range: Range, document_starts: Sequence[int], prefix_ends: Sequence[int]) -> Iterator[_Fragment]:
    """The parts of a range that belong to one document each, relative to the range."""
    first, last = q_range
    inside = document_starts[bisect_right(document_starts, first) : bisect_left(document_starts, last)]
    edges = [first, *inside, last]
    for document, (start, end) in enumerate(pairwise(edges), _document(document_starts, first)):
        prefix = min(max(prefix_ends[document], start), end) if prefix_ends else start
        yield _Fragment(start - first, end - first, prefix - first)


def _plan_own(
    q_range: Range, document_starts: Sequence[int], lookback: int | None, limits: TileLimits, prefix_ends: Sequence[int]
) -> list[Tile]:
    """Tiles of a range with itself: one fragment of a document after another."""
    tiles: list[Tile] = []
    small: list[_Fragment] = []  # consecutive small ones not yet packed
    for fragment in _fragments(q_range, document_starts, prefix_ends):
        is_small = fragment.end - fragment.start < limits.small
        if small and (not is_small or fragment.end - small[0].start > limits.packed):
            tiles += _pack(small, lookback, limits)
            small = []
        if is_small:
            small.append(fragment)
        else:
            tiles += _plan_fragment(fragment, lookback, limits)
    return tiles + _pack(small, lookback, limits) if small else tiles


def _pack(fragments: list[_Fragment], lookback: int | None, limits: TileLimits) -> list[Tile]:
    if len(fragments) == 1:
        return _plan_fragment(fragments[0], lookback, limits)
    first, length = fragments[0].start, fragments[-1].end - fragments[0].start
    starts = tuple(fragment.start - first for fragment in fragments)
    ends = tuple(fragment.prefix - first for fragment in fragments)
    return [
        Tile("packed", first, length, first, length, high=lookback, starts=starts, prefix_ends=() if ends == starts else ends, own=True)
    ]


def _plan_fragment(fragment: _Fragment, lookback: int | None, limits: TileLimits) -> list[Tile]:
    """Tiles of tokens of one document with themselves: its prefix, what follows it, and what of that sees the prefix."""
    start, end, prefix = fragment
    if prefix <= start + 1:  # one token sees no more than it does anyway
        return _plan_causal(start, end, lookback, limits)
    tiles = _plan_prefix(start, prefix, lookback, limits)
    if prefix < end:
        tiles += _plan_causal(prefix, end, lookback, limits)
        moved = Pair((prefix, end), prefix, (start, prefix), start)
        tiles += [_shift(tile, moved) for tile in _rectangle(moved.q_range, moved.k_range, lookback, limits)]
    return tiles


def _block(lookback: int, limits: TileLimits) -> int:
    """Queries of a window block."""
    return limits.block or min(256, max(64, 1 << (lookback // 4).bit_length()))


def _plan_causal(start: int, end: int, lookback: int | None, limits: TileLimits) -> list[Tile]:
    """Tiles of tokens [start, end) of one document with those of them that are not after them."""
    if lookback is None or end - start <= lookback + 1:
        return [Tile("causal", start, end - start, start, end - start, own=True)]
    # The first ``lookback`` queries reach back to the start: causal. After them each block of queries sees a band.
    tiles = [Tile("causal", start, lookback, start, lookback, own=True)] if lookback else []
    block = _block(lookback, limits)
    per_call = max(1, limits.keys_per_call // (block + lookback))
    query = start + lookback
    while query < end:
        count = max(1, min(per_call, (end - query) // block))
        length = min(block, end - query)
        tiles.append(Tile("band", query, length, query - lookback, length + lookback, count, block, 0, lookback, own=True))
        query += length if count == 1 else count * block
    return tiles


def _plan_prefix(start: int, end: int, lookback: int | None, limits: TileLimits) -> list[Tile]:
    """Tiles of the tokens [start, end) of a prefix with one another."""
    if lookback is None or end - start <= lookback + 1:
        return [Tile("none", start, end - start, start, end - start, own=True)]
    block = _block(lookback, limits)
    per_call = max(1, limits.keys_per_call // (block + 2 * lookback))
    tiles, query = [], start
    while query < end:
        length = min(block, end - query)
        first, last = max(start, query - lookback), min(end, query + length + lookback)
        whole = last - first == block + 2 * lookback  # away from both ends: blocks are equal and can be stacked
        count = max(1, min(per_call, (end - lookback - query) // block)) if whole else 1
        low, high = query - first - lookback, query - first + lookback
        tiles.append(Tile("band", query, length, first, last - first, count, length, low, high, own=True))
        query += count * length
    return tiles


def _plan_earlier(q_range: Range, k_range: Range, document_starts: Sequence[int], lookback: int | None, limits: TileLimits) -> list[Tile]:
    """Tiles of queries with keys of an earlier range: only the document that is open at the first query reaches back."""
    document = _document(document_starts, q_range[0])
    q_last, k_low = q_range[1], max(k_range[0], document_starts[document])
    if document + 1 < len(document_starts):
        q_last = min(q_last, document_starts[document + 1])
    tiles = _rectangle((q_range[0], q_last), (k_low, k_range[1]), lookback, limits)
    return [replace(tile, k_start=tile.k_start + k_low - k_range[0]) for tile in tiles]


def _plan_later(
    q_range: Range,
    k_range: Range,
    document_starts: Sequence[int],
    lookback: int | None,
    limits: TileLimits,
    prefix_ends: Sequence[int],
) -> list[Tile]:
    """Tiles of queries with keys of a later range: those of the prefix that is open at the first key.

    Seen from the end of the sequence later keys are earlier ones, and who sees whom in a prefix is the same from both ends.
    """
    document = _document(document_starts, k_range[0])
    q_low, k_high = max(q_range[0], document_starts[document]), min(k_range[1], prefix_ends[document])
    mirrored = _rectangle((-q_range[1], -q_low), (-k_high, -k_range[0]), lookback, limits)
    q_end, k_end = q_range[1] - q_range[0], k_high - k_range[0]
    return [_mirror(tile, q_end, k_end) for tile in mirrored]


def _mirror(tile: Tile, q_end: int, k_end: int) -> Tile:
    """A rectangle or triangle counted from the ends, counted from the beginnings."""
    kind = "causal" if tile.kind == "band" else tile.kind  # keys b >= a from one end are b <= a from the other
    q_start, k_start = q_end - tile.q_start - tile.q_len, k_end - tile.k_start - tile.k_len
    return Tile(kind, q_start, tile.q_len, k_start, tile.k_len)


def _rectangle(q_range: Range, k_range: Range, lookback: int | None, limits: TileLimits) -> list[Tile]:
    """Tiles of queries with earlier keys of the same document, some of which they see; relative to the ranges."""
    (q_first, q_last), (k_first, k_last) = q_range, k_range
    if lookback is None:
        return [Tile("none", 0, q_last - q_first, 0, k_last - k_first)]
    k_low = max(k_first, q_first - lookback)
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
