"""Which blocks a rank computes at every hop of the ring, or beside a halo: pure integers, made once per micro-step.

Legend: ``held[r]`` the ranges of the sequence that rank r has; a plan's blocks are those of models/attention_plan.py.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from models.attention import Plan
from models.attention_plan import Pair, TileLimits, plan_rows, sees
from models.batch import Bounds, Range
from parallel.comm_dtypes import AS_COMPUTED, CommDtypes
from parallel.ring_links import keys_of


class RingPlan(NamedTuple):
    """Blocks by the hop at which their keys are here (``ring_links.keys_of``); hop 0 are the own ones."""

    hops: tuple[Plan, ...]
    comm: CommDtypes = AS_COMPUTED


class HaloPlan(NamedTuple):
    """Blocks of each local range with itself, and with the ``n`` tokens before it."""

    n: int
    own: Plan
    halos: tuple[Plan, ...]
    comm: CommDtypes = AS_COMPUTED


def fits_halo(window: int | None, bounds: Bounds) -> bool:
    """Whether a window reaches back, and no further than one shard is long, so that only the keys before a range need to travel."""
    return window is not None and window - 1 <= bounds.local_len and not bounds.prefixes


def plan_ring(
    held: Sequence[tuple[Range, ...]],
    cp_rank: int,
    documents: Sequence[tuple[int, ...]],
    window: int | None,
    limits: TileLimits,
    prefixes: Sequence[tuple[int, ...]] = (),
    width: int | None = None,
) -> RingPlan:
    """The blocks of ``cp_rank`` at each hop, up to the last hop at which any rank has one (the same number on all ranks).

    ``held[r]`` are the ranges of rank r; ``width``: ranks of the inner ring of a double one. Pure integers.
    """
    size, inner = len(held), width or len(held)
    masks = set(zip(documents, prefixes or [()] * len(documents), strict=True))

    def needed(hop: int) -> bool:
        return any(any_sees(held[r], held[keys_of(r, hop, size, inner)], masks, window) for r in range(size))

    n_hops = next(hop for hop in reversed(range(size)) if needed(hop))  # hop 0 is: every token sees itself
    plans, seq_len = [], sum(end - start for ranges in held for start, end in ranges)
    for hop in range(n_hops + 1):
        q_ranges, k_ranges = held[cp_rank], held[keys_of(cp_rank, hop, size, inner)]
        keys = local_offsets(k_ranges)
        pairs = [Pair(q, q0, k, k0) for q, q0 in local_offsets(q_ranges) for k, k0 in near(q, keys, documents, seq_len)]
        plans.append(plan_rows(documents, pairs, window, limits, prefixes))
    return RingPlan(tuple(plans))


def plan_halo(
    held: Sequence[tuple[Range, ...]], cp_rank: int, documents: Sequence[tuple[int, ...]], window: int, limits: TileLimits
) -> HaloPlan:
    """The blocks of ``cp_rank`` when each of its ranges comes with the ``window - 1`` tokens before it. Pure integers."""
    n = window - 1
    ranges = list(local_offsets(held[cp_rank]))
    own = plan_rows(documents, [Pair(q, q0, q, q0) for q, q0 in ranges], window, limits)
    halos = []
    for (start, end), offset in ranges:
        reach = min(n, start)  # what lies before index 0 is padding at the front of the halo
        pair = Pair((start, end), offset, (start - reach, start), n - reach)
        halos.append(plan_rows(documents, [pair], window, limits) if reach else ())
    return HaloPlan(n, own, tuple(halos))


def any_sees(
    q_ranges: Sequence[Range], k_ranges: Sequence[Range], masks: Iterable[tuple[tuple[int, ...], tuple[int, ...]]], window: int | None
) -> bool:
    return any(sees(q, k, starts, window, ends) for q in q_ranges for k in k_ranges for starts, ends in masks)


def near(
    q_range: Range, keys: Sequence[tuple[Range, int]], documents: Sequence[tuple[int, ...]], seq_len: int
) -> Sequence[tuple[Range, int]]:
    """Of ranges of keys, those that share a document with the queries in some row; the rest are not worth a look."""
    low = min(starts[bisect_right(starts, q_range[0]) - 1] for starts in documents)
    high = max(next(iter(starts[bisect_left(starts, q_range[1]) :]), seq_len) for starts in documents)
    return [(k, k0) for k, k0 in keys if k[0] < high and low < k[1]]


def local_offsets(ranges: Sequence[Range]) -> list[tuple[Range, int]]:
    """Each range with its local start."""
    return list(zip(ranges, accumulate((end - start for start, end in ranges), initial=0), strict=False))
