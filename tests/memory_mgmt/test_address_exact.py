"""Exact search against a brute force over all orders, in C++ and in Python."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_mgmt import address_exact
from memory_mgmt.address_exact import PythonSearch, exact, features
from memory_mgmt.address_examples import cut_rectangle, full_house
from memory_mgmt.address_greedy import place
from memory_mgmt.address_native import exact_library
from memory_mgmt.address_problem import Lifetime, Problem, find_overlap, height, max_live, problem_of

RUN_ON = np.zeros(1, dtype=np.int32)


@st.composite
def tiny_problems(draw: st.DrawFn) -> Problem:
    """Up to 6 buffers that crowd a short step, with one common factor of the sizes."""
    unit = draw(st.sampled_from([1, 1, 512]))
    lives = []
    for k in range(draw(st.integers(1, 6))):
        lower = draw(st.integers(0, 7))
        lives.append(Lifetime(k, lower, lower + draw(st.integers(1, 6)), unit * draw(st.integers(0, 7))))
    return problem_of(lives)


def brute_force(problem: Problem) -> int:
    """The lowest height: first fit in the best of all orders (an order by offset of an optimal plan gives it back or a lower one)."""
    return min(height(problem, place(problem, np.array(order), "first")) for order in itertools.permutations(range(len(problem))))


@given(tiny_problems())
@settings(deadline=None, max_examples=60)
def test_finds_the_optimum_and_proves_that_nothing_is_lower(problem: Problem) -> None:
    best = brute_force(problem)
    limits = time.perf_counter() + 60, RUN_ON
    searches = [lambda capacity: PythonSearch.of(problem, capacity).restarts(features(problem), 300, *limits, seed=0)]
    if exact_library() is not None:
        searches.append(lambda capacity: exact(problem, capacity, *limits))
    for search in searches:
        answer, offsets = search(best)
        assert answer == "found"
        assert find_overlap(problem, offsets) is None
        assert height(problem, offsets) == best
        assert best == 0 or search(best - 1)[0] == "infeasible"


def fits(problem: Problem, capacity: int) -> bool:
    """Whether there is a plan, by trying all addresses of one buffer after another."""
    order = np.argsort(problem.lower, kind="stable").tolist()
    lower, upper, size = problem.lower.tolist(), problem.upper.tolist(), problem.size.tolist()
    at: dict[int, int] = {}

    def rest_fits(k: int) -> bool:
        if k == len(order):
            return True
        i = order[k]
        alive = [j for j in order[:k] if upper[j] > lower[i]]
        for offset in range(capacity - size[i] + 1):
            if all(at[j] + size[j] <= offset or offset + size[i] <= at[j] for j in alive):
                at[i] = offset
                if rest_fits(k + 1):
                    return True
        return False

    return rest_fits(0)


def test_proves_that_no_plan_is_as_low_as_the_live_bytes() -> None:
    limits = time.perf_counter() + 60, RUN_ON
    answers = []
    for seed in range(120):
        problem = problem_of(full_house(20, live=8, seed=seed))
        python, _ = PythonSearch.of(problem, 8).restarts(features(problem), 300, *limits, seed=seed)
        answers.append("found" if fits(problem, 8) else "infeasible")
        assert python == answers[-1], seed
        if exact_library() is not None:
            assert exact(problem, 8, *limits, seed=seed)[0] == answers[-1], seed
    assert answers.count("infeasible") >= 2


def test_fixed_buffers_keep_their_offsets_and_lie_below_the_others() -> None:
    problem = problem_of([Lifetime("a", 0, 4, 2), Lifetime("b", 1, 2, 3), Lifetime("c", 2, 3, 4), Lifetime("d", 0, 6, 1)])
    fixed = np.array([-1, 3, -1, 0])
    searches = [lambda capacity: exact(problem, capacity, time.perf_counter() + 20, RUN_ON, fixed=fixed)]
    limits = time.perf_counter() + 20, RUN_ON
    searches.append(lambda capacity: PythonSearch.of(problem, capacity, fixed).restarts(features(problem), 300, *limits, seed=0))
    for search in searches:
        assert search(7)[0] == "infeasible"  # a would fit below b, but goes on it
        answer, offsets = search(8)
        assert answer == "found"
        assert offsets.tolist() == [6, 3, 1, 0]


def hard_problem(pieces: int, seed: int) -> Problem:
    return problem_of(cut_rectangle(pieces, seed=seed))


@pytest.mark.parametrize("seed", range(3))
def test_finds_plans_without_a_hole(seed: int) -> None:
    problem = hard_problem(60, seed)
    answer, offsets = exact(problem, max_live(problem), time.perf_counter() + 20, RUN_ON)
    assert answer == "found"
    assert find_overlap(problem, offsets) is None
    assert height(problem, offsets) == max_live(problem) == 1000


def test_python_twin_finds_a_plan_without_a_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address_exact, "exact_library", lambda: None)
    problem = hard_problem(16, seed=1)
    answer, offsets = exact(problem, 1000, time.perf_counter() + 20, RUN_ON)
    assert answer == "found"
    assert find_overlap(problem, offsets) is None


def test_stops_at_the_deadline_and_at_the_flag() -> None:
    problem = hard_problem(400, seed=0)
    assert exact(problem, 1000, time.perf_counter() - 1, RUN_ON)[0] == "stopped"
    assert exact(problem, 1000, time.perf_counter() + 60, np.ones(1, dtype=np.int32))[0] == "stopped"


def test_heights_beyond_32_bits() -> None:
    lives = [Lifetime("a", 0, 2, 2**40 + 1), Lifetime("b", 1, 3, 2**41), Lifetime("c", 2, 4, 2**40 + 1)]
    problem = problem_of(lives)
    answer, offsets = exact(problem, max_live(problem), time.perf_counter() + 20, RUN_ON)
    assert answer == "found"
    assert height(problem, offsets) == 2**40 + 1 + 2**41
