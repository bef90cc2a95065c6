"""Solving a linear program through PuLP, and reading shares out of it. Imports no torch."""

from __future__ import annotations

import pulp

from memory_mgmt.policy import Split

ROUND = 1e-7
"""Shares closer to 0 or 1 than this are meant to be 0 or 1."""


def value_of(of: pulp.LpVariable | pulp.LpAffineExpression | None) -> float:
    """A solved variable's or expression's value; 0 for what the solver left out."""
    value = None if of is None else of.value()
    return 0.0 if value is None else float(value)  # type: ignore[arg-type]


def split_of(*variables: pulp.LpVariable | None) -> Split:
    """A class's split from its variables (swap, recompute, quantise); the solver's last digits are cleaned off."""
    shares = [0.0 if v is None else min(1.0, max(0.0, value_of(v))) for v in variables]
    shares = [0.0 if x < ROUND else 1.0 if x > 1 - ROUND else x for x in shares]
    excess = max(0.0, sum(shares) - 1.0)
    largest = max(range(len(shares)), key=lambda j: shares[j])
    shares[largest] -= excess
    if 0 < (keep := 1.0 - sum(shares)) < ROUND and max(shares) > 0:
        shares[largest], keep = shares[largest] + keep, 0.0
    swap, recompute, quantise = shares
    return Split(max(0.0, keep), swap, recompute, quantise)


def run_solver(program: pulp.LpProblem, time_limit: float, relative_gap: float | None = None, relaxed: bool = False) -> str | None:
    """Solve through PuLP: HiGHS, or CBC where highspy is not installed. The solver's name, or None without a solution. ``relaxed``:
    integers may be fractions."""
    options = {"mip": not relaxed, "msg": False, "timeLimit": time_limit, "gapRel": relative_gap, "threads": 1}
    highs = pulp.HiGHS(**options)
    name, solver = ("HiGHS", highs) if highs.available() else ("CBC", pulp.PULP_CBC_CMD(**options))
    program.solve(solver)
    return name if program.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible) else None
