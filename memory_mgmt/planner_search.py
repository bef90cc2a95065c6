"""Where a problem's budget is too small: the smallest that would do. Imports no torch."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

from memory_mgmt.planner import Choice, cases, solve
from memory_mgmt.planner_lp import Program
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
    least = math.inf
    for case in cases(problem):
        found = Program(case.units(), minimise="budget").solve(max(0.2, deadline - time.monotonic()))
        if found is not None:
            least = min(least, found.budget_bytes)
        if time.monotonic() > deadline and least < math.inf:
            break
    if least == math.inf:
        raise ValueError("no device memory is enough: some activations may be neither kept, swapped nor recomputed")
    # At the very least budget shares are settled to the solver's last digit; a budget a little larger leaves room for rounding.
    for slack in (1e-6, 1e-4, 1e-3, 1e-2):
        budget = math.ceil(least * (1 + slack))
        choice = solve(replace(problem, budget_bytes=budget), max(0.5, deadline - time.monotonic()))
        if choice is not None:
            return SmallestBudget(min(budget, max(choice.peak_bytes, math.ceil(least))), choice)
    raise ValueError(f"no policy found at {budget} bytes, though {least:.0f} are enough by the linear program")
