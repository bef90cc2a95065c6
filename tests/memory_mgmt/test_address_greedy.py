"""Greedy plans and the problem they solve, against pair-by-pair references."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_mgmt.address_greedy import FITS, Fit, orders, place
from memory_mgmt.address_native import native_place, search_library
from memory_mgmt.address_problem import Lifetime, check_plan, find_overlap, height, max_live, pressure, problem_of


@st.composite
def lifetimes(draw: st.DrawFn, largest: int = 14, sizes: st.SearchStrategy[int] | None = None) -> list[Lifetime]:
    """Up to ``largest`` buffers in a short step, zero sizes included."""
    out = []
    for k in range(draw(st.integers(0, largest))):
        lower = draw(st.integers(-3, 12))
        out.append(Lifetime(k, lower, lower + draw(st.integers(1, 8)), draw(sizes or st.integers(0, 9))))
    return out


def overlapping(buffers: list[Lifetime], offsets: list[int]) -> bool:
    return any(
        a.lower < b.upper and b.lower < a.upper and p < q + b.size and q < p + a.size and a.size and b.size
        for (a, p), (b, q) in itertools.combinations(zip(buffers, offsets, strict=True), 2)
    )


@given(lifetimes())
def test_lower_bound_and_pressure_count_the_live_bytes(buffers: list[Lifetime]) -> None:
    problem = problem_of(buffers)
    live = {t: sum(b.size for b in buffers if b.lower <= t < b.upper) for t in range(-3, 20)}
    assert max_live(problem) == max(live.values())
    assert pressure(problem).tolist() == [max(live[t] for t in range(b.lower, b.upper)) for b in buffers]


@given(lifetimes(), st.sampled_from(FITS))
@settings(deadline=None)
def test_every_order_gives_a_valid_plan_and_both_twins_agree(buffers: list[Lifetime], fit: Fit) -> None:
    problem = problem_of(buffers)
    for _, order in orders(problem):
        offsets = place(problem, order, fit)
        assert not overlapping(buffers, offsets.tolist())
        assert height(problem, offsets) >= max_live(problem)
        if (library := search_library()) is not None:
            assert native_place(library, problem, order, fit == "best").tolist() == offsets.tolist()


@given(lifetimes(), st.data())
def test_check_plan_finds_exactly_the_overlaps(buffers: list[Lifetime], data: st.DataObject) -> None:
    offsets = [data.draw(st.integers(0, 20)) for _ in buffers]
    found = find_overlap(problem_of(buffers), np.array(offsets, dtype=np.int64))
    assert (found is not None) == overlapping(buffers, offsets)
    if found is None:
        check_plan(buffers, offsets)
    else:
        with pytest.raises(ValueError, match="overlap"):
            check_plan(buffers, offsets)


def test_first_fit_takes_the_lowest_gap_and_best_fit_the_tightest() -> None:
    # Three blocks leave a gap of 5 at 0 and a gap of 3 at 7; a buffer of 3 goes to 0 or to 7.
    buffers = [Lifetime("low", 0, 2, 5), Lifetime("middle", 0, 9, 2), Lifetime("high", 0, 2, 3), Lifetime("top", 0, 9, 1)]
    problem = problem_of([*buffers, Lifetime("new", 3, 4, 3)])
    order = np.arange(5)
    assert place(problem, order, "first").tolist() == [0, 5, 7, 10, 0]
    assert place(problem, order, "best").tolist() == [0, 5, 7, 10, 7]


@pytest.mark.parametrize(
    ("life", "message"),
    [
        (Lifetime("x", 4, 4, 1), "buffer x: upper 4 must be greater than lower 4"),
        (Lifetime("x", 0, 1, -1), "buffer x: size -1 is negative"),
        (Lifetime("x", 0, 1, 2**62), "sizes sum to"),
        (Lifetime("x", 0, 2**63, 1), "do not fit"),
    ],
)
def test_impossible_lifetimes_are_refused_by_name(life: Lifetime, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        problem_of([life])


def test_the_room_plans_addresses_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys, memory_mgmt.address_planning; assert 'torch' not in sys.modules and 'pulp' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
