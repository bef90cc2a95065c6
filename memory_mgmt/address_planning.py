"""Addresses for the buffers of a step whose lives are known: the lowest plan found within a time limit, with its certificate.

``plan_addresses`` is what the rest of the room calls; the methods are in address_greedy.py and its neighbours. The lower bound is the
most bytes alive at one time; a plan of that height is optimal, otherwise the ratio states the gap.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memory_mgmt.address_greedy import FITS, orders, place
from memory_mgmt.address_native import native_place, search_library
from memory_mgmt.address_problem import Int64s, Lifetime, Problem, check_plan, height, max_live, problem_of

__all__ = ["AddressPlan", "Lifetime", "check_plan", "plan_addresses"]


@dataclass(frozen=True)
class AddressPlan:
    """Offsets in the order of the lifetimes given, their height and what is known about its quality."""

    offsets: tuple[int, ...]
    height: int
    lower_bound: int
    method: str
    status: str
    seconds: float

    @property
    def ratio(self) -> float:
        """Height over lower bound; 1.0 is optimal."""
        return self.height / self.lower_bound if self.lower_bound else 1.0

    @property
    def optimal(self) -> bool:
        """True when the height equals the lower bound: no plan can be lower."""
        return self.height == self.lower_bound


def plan_addresses(
    lifetimes: Sequence[Lifetime],
    *,
    capacity: int | None = None,
    time_limit: float = 10.0,
    method: str = "auto",
    alignment: int = 1,
    seed: int = 0,
) -> AddressPlan:
    """Addresses for the lifetimes: the lowest plan found within ``time_limit`` seconds. Offsets are multiples of ``alignment``."""
    begun = time.perf_counter()
    problem = problem_of(lifetimes, alignment)
    bound = max_live(problem)
    offsets, label = greedy(problem, bound, begun + time_limit)
    found = height(problem, offsets)
    status = "optimal" if found == bound else "feasible"
    return AddressPlan(tuple(offsets.tolist()), found, bound, label, status, time.perf_counter() - begun)


def greedy(problem: Problem, target: int, deadline: float) -> tuple[Int64s, str]:
    """The best of the greedy plans; stops at ``target`` or, with at least one plan, at the deadline."""
    best, best_height, label = np.zeros(len(problem), dtype=np.int64), 0, "greedy"
    if not len(problem):
        return best, label
    library = search_library()
    best_height = int(problem.size.sum()) + 1
    for name, order in orders(problem):
        for fit in FITS:
            offsets = place(problem, order, fit) if library is None else native_place(library, problem, order, fit == "best")
            if (found := height(problem, offsets)) < best_height:
                best, best_height, label = offsets, found, f"greedy:{name}/{fit}"
            if best_height <= target or time.perf_counter() > deadline:
                return best, label
    return best, label
