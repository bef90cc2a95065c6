"""The squeaky wheel: valid plans, never worse than the start, and better where greedy misses."""

from __future__ import annotations

import time

import numpy as np
import pytest

from memory_mgmt.address_examples import cut_rectangle
from memory_mgmt.address_greedy import orders, place
from memory_mgmt.address_local_search import squeaky_steps, squeaky_wheel
from memory_mgmt.address_native import search_library
from memory_mgmt.address_problem import Int64s, Problem, find_overlap, height, max_live, problem_of

RUN_ON = np.zeros(1, dtype=np.int32)


def best_greedy(problem: Problem) -> Int64s:
    plans = [place(problem, order, "first") for _, order in orders(problem)]
    return min(plans, key=lambda offsets: height(problem, offsets))


@pytest.mark.parametrize("native", [True, False])
def test_lowers_a_greedy_plan(native: bool) -> None:
    if native and search_library() is None:
        pytest.skip("no C++ compiler")
    problem = problem_of(cut_rectangle(40, seed=1))
    start = best_greedy(problem)
    bound, found = max_live(problem), height(problem, start)
    assert found > bound
    deadline = time.perf_counter() + (0.3 if native else 2.0)
    order = np.argsort(start, kind="stable")
    if native:
        offsets = squeaky_wheel(problem, start, bound, deadline, RUN_ON)
    else:
        offsets = squeaky_steps(problem, order, bound, deadline, RUN_ON, seed=0)
    assert find_overlap(problem, offsets) is None
    assert bound <= height(problem, offsets) < found


def test_a_set_flag_ends_the_search_with_the_start_or_lower() -> None:
    problem = problem_of(cut_rectangle(40, seed=1))
    start = best_greedy(problem)
    offsets = squeaky_wheel(problem, start, 0, time.perf_counter() + 60, np.ones(1, dtype=np.int32))
    assert find_overlap(problem, offsets) is None
    assert height(problem, offsets) <= height(problem, start)
