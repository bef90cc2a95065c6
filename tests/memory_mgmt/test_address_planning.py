"""The planner of addresses as a whole: every method valid, never below its bound, and as good as brute force where that is possible."""

from __future__ import annotations

import csv
import itertools
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_mgmt import address_native
from memory_mgmt.address_bilevel import bilevel, stretches
from memory_mgmt.address_examples import cut_rectangle, training_step
from memory_mgmt.address_greedy import place
from memory_mgmt.address_mip import pair_orders, solve
from memory_mgmt.address_native import search_library
from memory_mgmt.address_planning import METHODS, Lifetime, check_plan, main, plan_addresses
from memory_mgmt.address_problem import Int64s, Problem, find_overlap, height, max_live, problem_of

ROOT = Path(__file__).parents[2]
# (lower, upper, size): five bytes are alive at all times, the lowest plan is six high, as three independent methods prove.
_LIVES = [(0, 1, 1), (1, 2, 1), (0, 2, 4), (2, 3, 5), (3, 4, 3), (3, 5, 2)]
_LIVES += [(5, 6, 1), (4, 6, 2), (5, 7, 1), (4, 7, 1), (6, 8, 3), (7, 8, 2)]
NOT_AS_LOW_AS_LIVE = [Lifetime(k, *life) for k, life in enumerate(_LIVES)]
INSTANCES = ROOT.parent / "shared" / "data" / "dsa"


@st.composite
def small_steps(draw: st.DrawFn, largest: int = 6) -> list[Lifetime]:
    out = []
    for k in range(draw(st.integers(0, largest))):
        lower = draw(st.integers(0, 7))
        group = draw(st.sampled_from([None, None, "a", "b"]))
        out.append(Lifetime(k, lower, lower + draw(st.integers(1, 6)), draw(st.integers(0, 7)), group))
    return out


def brute_force(lifetimes: list[Lifetime]) -> int:
    problem = problem_of(lifetimes)
    return min(height(problem, place(problem, np.array(order), "first")) for order in itertools.permutations(range(len(problem))))


@given(small_steps(), st.sampled_from(METHODS), st.sampled_from([1, 1, 4]))
@settings(deadline=None, max_examples=120)
def test_plans_are_valid_aligned_and_not_below_the_bound(lifetimes: list[Lifetime], method: str, alignment: int) -> None:
    plan = plan_addresses(lifetimes, method=method, alignment=alignment, time_limit=0.05)
    check_plan(lifetimes, plan.offsets)
    assert all(offset % alignment == 0 for offset in plan.offsets)
    assert plan.height >= max((offset + life.size for offset, life in zip(plan.offsets, lifetimes, strict=True)), default=0)
    assert plan.height >= plan.lower_bound >= max_live(problem_of(lifetimes, alignment))
    assert (plan.status == "optimal") == plan.optimal == (plan.ratio == 1)


@given(small_steps())
@settings(deadline=None, max_examples=40)
def test_exact_auto_and_mip_find_and_certify_the_optimum(lifetimes: list[Lifetime]) -> None:
    best = brute_force(lifetimes) if lifetimes else 0
    for method in ("exact", "auto", "mip"):
        plan = plan_addresses(lifetimes, method=method, time_limit=20)
        assert (plan.height, plan.lower_bound, plan.status) == (best, best, "optimal")
    for method in ("greedy", "search", "bilevel"):
        assert plan_addresses(lifetimes, method=method, time_limit=0.02).height >= best


def test_the_bound_rises_where_no_plan_reaches_the_live_bytes() -> None:
    assert max_live(problem_of(NOT_AS_LOW_AS_LIVE)) == 5
    for method in ("exact", "auto", "mip"):
        plan = plan_addresses(NOT_AS_LOW_AS_LIVE, method=method, time_limit=20)
        assert (plan.height, plan.lower_bound, plan.status) == (6, 6, "optimal"), method


def test_both_passes_of_a_training_step_are_certified() -> None:
    for recompute in (False, True):
        lifetimes = training_step(32, recompute=recompute, seed=1)
        greedy = plan_addresses(lifetimes, method="greedy")
        assert len(lifetimes) > 3500
        assert not greedy.optimal  # what the search is for
        if search_library() is None:
            pytest.skip("no C++ compiler")
        plan = plan_addresses(lifetimes, time_limit=20)
        check_plan(lifetimes, plan.offsets)
        assert plan.optimal


