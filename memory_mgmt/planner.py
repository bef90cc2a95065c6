"""Choose what is kept, swapped or recomputed, in which tiles and groups: the fastest step within device memory, host memory and the
copies that computation hides.

A linear program through PuLP (``planner_lp.py``), a greedy (``planner_greedy.py``) and MEMO's rule (``planner_memo.py``) each propose a
policy; ``planner_simulate.evaluate`` checks all of them and the fastest valid one is returned. When nothing fits:
``planner_search.smallest_budget``. Imports no torch.

Try alone: ``pytest tests/memory_mgmt/test_planner.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from memory_mgmt.plan import GIB
from memory_mgmt.planner_greedy import solve_greedy
from memory_mgmt.planner_groups import grouped, spread
from memory_mgmt.planner_lp import Program, Solution
from memory_mgmt.planner_memo import solve_memo
from memory_mgmt.planner_problem import UNLIMITED, Problem, Tiling
from memory_mgmt.planner_rounding import rounded
from memory_mgmt.planner_simulate import Evaluation, evaluate
from memory_mgmt.policy import CLASSES, Policy

_NOTHING_LOST = 1e-4
_FOR_SIMPLICITY = 3e-3
"""Share of the step that a policy which is equal for equal layers may cost more than the best one."""


@dataclass(frozen=True)
class Choice:
    """A policy that fits, and why it is the one."""

    policy: Policy
    seconds: float
    """Of one optimizer step."""
    extra_seconds: float
    """Over a step that keeps everything: recomputation, tiles and waiting for copies."""
    peak_bytes: int
    host_bytes: int
    binding: str
    """What keeps the step from being faster, in words; ``nothing: ...`` when all is kept."""
    worth: tuple[str, ...]
    """What more device memory, host memory or copy bandwidth would buy."""
    method: str
    """Whose policy it is: ``lp``, ``greedy`` or ``memo``."""
    evaluation: Evaluation
    greedy_seconds: float | None
    """None: it found nothing that fits. So for the next two."""
    lp_seconds: float | None
    memo_seconds: float | None
    solver: str
    solve_time: float
    complete: bool
    """Whether all tile and group candidates were examined within the time limit."""


@dataclass(frozen=True)
class _Candidate:
    policy: Policy
    evaluation: Evaluation
    method: str

    @property
    def seconds(self) -> float:
        return self.evaluation.seconds


@dataclass(frozen=True)
class Case:
    """One pair of tilings and one group size: a linear program of its own."""

    problem: Problem
    """With this tiling only; its layers are the real ones."""
    k: int

    def policy(self, solution: Solution) -> Policy:
        """The whole policy of a solution of ``units()``."""
        n = len(self.problem.layers)
        layers = solution.layers if self.k == 1 else spread(solution.layers, n, self.k)
        loss = self.problem.loss_tiles[solution.loss_tile].tokens
        return Policy(layers, self.k, loss, self.problem.ffn_tiles[0], self.problem.memory_tiles[0])

    def units(self) -> Problem:
        """The problem with groups as layers."""
        return grouped(self.problem, self.k)


def cases(problem: Problem) -> list[Case]:
    """Every combination of tiles and group size; groups only where everything inside them may be recomputed. A tile size that
    makes no difference (a memory tile without memory layers) is left out."""
    tiled: list[Problem] = []
    for tiling in problem.tilings():
        one = problem.with_tiles(tiling)
        if all(one.layers != other.layers for other in tiled):
            tiled.append(one)
    costs = [layer.of(name) for layer in set(problem.layers) for name in CLASSES[1:]]
    groupable = all(cost.may_recompute for cost in costs if cost.bytes or cost.recompute_seconds)
    return [Case(one, k) for k in problem.group_blocks if k == 1 or groupable for one in tiled]


def solve(problem: Problem, time_limit: float = 10.0, *, with_worth: bool = True) -> Choice | None:
    """The fastest valid policy, or None when nothing fits (then: ``smallest_budget``).

    Every pair of tiles and every group size is a case; cases are taken in the order of their greedy's result, and those whose
    computation alone is not faster than the best policy so far are skipped. Within ``time_limit`` seconds. ``with_worth``: also find
    out what more memory or bandwidth would buy.
    """
    started = time.monotonic()
    deadline = started + time_limit
    known = cases(problem)
    greedy = {case: _greedy(problem, case) for case in known}
    found = [one for one in greedy.values() if one is not None] + _memo(problem)
    programs: list[tuple[_Candidate, Case, Solution]] = []
    complete = True
    order = sorted(known, key=lambda case: (g.seconds if (g := greedy[case]) is not None else math.inf, case.k))
    for case in order:
        best = min((one.seconds for one in [*found, *(p[0] for p in programs)]), default=math.inf)
        if programs and _floor(case) >= best:
            continue
        if time.monotonic() > deadline:
            complete = False
            break
        solved = _by_program(problem, case, deadline, best if programs else math.inf)
        if solved is not None:
            programs.append((solved[0], case, solved[1]))
    by_program = min(programs, key=lambda p: p[0].seconds, default=None)
    candidates = [*([by_program[0]] if by_program else []), *found]
    if not candidates:
        return None
    best = min(candidates, key=lambda one: one.seconds)
    prices = by_program[1:] if by_program else None
    solver = by_program[2].solver if by_program else ""
    choice = _choice(problem, best, candidates, prices, solver, started, complete)
    if not with_worth or choice.extra_seconds <= problem.base_seconds * _NOTHING_LOST:
        return choice
    worth = _worth(*prices, deadline) if prices else ()
    if not worth:
        worth = _worth_of_another_choice(problem, choice, deadline)
    return replace(choice, worth=worth, solve_time=time.monotonic() - started)


def choice_of(problem: Problem, case: Case, solution: Solution) -> Choice | None:
    """The policy of one solution in whole tiles, whatever device memory it takes; None where it exceeds another limit."""
    started, unlimited = time.monotonic(), replace(problem, budget_bytes=UNLIMITED)
    policy = case.policy(solution)
    for one in (replace(policy, layers=rounded(policy.layers, case.problem)), policy):
        if (found := _checked(unlimited, one, "lp")) is not None:
            return _choice(problem, found, [found], None, solution.solver, started, complete=True)
    return None


def _floor(case: Case) -> float:
    """Seconds of a case that no shares can lower."""
    units = case.units()
    return units.base_seconds + sum(layer.tile_seconds for layer in units.layers)


def _checked(problem: Problem, policy: Policy, method: str) -> _Candidate | None:
    found = evaluate(problem, policy)
    return None if found.violations else _Candidate(policy, found, method)


def _greedy(problem: Problem, case: Case) -> _Candidate | None:
    limits: Problem | None = case.problem
    first: Policy | None = None
    for _ in range(3):
        if limits is None or (found := solve_greedy(grouped(limits, case.k))) is None:
            break
        layers = found.layers if case.k == 1 else spread(found.layers, len(problem.layers), case.k)
        policy = replace(found, layers=layers, group_blocks=case.k)
        first = first or policy
        whole = replace(policy, layers=rounded(policy.layers, case.problem))
        evaluation = evaluate(problem, whole)
        if not evaluation.violations:
            return _Candidate(whole, evaluation, "greedy")
        limits = _lowered(limits, problem, evaluation)
    return None if first is None else _checked(problem, first, "greedy")


def _lowered(limits: Problem, problem: Problem, found: Evaluation) -> Problem | None:
    """``limits`` lowered by what whole tiles exceed of ``problem``'s; None where it is neither."""
    over_device = max(0, found.peak_bytes - problem.budget_bytes)
    over_host = max(0, found.host_bytes - problem.host_bytes)
    if not (over_device or over_host):
        return None
    host = max(0, limits.host_bytes - math.ceil(over_host * 1.01))
    return replace(limits, budget_bytes=limits.budget_bytes - math.ceil(over_device * 1.01), host_bytes=host)


