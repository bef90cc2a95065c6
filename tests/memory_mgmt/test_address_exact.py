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


def hard_problem(n: int, seed: int) -> Problem:
    """A rectangle cut into n pieces at random: a plan without any hole exists, and greedy plans miss it."""
    chance = np.random.default_rng(seed)
    pieces = [(0, 1000, 0, 1000)]
    while len(pieces) < n:
        t0, t1, b0, b1 = pieces.pop(int(chance.integers(len(pieces))))
        if chance.random() < 0.5 and t1 - t0 > 1:
            cut = int(chance.integers(t0 + 1, t1))
            pieces += [(t0, cut, b0, b1), (cut, t1, b0, b1)]
        elif b1 - b0 > 1:
            cut = int(chance.integers(b0 + 1, b1))
            pieces += [(t0, t1, b0, cut), (t0, t1, cut, b1)]
        else:
            pieces.append((t0, t1, b0, b1))
    return problem_of([Lifetime(k, t0, t1, b1 - b0) for k, (t0, t1, b0, b1) in enumerate(pieces)])


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
