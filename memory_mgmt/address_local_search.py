"""Local search over orders of placement: the squeaky wheel gets the grease (Joslin and Clements, 1999).

Buffers that reach the top of the plan move forward in the order, all are placed again first fit, and an order that is not worse is kept.
``squeaky_steps`` is the readable twin of the C++ loop (another stream of random numbers, so other plans).
"""

from __future__ import annotations

import random
import time

import numpy as np
from numpy.typing import NDArray

from memory_mgmt.address_greedy import place
from memory_mgmt.address_native import native_squeaky, search_library
from memory_mgmt.address_problem import Int64s, Problem, height


def squeaky_wheel(problem: Problem, start: Int64s, target: int, deadline: float, stop: NDArray[np.int32], seed: int = 0) -> Int64s:
    """The lowest plan found from placing in the order of the offsets ``start``; never higher than ``start``.

    Ends at ``target``, at ``deadline`` (time.perf_counter), or when another thread sets ``stop[0]``.
    """
    # First fit in ascending order of a plan's offsets never lifts a buffer, so the search begins at most as high as the plan.
    order = np.lexsort((-problem.size, start))
    library = search_library()
    if library is not None:
        return native_squeaky(library, problem, order, target, max(0.0, deadline - time.perf_counter()), stop, seed)
    return squeaky_steps(problem, order, target, deadline, stop, seed)


def squeaky_steps(problem: Problem, order: Int64s, target: int, deadline: float, stop: NDArray[np.int32], seed: int) -> Int64s:
    """The search in Python, for machines without a compiler."""
    chance = random.Random(seed)
    offsets = best = place(problem, order, "first")
    current = lowest = height(problem, offsets)
    while lowest > target and not stop[0] and time.perf_counter() < deadline:
        trial = _shaken(problem, order, offsets, current, target, chance)
        placed = place(problem, trial, "first")
        if (found := height(problem, placed)) <= current or chance.random() < 1 / 200:
            order, offsets, current = trial, placed, found
        if found < lowest:
            best, lowest = placed, found
    return best


def _shaken(problem: Problem, order: Int64s, offsets: Int64s, top: int, target: int, chance: random.Random) -> Int64s:
    """The order with up to eight of the buffers above a random line moved forward, and now and then any one moved."""
    line = top - max(1, int((top - target) * chance.random()))
    key = np.arange(len(order), dtype=np.float64)
    squeaking = np.flatnonzero((offsets + problem.size)[order] > line).tolist()
    for _ in range(chance.randint(1, min(8, len(squeaking)))):
        at = chance.choice(squeaking)
        key[at] = at * chance.random() - 0.5
    if chance.random() < 1 / 3:
        key[chance.randrange(len(order))] = len(order) * chance.random()
    return order[np.argsort(key, kind="stable")]