def test_auto_is_never_worse_than_greedy_or_bilevel() -> None:
    for seed in range(3):
        lifetimes = cut_rectangle(150, span=300, height=10_000, seed=seed)
        heights = {method: plan_addresses(lifetimes, method=method, time_limit=0.5).height for method in ("auto", "greedy", "bilevel")}
        assert heights["auto"] <= min(heights.values())


def test_a_capacity_ends_the_search_when_met() -> None:
    lifetimes = cut_rectangle(400, seed=0)
    best_greedy = plan_addresses(lifetimes, method="greedy")
    met = plan_addresses(lifetimes, capacity=best_greedy.height, time_limit=4)
    assert met.height <= best_greedy.height
    assert met.seconds < 2  # a tenth of the limit, on a busy machine


@pytest.mark.parametrize("method", ["auto", "search", "exact"])
def test_plans_without_a_compiler(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object, **__: object) -> Path:
        raise address_native.NoCompiler("there is none")

    monkeypatch.setattr(address_native, "build", no_compiler)
    for library in (address_native.search_library, address_native.exact_library):
        library.cache_clear()
    try:
        lifetimes = cut_rectangle(14, seed=2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            plan = plan_addresses(lifetimes, method=method, time_limit=3)
        assert any("runs in Python, which is slower: there is none" in str(warning.message) for warning in caught)
        check_plan(lifetimes, plan.offsets)
        assert plan.height >= 1000 if method == "search" else plan.height == 1000
    finally:
        for library in (address_native.search_library, address_native.exact_library):
            library.cache_clear()


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="method 'magic' is none of auto"):
        plan_addresses([], method="magic")
    with pytest.raises(ValueError, match="time_limit"):
        plan_addresses([], time_limit=0)
    with pytest.raises(ValueError, match="alignment"):
        plan_addresses([], alignment=0)


# ---- bi-level and MIP


@given(small_steps(9), st.data())
def test_bilevel_is_valid_for_any_grouping(lifetimes: list[Lifetime], data: st.DataObject) -> None:
    problem = problem_of(lifetimes)
    groups = [data.draw(st.sampled_from([None, 0, 1, 2])) for _ in lifetimes]
    for grouping in [groups, *stretches(problem)]:
        offsets = bilevel(problem, grouping, lambda p: place(p, np.arange(len(p)), "first"), lambda p: place(p, np.arange(len(p)), "best"))
        assert find_overlap(problem, offsets) is None


def test_bilevel_plans_equal_layers_once_and_alike() -> None:
    layer = [(0, 3, 5), (1, 4, 7), (3, 6, 5), (5, 8, 2)]
    lifetimes = [Lifetime(f"{n}.{k}", 10 * n + a, 10 * n + b, size, n) for n in range(4) for k, (a, b, size) in enumerate(layer)]
    problem = problem_of(lifetimes)
    planned = []

    def inner(part):  # type: ignore[no-untyped-def]
        planned.append(part)
        return place(part, np.argsort(-part.size, kind="stable"), "first")

    offsets = bilevel(problem, [life.group for life in lifetimes], inner, lambda p: place(p, np.arange(len(p)), "first")).reshape(4, 4)
    assert len(planned) == 1
    assert (offsets == offsets[0]).all()


def test_stretches_finds_the_layers_from_lives_alone() -> None:
    layers = [Lifetime(f"{n}.{k}", 10 * n + k, 10 * n + k + 2, 1) for n in range(4) for k in range(5)]
    long = [Lifetime("state", 0, 50, 9), Lifetime("kept", 3, 40, 9)]
    expected = [n for n in range(4) for _ in range(5)] + [None, None]
    assert expected in list(stretches(problem_of(layers + long)))


def below(problem: Problem, offsets: Int64s) -> set[tuple[int, int]]:
    """All pairs (below, above) that are alive together."""
    n = range(len(problem))
    return {
        (i, j)
        for i in n
        for j in n
        if problem.lower[i] < problem.upper[j] and problem.lower[j] < problem.upper[i] and offsets[i] < offsets[j]
    }


@pytest.mark.parametrize("seed", range(4))
def test_mip_neighbourhood_keeps_the_other_orders(seed: int) -> None:
    problem = problem_of(cut_rectangle(40, seed=seed))
    start = place(problem, np.argsort(problem.lower, kind="stable"), "first")
    free = set(np.random.default_rng(seed).choice(40, 15, replace=False).tolist())
    fixed, open_ = pair_orders(problem, start, free)
    # Every order of today is open, or follows from the fixed pairs.
    follows = set(fixed)
    while more := {(a, d) for a, b in follows for c, d in fixed if b == c} - follows:
        follows |= more
    today = below(problem, start)
    assert fixed <= today
    assert today - follows <= open_ <= today
    assert all(a in free and b in free for a, b in open_)
    offsets, _ = solve(problem, start, free, max_live(problem), time.perf_counter() + 5)
    assert find_overlap(problem, offsets) is None
    assert height(problem, offsets) <= height(problem, start)


