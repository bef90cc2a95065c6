"""Dynamic storage allocation: buffers with a life in time and a size get addresses, so that no two share space and time.

The problem as arrays, its lower bound, the height of a plan and the check that a plan is valid. All times and sizes are 64-bit
integers; a life is half-open, [lower, upper). Try alone: ``python -m memory_mgmt.address_planning IN.csv --out OUT.csv``.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]

# Sums of sizes stay below this, so that no 64-bit addition can overflow.
LARGEST_TOTAL = 2**62


@dataclass(frozen=True)
class Lifetime:
    """One buffer: alive at the times ``lower <= t < upper``, ``size`` bytes.

    ``group`` names the stretch of the step (one layer's forward or backward pass) that a transient belongs to; only the bi-level
    method reads it. None: not a transient of one stretch, or not known.
    """

    id: str | int
    lower: int
    upper: int
    size: int
    group: str | int | None = None


@dataclass(frozen=True)
class Problem:
    """The lifetimes as arrays of one length; sizes are rounded up to the alignment."""

    lower: Int64s
    upper: Int64s
    size: Int64s

    def __len__(self) -> int:
        return len(self.size)

    @property
    def unit(self) -> int:
        """The greatest common divisor of the sizes: the height of some optimal plan is a multiple of it."""
        return max(1, int(np.gcd.reduce(self.size))) if len(self) else 1

    def subset(self, index: Sequence[int] | Int64s) -> Problem:
        """The problem of the buffers at these positions."""
        return Problem(self.lower[index], self.upper[index], self.size[index])


def problem_of(lifetimes: Sequence[Lifetime], alignment: int = 1) -> Problem:
    """The arrays of checked lifetimes, sizes rounded up to ``alignment``.

    Raises ValueError, naming the id, for an empty life, a negative size, or values beyond 64 bits.
    """
    if alignment < 1:
        raise ValueError(f"alignment must be at least 1, not {alignment}")
    total = 0
    for life in lifetimes:
        if life.upper <= life.lower:
            raise ValueError(f"buffer {life.id}: upper {life.upper} must be greater than lower {life.lower}")
        if life.size < 0:
            raise ValueError(f"buffer {life.id}: size {life.size} is negative")
        if max(abs(life.lower), abs(life.upper)) >= LARGEST_TOTAL:
            raise ValueError(f"buffer {life.id}: its times do not fit in 62 bits")
        total += _round_up(life.size, alignment)
    if total >= LARGEST_TOTAL:
        raise ValueError(f"the sizes sum to {total}, more than 2**62: use a larger unit than bytes")
    return Problem(
        np.array([life.lower for life in lifetimes], dtype=np.int64),
        np.array([life.upper for life in lifetimes], dtype=np.int64),
        np.array([_round_up(life.size, alignment) for life in lifetimes], dtype=np.int64),
    )


def _round_up(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def max_live(problem: Problem) -> int:
    """The most bytes alive at one time: no plan can be lower."""
    if not len(problem):
        return 0
    return int(live_profile(problem)[1].max())


def live_profile(problem: Problem) -> tuple[Int64s, Int64s]:
    """The times at which the live set changes, ascending, and the live bytes from each until the next."""
    times, where = np.unique(np.concatenate([problem.lower, problem.upper]), return_inverse=True)
    change = np.zeros(len(times), dtype=np.int64)
    np.add.at(change, where, np.concatenate([problem.size, -problem.size]))
    return times, np.cumsum(change)


def pressure(problem: Problem) -> Int64s:
    """Per buffer, the most bytes alive at one time of its life."""
    times, live = live_profile(problem)
    table = [live]  # table[k][i] = max of live[i : i + 2**k]
    while 2 ** len(table) <= len(live):
        half = 2 ** (len(table) - 1)
        table.append(np.maximum(table[-1][:-half], table[-1][half:]))
    first, end = np.searchsorted(times, problem.lower), np.searchsorted(times, problem.upper)
    out = np.empty(len(problem), dtype=np.int64)
    for i, (a, b) in enumerate(zip(first.tolist(), end.tolist(), strict=True)):
        k = (b - a).bit_length() - 1
        out[i] = max(table[k][a], table[k][b - 2**k])
    return out


def height(problem: Problem, offsets: Int64s) -> int:
    """The end of the highest buffer."""
    return int((offsets + problem.size).max()) if len(problem) else 0


def find_overlap(problem: Problem, offsets: Int64s) -> tuple[int, int] | None:
    """The positions of two buffers that share space and time, or None; a sweep over time, O(n log n) for a valid plan."""
    lower, upper, size = problem.lower.tolist(), problem.upper.tolist(), problem.size.tolist()
    start = offsets.tolist()
    events = sorted([(upper[i], 0, i) for i in range(len(size)) if size[i]] + [(lower[i], 1, i) for i in range(len(size)) if size[i]])
    alive: list[tuple[int, int]] = []  # (offset, position), ascending: as the plan is valid so far, only neighbours can overlap
    for _, begins, i in events:
        at = bisect.bisect_left(alive, (start[i], i))
        if not begins:
            alive.pop(at)
            continue
        if at and start[alive[at - 1][1]] + size[alive[at - 1][1]] > start[i]:
            return alive[at - 1][1], i
        if at < len(alive) and alive[at][0] < start[i] + size[i]:
            return alive[at][1], i
        alive.insert(at, (start[i], i))
    return None


def check_plan(lifetimes: Sequence[Lifetime], offsets: Sequence[int]) -> None:
    """Raises ValueError, naming the buffers, when an offset is negative or two buffers share space and time."""
    if len(offsets) != len(lifetimes):
        raise ValueError(f"{len(offsets)} offsets for {len(lifetimes)} lifetimes")
    for life, offset in zip(lifetimes, offsets, strict=True):
        if offset < 0:
            raise ValueError(f"buffer {life.id}: offset {offset} is negative")
    pair = find_overlap(problem_of(lifetimes), np.array(offsets, dtype=np.int64))
    if pair is not None:
        a, b = (lifetimes[i] for i in pair)
        raise ValueError(
            f"buffers {a.id} (times {a.lower}..{a.upper}, bytes {offsets[pair[0]]}..{offsets[pair[0]] + a.size}) and "
            f"{b.id} (times {b.lower}..{b.upper}, bytes {offsets[pair[1]]}..{offsets[pair[1]] + b.size}) overlap"
        )
