"""Greedy plans: take the buffers in some order, put each where it fits among those already placed.

``place`` is the readable twin of ``place`` in address_search.cpp: both give the same offsets for the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from memory_mgmt.address_problem import Int64s, Problem, pressure

Fit = Literal["first", "best"]
FITS: tuple[Fit, ...] = ("first", "best")


def orders(problem: Problem) -> Iterator[tuple[str, Int64s]]:
    """Named orders, the most promising first. Ties end at the position in the input, so every order is one permutation."""
    lower, duration, size = problem.lower, problem.upper - problem.lower, problem.size
    area = duration.astype(np.float64) * size  # float: a product of two 62-bit numbers only ranks here
    yield "size", np.lexsort((lower, -duration, -size))
    yield "area", np.lexsort((lower, -size, -area))
    yield "size-start", np.lexsort((-duration, lower, -size))
    yield "duration", np.lexsort((lower, -size, -duration))
    yield "start", np.lexsort((-size, lower))
    yield "end", np.lexsort((-size, -problem.upper))
    total = pressure(problem)
    yield "pressure", np.lexsort((lower, -area, -total))
    yield "pressure-size", np.lexsort((lower, -duration, -size, -total))
    yield "size-late", np.lexsort((duration, -lower, -size))


def place(problem: Problem, order: Int64s, fit: Fit) -> Int64s:
    """Offsets from placing in ``order``: the lowest gap that is large enough ("first"), or the tightest one, the lowest of equals
    ("best"). Where no gap is large enough the buffer goes on top."""
    # The placed ones so far, in the order of placement.
    lower, upper, size = problem.lower[order], problem.upper[order], problem.size[order]
    start = np.zeros(len(order), dtype=np.int64)
    for k in range(len(order)):
        meets = np.flatnonzero((lower[:k] < upper[k]) & (upper[:k] > lower[k]) & (size[:k] > 0))
        start[k] = _gap(start[meets], size[meets], int(size[k]), fit)
    offsets = np.empty(len(order), dtype=np.int64)
    offsets[order] = start
    return offsets


def _gap(start: Int64s, size: Int64s, wanted: int, fit: Fit) -> int:
    if not len(start) or wanted == 0:
        return 0
    rank = np.argsort(start, kind="stable")
    tops = np.maximum.accumulate((start + size)[rank])
    floors = np.concatenate([[0], tops[:-1]])
    gaps = start[rank] - floors
    fitting = np.flatnonzero(gaps >= wanted)
    if not len(fitting):
        return int(tops[-1])
    return int(floors[fitting[0]] if fit == "first" else floors[fitting[np.argmin(gaps[fitting])]])
