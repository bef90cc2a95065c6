"""Beyond one problem: the smallest budget that would do, the cheapest changes that would fit, and the choice among settings that are
``auto``. Imports no torch.

A candidate is a dictionary of settings (command-line overrides) and a way to make its ``Problem``, which may take seconds: it is made
only when its turn comes. Problems are compared by seconds per token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from memory_mgmt.plan import Change
from memory_mgmt.planner import Choice, cases, solve
from memory_mgmt.planner_lp import Program
from memory_mgmt.planner_problem import Problem
from models.errors import UserError

Settings = Mapping[str, Any]


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


@dataclass(frozen=True)
class Row:
    """One candidate's outcome."""

    settings: Settings
    status: str
    """``fits``, ``does not fit``, ``cannot be faster``, ``refused: ...`` or ``not tried``."""
    choice: Choice | None = None
    seconds_per_token: float = math.inf

    @property
    def overrides(self) -> str:
        """The settings as command-line overrides."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items())

    def change(self) -> Change:
        """This row for the plan's list of changes. Raises ValueError when it does not fit."""
        if self.choice is None:
            raise ValueError(f"'{self.overrides}' does not fit")
        extra = self.choice.extra_seconds
        return Change(self.overrides, self.choice.peak_bytes, f"{self.choice.seconds:.3g} s per step, {extra:.3g} s of it for less memory")


@dataclass(frozen=True)
class Candidate:
    """Settings and the problem they make. ``problem`` may return None or raise ValueError or UserError where they are impossible."""

    settings: Settings
    problem: Callable[[], Problem | None]


@dataclass(frozen=True)
class Ranking:
    """All candidates, the fastest that fits first; those that do not fit follow in their given order."""

    rows: tuple[Row, ...]
    complete: bool
    """Every candidate was tried or ruled out within the time limit."""
    seconds: float

    @property
    def best(self) -> Row | None:
        """The fastest that fits, or None."""
        return self.rows[0] if self.rows and self.rows[0].choice is not None else None


def choose(
    candidates: Sequence[Candidate], evaluate: Callable[[Problem], Choice | None] = solve, *, time_limit: float = 60.0, prune: bool = True
) -> Ranking:
    """Rank settings by seconds per token of the policy that ``evaluate`` finds for each.

    ``prune``: a problem whose step is slower with everything kept than the best so far is not solved. Candidates whose turn has not
    come within ``time_limit`` seconds are listed as not tried: put promising ones first.
    """
    started = time.monotonic()
    rows: list[Row] = []
    best, complete = math.inf, True
    for candidate in candidates:
        if time.monotonic() - started > time_limit:
            complete = False
            rows.append(Row(candidate.settings, "not tried"))
            continue
        row = _row(candidate, evaluate, best if prune else math.inf)
        best = min(best, row.seconds_per_token)
        rows.append(row)
    ranked = sorted(rows, key=lambda row: row.seconds_per_token)
    return Ranking(tuple(ranked), complete, time.monotonic() - started)


def _row(candidate: Candidate, evaluate: Callable[[Problem], Choice | None], best: float) -> Row:
    try:
        problem = candidate.problem()
    except (ValueError, UserError) as error:
        return Row(candidate.settings, f"refused: {error}")
    if problem is None:
        return Row(candidate.settings, "refused: these settings cannot be combined")
    if problem.base_seconds / problem.step_tokens >= best:
        return Row(candidate.settings, "cannot be faster")
    choice = evaluate(problem)
    if choice is None:
        return Row(candidate.settings, "does not fit")
    return Row(candidate.settings, "fits", choice, choice.seconds / problem.step_tokens)


def cheapest_changes(
    problem_with: Callable[[Settings], Problem | None],
    candidates: Sequence[Settings],
    *,
    count: int = 3,
    evaluate: Callable[[Problem], Choice | None] = solve,
    time_limit: float = 30.0,
) -> tuple[Row, ...]:
    """The ``count`` candidates that would fit with the fastest steps, fastest first; fewer when fewer fit.

    ``problem_with(settings)`` is the problem under these settings, None or ValueError where they are impossible.
    """

    def candidate(settings: Settings) -> Candidate:
        return Candidate(settings, lambda: problem_with(settings))

    ranking = choose([candidate(settings) for settings in candidates], evaluate, time_limit=time_limit, prune=False)
    return tuple(row for row in ranking.rows if row.choice is not None)[:count]
