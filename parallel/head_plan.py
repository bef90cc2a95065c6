"""Which rank attends with which heads, and in which order: plain integers, no torch.

Every rank gets whole, consecutive query heads, their numbers differing by at most one, and with them the key/value heads that
these queries read. Where there are fewer key/value heads than ranks several ranks read the same one: it is sent to each of them and
never repeated in memory. The heads of a rank are taken a few at a time (*stages*); since they are consecutive, the keys of one stage
serve the next one where both read the same key/value head, and travel once (the schedule of UPipe, arXiv 2602.21196, here for any
number of heads).

Try alone: ``python -c "from parallel.head_plan import *; print(*plan_stages(28, 4, 8, 2), sep='\\n')"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

Range = tuple[int, int]
"""Half-open range of heads."""


class Segment(NamedTuple):
    """Query heads and key/value heads of one kernel call, relative to the heads of the stage; equally many queries for each key."""

    q: Range
    kv: Range


@dataclass(frozen=True)
class Stage:
    """One turn, per rank: ``q`` are the query heads it attends with, ``kv`` the key/value heads that these read; of them ``arriving``
    were not there in the stage before, and ``leaving`` are not needed in the next one."""

    q: tuple[Range, ...]
    kv: tuple[Range, ...]
    arriving: tuple[Range, ...]
    leaving: tuple[Range, ...]


def head_ranges(n_heads: int, size: int) -> list[Range]:
    """The query heads of each of ``size`` ranks; the last one has the most. Bounds fall on those of key/value heads wherever a key/value
    head's queries are shared evenly by whole ranks."""
    edges = [rank * n_heads // size for rank in range(size + 1)]
    return list(pairwise(edges))


def plan_stages(n_heads: int, n_kv_heads: int, size: int, at_once: int | None) -> tuple[Stage, ...]:
    """The stages of all ranks: at most ``at_once`` query heads of each rank at a time (None: all of them in one stage).

    Raises ValueError where there are fewer query heads than ranks, or heads that do not divide.
    """
    if n_heads % n_kv_heads or n_heads < size or (at_once is not None and at_once < 1):
        raise ValueError(f"{n_heads} query heads, {n_kv_heads} key/value heads, {at_once} at once cannot be dealt to {size} ranks")
    held = head_ranges(n_heads, size)
    most = max(last - first for first, last in held)
    n_stages = -(-most // min(at_once or most, most))
    queries = [[_part(held[rank], i, n_stages) for rank in range(size)] for i in range(n_stages)]
    keys = [[_keys_of(q, n_heads // n_kv_heads) for q in stage] for stage in queries]
    none = [(0, 0)] * size
    stages = []
    for i in range(n_stages):
        before, after = (keys[i - 1] if i else none), (keys[i + 1] if i + 1 < n_stages else none)
        arriving = tuple(_without(mine, other) for mine, other in zip(keys[i], before, strict=True))
        leaving = tuple(_without(mine, other) for mine, other in zip(keys[i], after, strict=True))
        stages.append(Stage(tuple(queries[i]), tuple(keys[i]), arriving, leaving))
    return tuple(stages)


def segments(q: Range, kv: Range, per_kv: int, carried: int = 0) -> list[Segment]:
    """The kernel calls for one rank's stage: runs of key/value heads that are read by equally many of its query heads, those that were
    ``carried`` over from the stage before apart from those that have arrived."""
    found: list[Segment] = []
    for head in range(*kv):
        first, last = max(q[0], head * per_kv) - q[0], min(q[1], (head + 1) * per_kv) - q[0]
        k = head - kv[0]
        if found and k != carried and (found[-1].q[1] - found[-1].q[0]) == (last - first) * (found[-1].kv[1] - found[-1].kv[0]):
            found[-1] = Segment((found[-1].q[0], last), (found[-1].kv[0], k + 1))
        else:
            found.append(Segment((first, last), (k, k + 1)))
    return found


def keys_are_shared(n_heads: int, n_kv_heads: int, size: int) -> bool:
    """Whether some key/value head is read on more than one rank, so that parts of its gradient come from several."""
    return any(a[1] > b[0] for a, b in pairwise(_keys_of(q, n_heads // n_kv_heads) for q in head_ranges(n_heads, size)))


def _part(heads: Range, index: int, parts: int) -> Range:
    first, last = heads
    return first + index * (last - first) // parts, first + (index + 1) * (last - first) // parts


def _keys_of(q: Range, per_kv: int) -> Range:
    return (q[0] // per_kv, -(-q[1] // per_kv)) if q[1] > q[0] else (q[0] // per_kv, q[0] // per_kv)


def _without(mine: Range, other: Range) -> Range:
    """The heads of ``mine`` that ``other`` has not; of two neighbouring stages at most the head at their common bound is in both."""
    if mine[1] <= mine[0] or other[1] <= other[0] or other[1] <= mine[0] or mine[1] <= other[0]:
        return mine
    first, last = (other[1], mine[1]) if other[0] <= mine[0] else (mine[0], other[0])
    return (first, max(first, last))