def _memo(problem: Problem) -> list[_Candidate]:
    if 1 not in problem.group_blocks:
        return []
    policy = solve_memo(problem)
    first = problem.with_tiles(Tiling(0, 0))
    for one in (replace(policy, layers=rounded(policy.layers, first)), policy):
        if (found := _checked(problem, one, "memo")) is not None:
            return [found]
    return []


def _by_program(problem: Problem, case: Case, deadline: float, cutoff: float) -> tuple[_Candidate, Solution] | None:
    """The linear program's policy, rounded to whole tiles, with equal shares in equal layers where that costs nothing. None also
    when it is not faster than ``cutoff`` seconds."""
    units = case.units()
    left = max(0.2, deadline - time.monotonic())
    best = Program(units).solve(left, cutoff=cutoff)
    if best is None:
        return None
    found = _rounded_candidate(problem, case, best, deadline, uniform=False)
    alike = Program(units, uniform=True).solve(max(0.2, deadline - time.monotonic()))
    if alike is not None and (found is None or alike.seconds <= best.seconds * (1 + _FOR_SIMPLICITY)):
        same = _rounded_candidate(problem, case, alike, deadline, uniform=True)
        if same is not None and (found is None or same.seconds <= found.seconds * (1 + _FOR_SIMPLICITY)):
            found = same
    return None if found is None else (found, best)


def _rounded_candidate(problem: Problem, case: Case, solution: Solution, deadline: float, uniform: bool) -> _Candidate | None:
    """Round a solution; where the rounded shares exceed a limit, solve again with that limit lowered by the excess."""
    limits = case.problem
    policy = case.policy(solution)
    for _ in range(3):
        whole = replace(policy, layers=rounded(policy.layers, case.problem))
        found = evaluate(problem, whole)
        if not found.violations:
            return _Candidate(whole, found, "lp")
        lower = _lowered(limits, problem, found)
        if lower is None or time.monotonic() > deadline:
            break
        limits = lower
        again = Program(grouped(limits, case.k), uniform=uniform).solve(max(0.2, deadline - time.monotonic()))
        if again is None:
            break
        policy = case.policy(again)
    return _checked(problem, case.policy(solution), "lp")