def test_mip_searches_neighbourhoods_of_a_large_instance() -> None:
    lifetimes = cut_rectangle(100, seed=0)
    greedy = plan_addresses(lifetimes, method="greedy")
    plan = plan_addresses(lifetimes, method="mip", time_limit=1.5)
    check_plan(lifetimes, plan.offsets)
    assert plan.height < greedy.height
    assert plan.method == "mip"


def test_cbc_stands_in_for_highs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highspy", None)  # as if it were not installed
    plan = plan_addresses(NOT_AS_LOW_AS_LIVE, method="mip", time_limit=20)
    assert (plan.height, plan.lower_bound, plan.status) == (6, 6, "optimal")


# ---- the command line


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_command_line_writes_offsets_and_keeps_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.csv", 'id,lower,upper,size,op\na,0,2,10,mm\nb,1,3,5,"add,relu"\nc,2,4,10,mm\n')
    out = tmp_path / "out.csv"
    assert main([str(source), "--out", str(out), "--capacity", "15"]) == 0
    found, bound, ratio, seconds, status = capsys.readouterr().out.split()
    assert (int(found), int(bound), float(ratio), status) == (15, 15, 1.0, "optimal")
    assert float(seconds) >= 0
    rows = list(csv.DictReader(out.open()))
    assert [row["op"] for row in rows] == ["mm", "add,relu", "mm"]
    lifetimes = [Lifetime(row["id"], int(row["lower"]), int(row["upper"]), int(row["size"])) for row in rows]
    check_plan(lifetimes, [int(row["offset"]) for row in rows])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out.csv"]
    assert main([str(source), "--out", str(out), "--capacity", "14"]) == 1
    # A plan can be planned again: its offsets are replaced.
    assert main([str(out), "--out", str(out)]) == 0
    assert out.read_text().splitlines()[0] == "id,lower,upper,size,op,offset"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,lower,size\n", "in.csv:1: column upper must be there once"),
        ("", "in.csv:1: column id must be there once"),
        ("id,lower,upper,size\na,0,2,x\n", "in.csv:2: size is 'x'; write a whole number"),
        ("id,lower,upper,size\na,0,2,1\nb,2,2,1\n", "in.csv:3: upper 2 is not after lower 2"),
        ("id,lower,upper,size\na,0,2,-1\n", "in.csv:2: size -1 is negative"),
        ("id,lower,upper,size\na,0,2\n", "in.csv:2: 3 fields where the header has 4"),
        (f"id,lower,upper,size\na,0,2,{2**62}\n", "in.csv:2: size 4611686018427387904 does not fit"),
        (f"id,lower,upper,size\na,0,2,{2**61}\nb,0,2,{2**61}\n", "in.csv: the sizes sum to"),
    ],
)
def test_command_line_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    source = write(tmp_path / "in.csv", text)
    assert main([str(source), "--out", str(tmp_path / "out.csv")]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out
    assert not (tmp_path / "out.csv").exists()


def test_command_line_refuses_missing_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.csv"), "--out", str(tmp_path / "out.csv")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    source = write(tmp_path / "in.csv", "id,lower,upper,size\n")
    assert main([str(source), "--out", str(tmp_path / "no" / "out.csv")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_command_line_as_a_module(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", "id,lower,upper,size,group\na,0,2,10,x\nb,1,3,5,x\n")
    command = [sys.executable, "-m", "memory_mgmt.address_planning", str(source), "--method", "bilevel", "--out", str(tmp_path / "out.csv")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("15 15 1.000000 ")


@pytest.mark.skipif(not INSTANCES.is_dir(), reason="the public instances are not beside the repository")
@pytest.mark.skipif(search_library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["A.1048576", "C.1048576", "G.1048576", "G_1", "trace_l1", "trace_l4"])
def test_public_instances_are_solved_to_optimality(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(INSTANCES / f"{name}.csv"), "--time-limit", "20", "--out", str(tmp_path / "out.csv")]) == 0
    assert capsys.readouterr().out.split()[4] == "optimal"
