"""Where a problem's budget is too small: the smallest that would do. Imports no torch."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

from memory_mgmt.planner import Case, Choice, cases, choice_of, solve
from memory_mgmt.planner_lp import Program, Solution
from memory_mgmt.planner_problem import Problem


@dataclass(frozen=True)
class SmallestBudget:
    """The least device memory that a problem fits in, and the fastest step there."""

    budget_bytes: int
    choice: Choice


def smallest_budget(problem: Problem, time_limit: float = 10.0) -> SmallestBudget:
    """The least budget over all tiles and groups, within host memory and whatever else the problem forbids; then the fastest policy
    at that budget. Raises ValueError when no budget would do (a class that may be neither kept, swapped nor recomputed)."""
    deadline = time.monotonic() + time_limit
    leanest: tuple[Case, Solution] | None = None
    for case in cases(problem):
        found = Program(case.units(), minimise="budget").solve(max(0.2, deadline - time.monotonic()))
        if found is not None and (leanest is None or found.budget_bytes < leanest[1].budget_bytes):
            leanest = case, found
        if time.monotonic() > deadline and leanest is not None:
            break
    if leanest is None:
        raise ValueError("no device memory is enough: some activations may be neither kept, swapped nor recomputed")
    least = leanest[1].budget_bytes
    # At the very least budget shares are settled to the solver's last digit; a budget a little larger leaves room for rounding.
    for slack in (1e-6, 1e-4, 1e-3, 1e-2):
        budget = math.ceil(least * (1 + slack))
        choice = solve(replace(problem, budget_bytes=budget), max(0.5, deadline - time.monotonic()))
        if choice is not None:
            return SmallestBudget(min(budget, max(choice.peak_bytes, math.ceil(least))), choice)
    # Whole tiles are coarse here, or a busy machine gave the solver no time: the least solution itself, in whole tiles.
    choice = choice_of(problem, *leanest)
    if choice is None:
        raise ValueError(f"no policy found at {budget} bytes, though {least:.0f} are enough by the linear program")
    return SmallestBudget(choice.peak_bytes, choice)