def _choice(
    problem: Problem,
    best: _Candidate,
    candidates: Sequence[_Candidate],
    prices: tuple[Case, Solution] | None,
    solver: str,
    started: float,
    complete: bool,
) -> Choice:
    def fastest(method: str) -> float | None:
        return min((one.seconds for one in candidates if one.method == method), default=None)

    extra = best.seconds - problem.base_seconds
    return Choice(
        policy=best.policy,
        seconds=best.seconds,
        extra_seconds=extra,
        peak_bytes=best.evaluation.peak_bytes,
        host_bytes=best.evaluation.host_bytes,
        binding=_binding(problem, best, extra, prices),
        worth=(),
        method=best.method,
        evaluation=best.evaluation,
        greedy_seconds=fastest("greedy"),
        lp_seconds=fastest("lp"),
        memo_seconds=fastest("memo"),
        solver=solver,
        solve_time=time.monotonic() - started,
        complete=complete,
    )


def _binding(problem: Problem, best: _Candidate, extra: float, prices: tuple[Case, Solution] | None) -> str:
    """Which limit decides, in words."""
    if extra <= problem.base_seconds * _NOTHING_LOST:
        return "nothing: the step is as fast as with everything kept"
    if prices is None:
        return f"device memory at {best.evaluation.peak_moment}"
    case, solution = prices
    device, host, link = _scarce(solution)
    names = []
    if device:
        # With groups the program's layers are groups; the simulated step names real layers.
        where = solution.binding_rows[0] if solution.binding_rows and case.k == 1 else best.evaluation.peak_moment
        names.append(f"device memory at {where}")
    if host:
        names.append(f"host memory ({problem.host_bytes / GIB:.1f} GiB)")
    if link:
        out, back = (problem.passes * bandwidth / 1e9 for bandwidth in (problem.bandwidth_out, problem.bandwidth_in))
        names.append(f"copy bandwidth ({out:.0f} GB/s out, {back:.0f} GB/s in)")
    return ", ".join(names) or f"device memory at {best.evaluation.peak_moment} (whole layers, tiles or groups decide)"


def _scarce(solution: Solution) -> tuple[bool, bool, bool]:
    """Whether one more GiB of device memory, of host memory, or one more GB/s would save anything, by the duals."""
    least = 1e-7 * solution.seconds
    return solution.device_worth * GIB > least, solution.host_worth * GIB > least, solution.link_worth * 1e9 > least


def _worth(case: Case, solution: Solution, deadline: float) -> tuple[str, ...]:
    """What more of each scarce resource buys: the duals say what is scarce, solving again says how much one more unit saves."""
    units = case.units()
    more_per_second = 1e9 / units.passes
    faster = {"bandwidth_out": units.bandwidth_out + more_per_second, "bandwidth_in": units.bandwidth_in + more_per_second}
    more = (
        ("1 GiB more device memory", replace(units, budget_bytes=units.budget_bytes + GIB)),
        ("1 GiB more host memory for this rank", replace(units, host_bytes=units.host_bytes + GIB)),
        ("1 GB/s more copy bandwidth", replace(units, **faster)),
    )
    if units.host_bytes == 0:  # swapping is not wanted
        more = more[:1]
    has_integers = bool(Program(units).integers)
    lines = []
    for (name, changed), scarce in zip(more, _scarce(solution), strict=False):
        found = [Program(changed).solve(max(0.2, deadline - time.monotonic()), like=solution)] if scarce else []
        if has_integers and name != "1 GB/s more copy bandwidth":
            # Duals hold whole layers and the loss tile fixed; more memory may buy one layer less to recompute.
            found.append(Program(changed).solve(max(0.2, deadline - time.monotonic())))
        after = min((one.seconds for one in found if one is not None), default=math.inf)
        if after < solution.seconds * (1 - 1e-7):
            lines.append(_saving(name, solution.seconds, after))
    return tuple(lines)


def _worth_of_another_choice(problem: Problem, choice: Choice, deadline: float) -> tuple[str, ...]:
    """Where no share is limited by memory at the margin, more of it buys another tile, group or whole layer, or nothing."""
    more = replace(problem, budget_bytes=problem.budget_bytes + GIB)
    again = solve(more, max(0.5, deadline - time.monotonic()), with_worth=False)
    return (_saving("1 GiB more device memory", choice.seconds, min(choice.seconds, again.seconds)),) if again is not None else ()


def _saving(name: str, before: float, after: float) -> str:
    saved = before - after
    if saved <= 1e-7 * before:
        return f"{name}: nothing"
    return f"{name}: {saved:.3g} s less per step ({saved / before:.2%})"
