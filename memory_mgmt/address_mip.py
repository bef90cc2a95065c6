"""The mixed-integer program of dynamic storage allocation through PuLP: exact up to about 60 buffers, beyond that as neighbourhood search.

    minimise M   with   A_i + S_i <= M,   and for each pair alive together   A_i + S_i <= A_j + U z_ij,   A_j + S_j <= A_i + U (1 - z_ij)

(MEMO, SIGMOD 2025, equation 3; OLLA). Whole instances of a hundred and more buffers are beyond CBC and HiGHS, whose relaxation is weak:
there about 40 buffers that lie together are free, and every other pair keeps its order. PuLP's HiGHS does not pass a start on (the option
warmStart is ignored in silence), so ``_Started`` hands it to the solver itself.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from memory_mgmt.address_greedy import place
from memory_mgmt.address_native import native_place, search_library
from memory_mgmt.address_problem import Int64s, Problem, height

WHOLE = 60  # buffers solved as one program
FREE = 40  # buffers of a neighbourhood
ROUND_SECONDS = 5.0
SCALE = 1000.0  # the program's height: far from the solvers' absolute tolerances

Offer = Callable[[Int64s], None]


def mip(problem: Problem, start: Int64s, bound: int, deadline: float, offer: Offer, seed: int = 0) -> int:
    """Offers lower plans than ``start`` until ``deadline`` (time.perf_counter); returns the proven lower bound, at least ``bound``."""
    if len(problem) <= WHOLE:
        offsets, proven = solve(problem, start, set(range(len(problem))), bound, deadline)
        offer(offsets)
        return max(bound, proven)
    chance = random.Random(seed)
    offsets = start
    while time.perf_counter() < deadline and height(problem, offsets) > bound:
        free = neighbourhood(problem, offsets, chance)
        improved, _ = solve(problem, offsets, free, bound, min(deadline, time.perf_counter() + ROUND_SECONDS))
        if height(problem, improved) <= height(problem, offsets):
            offsets = improved
            offer(offsets)
    return bound


def neighbourhood(problem: Problem, offsets: Int64s, chance: random.Random) -> set[int]:
    """About 40 buffers that lie next to each other, grown from one that reaches the top."""
    touching: dict[int, list[int]] = {}
    for a, b in sorted(pair_orders(problem, offsets, set())[0]):
        touching.setdefault(a, []).append(b)
        touching.setdefault(b, []).append(a)
    tops = offsets + problem.size
    free = {chance.choice(np.flatnonzero(tops == tops.max()).tolist())}
    border = list(free)
    while border and len(free) < FREE:
        at = border.pop(chance.randrange(len(border)))
        fresh = [k for k in dict.fromkeys(touching.get(at, [])) if k not in free][: FREE - len(free)]
        free.update(fresh)
        border.extend(fresh)
    return free


Pairs = set[tuple[int, int]]


def pair_orders(problem: Problem, offsets: Int64s, free: set[int]) -> tuple[Pairs, Pairs]:
    """The pairs (below, above) that keep their order, without most of those that follow from others, and the pairs whose order is open.

    Two free buffers are open to each other when no other buffer lies between them at any time. A sweep over time that looks at the
    neighbours of what begins and ends: n log n, and a look at the free ones at each time.
    """
    lower, upper, at = problem.lower.tolist(), problem.upper.tolist(), offsets.tolist()
    used = np.flatnonzero(problem.size).tolist()
    events = sorted([(upper[j], 0, j) for j in used] + [(lower[j], 1, j) for j in used])
    held: list[tuple[int, int]] = []  # (offset, buffer), ascending, of those alive that are not free
    loose: list[tuple[int, int]] = []  # of those alive that are free
    fixed: Pairs = set()
    open_: Pairs = set()
    apart: Pairs = set()
    for k, (now, begins, j) in enumerate(events):
        lying = loose if j in free else held
        spot = bisect.bisect_left(lying, (at[j], j))
        if begins:
            lying.insert(spot, (at[j], j))
        else:
            lying.pop(spot)
        if lying is held:
            fixed.update((a[1], b[1]) for a, b in itertools.pairwise(held[max(0, spot - 1) : spot + 2]))
        if loose and (k + 1 == len(events) or events[k + 1][0] > now):
            runs: dict[int, list[int]] = {}  # free ones with the same neighbours among the held
            for offset, i in loose:
                runs.setdefault(bisect.bisect_left(held, (offset, i)), []).append(i)
            for spot, run in runs.items():
                if spot:
                    fixed.update((held[spot - 1][1], i) for i in run)
                if spot < len(held):
                    fixed.update((i, held[spot][1]) for i in run)
                open_.update(itertools.combinations(run, 2))
            for one, other in itertools.combinations(runs.values(), 2):
                apart.update(itertools.product(one, other))
    return fixed, open_ - apart


def solve(problem: Problem, start: Int64s, free: set[int], bound: int, deadline: float) -> tuple[Int64s, int]:
    """The best plan found with the order of all pairs but those among ``free`` as in ``start``, and a lower bound.

    The bound holds for the whole problem only when all buffers are free; else it is 0. The plan is exact whatever the solver's
    tolerances: only the order of its offsets is used.
    """
    import pulp  # a second of import that greedy plans need not wait for

    ceiling = height(problem, start)
    if ceiling <= bound or time.perf_counter() >= deadline:
        return start, 0
    scale = ceiling / SCALE
    fixed, open_ = pair_orders(problem, start, free)
    program = pulp.LpProblem("addresses", pulp.LpMinimize)
    used = np.flatnonzero(problem.size).tolist()
    size = {i: float(problem.size[i]) / scale for i in used}
    at = {i: _variable(program, f"a{i}", 0, SCALE) for i in used}
    top = _variable(program, "top", min(SCALE, bound / scale), SCALE)
    program += top
    for i in used:
        program += at[i] + size[i] <= top
        at[i].setInitialValue(min(SCALE, float(start[i]) / scale))  # the division may round up
    top.setInitialValue(SCALE)
    for below, above in fixed:
        program += at[below] + size[below] <= at[above]
    for i, j in open_:
        order = _variable(program, f"z{i}_{j}", 0, 1, "Integer")
        order.setInitialValue(0 if start[i] < start[j] else 1)
        program += at[i] + size[i] <= at[j] + SCALE * order
        program += at[j] + size[j] <= at[i] + SCALE * (1 - order)
    least = _run(program, deadline - time.perf_counter()) * scale
    values = {i: variable.value() for i, variable in at.items()}
    if None in values.values():  # the solver found nothing and forgot the start
        return start, 0
    offsets = _dropped(problem, np.array([values.get(i, 0.0) for i in range(len(problem))], dtype=np.float64))
    if len(free) < len(problem) or not math.isfinite(least):
        return offsets, 0
    # The solver's tolerances only ever loosen the program; its own arithmetic may err by far less than this.
    proven = math.ceil((least - 1e-7 * ceiling) / problem.unit) * problem.unit
    return offsets, min(proven, height(problem, offsets))


def _variable(program: Any, name: str, low: float, high: float, kind: str = "Continuous") -> Any:
    import pulp

    if hasattr(program, "add_variable"):  # since PuLP 3.3, which warns of the constructor
        return program.add_variable(name, low, high, kind)
    return pulp.LpVariable(name, low, high, kind)


def _dropped(problem: Problem, about: Any) -> Int64s:
    """First fit in the order of approximate offsets: exact, and no buffer ends higher than in the plan that they stand for."""
    order = np.argsort(about, kind="stable")
    library = search_library()
    return place(problem, order, "first") if library is None else native_place(library, problem, order, best=False)


def _run(program: Any, seconds: float) -> float:
    """Solves with HiGHS, or CBC where it is missing; returns a proven lower bound of the objective, -inf when there is none."""
    import pulp

    seconds = max(0.1, min(seconds, 1e6))
    try:
        import highspy
    except ImportError:
        cbc = pulp.PULP_CBC_CMD if hasattr(pulp, "PULP_CBC_CMD") else pulp.COIN_CMD  # PuLP 4 brings CBC under the other name
        program.solve(cbc(msg=False, timeLimit=seconds, threads=1, warmStart=True, gapRel=0))
        proven = program.sol_status == pulp.LpSolutionOptimal
        return float(pulp.value(program.objective)) if proven else -math.inf

    class _Started(pulp.HiGHS):
        def callSolver(self, lp: Any) -> None:
            start = highspy.HighsSolution()
            start.col_value = [variable.varValue for variable in lp.variables()]
            lp.solverModel.setSolution(start)
            lp.solverModel.run()

    program.solve(_Started(msg=False, timeLimit=seconds, threads=1, gapRel=0.0))
    return float(program.solverModel.getInfo().mip_dual_bound)
