"""The linear program against the simulated step, and against every policy of a coarse grid."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pulp
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from memory_mgmt.planner import cases
from memory_mgmt.planner_groups import grouped, spread
from memory_mgmt.planner_lp import Program, Solution
from memory_mgmt.planner_problem import ClassCost, LayerCost, LossTile, Problem, Stage, Tiling
from memory_mgmt.planner_simulate import evaluate
from memory_mgmt.policy import CLASSES, KEEP, QUANTISE, RECOMPUTE, SWAP, LayerPolicy, Policy, Split
from tests.memory_mgmt.planner_cases import GIB, gpt, problems

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def policy_of(problem: Problem, solution: Solution) -> Policy:
    return Policy(solution.layers, 1, problem.loss_tiles[solution.loss_tile].tokens, problem.ffn_tiles[0], problem.memory_tiles[0])


@quick
@given(problem=problems(), data=st.data())
def test_objective_is_what_the_simulated_step_takes(problem: Problem, data: st.DataObject) -> None:
    one = problem.with_tiles(data.draw(st.sampled_from(list(problem.tilings()))))
    solution = Program(one, uniform=data.draw(st.booleans())).solve()
    assume(solution is not None)
    assert solution is not None
    found = evaluate(one, policy_of(one, solution))
    assert found.violations == ()
    assert found.seconds == pytest.approx(solution.seconds, rel=1e-5)


@quick
@given(problem=problems(max_layers=3, tiles=False), data=st.data())
def test_no_valid_policy_is_faster_than_the_program(problem: Problem, data: st.DataObject) -> None:
    """Random valid policies: also proves that a problem the program calls infeasible has none of them."""
    shares = st.sampled_from([KEEP, SWAP, RECOMPUTE, Split(0.5, 0.5, 0.0), Split(0.0, 0.5, 0.5), Split(0.5, 0.0, 0.5)])
    solution = Program(problem).solve()
    for _ in range(20):
        packed = st.one_of(shares, st.sampled_from([QUANTISE, Split(0.5, 0.0, 0.0, 0.5), Split(0.0, 0.25, 0.25, 0.5)]))
        layers = tuple(data.draw(st.builds(LayerPolicy, shares, shares, shares, packed)) for _ in problem.layers)
        tile = data.draw(st.sampled_from(problem.loss_tiles))
        found = evaluate(problem, Policy(layers, loss_tile_tokens=tile.tokens))
        if not found.violations:
            assert solution is not None
            assert solution.seconds <= found.seconds * (1 + 1e-6)


@pytest.mark.parametrize("budget", [8.0, 9.5, 12.0])
def test_against_every_policy_of_a_grid(budget: float) -> None:
    """Two kinds of layer, all shares in halves: the program, free to choose shares between, is never slower and never more than
    one half step of the dearest class faster."""
    layer = LayerCost(
        "full", ClassCost(GIB, may_recompute=False), ClassCost(2 * GIB, 0.3), ClassCost(GIB, 1.5), ClassCost(0), 1.0, 2.0,
        ffn_stages=(Stage(0, GIB),),
    )  # fmt: skip
    problem = Problem(
        (layer,) * 3, (LossTile(4096, GIB, 0.5),), GIB, budget_bytes=int(budget * GIB), host_bytes=2 * GIB,
        bandwidth_out=GIB, bandwidth_in=GIB, unswapped_last=1,
    )  # fmt: skip
    halves = [Split(k / 2, s / 2, (2 - k - s) / 2) for k in range(3) for s in range(3 - k)]
    no_recompute = [split for split in halves if split.recompute == 0]
    one = [LayerPolicy(*choice) for choice in itertools.product(no_recompute, halves, [KEEP, SWAP, RECOMPUTE])]
    last = [LayerPolicy(KEEP, p, m) for p in (KEEP, RECOMPUTE) for m in (KEEP, RECOMPUTE)]
    best = min(
        (found.seconds for layers in itertools.product(one, one, last) if not (found := evaluate(problem, Policy(layers))).violations),
        default=None,
    )
    solution = Program(problem).solve()
    if best is None:
        assert solution is None or evaluate(problem, policy_of(problem, solution)).violations == ()
        return
    assert solution is not None
    assert solution.seconds <= best + 1e-6
    assert solution.seconds >= best - 0.75 * 3


def test_prices_are_what_one_more_gib_saves() -> None:
    problem = gpt(1 << 20)
    solution = Program(problem).solve()
    assert solution is not None
    for worth, changed in (
        (solution.device_worth, replace(problem, budget_bytes=problem.budget_bytes + GIB // 64)),
        (solution.host_worth, replace(problem, host_bytes=problem.host_bytes + GIB // 64)),
    ):
        again = Program(changed).solve()
        assert again is not None and worth > 0
        assert solution.seconds - again.seconds == pytest.approx(worth * GIB / 64, rel=0.02)


def test_price_of_the_link() -> None:
    """A link so slow that copies are waited for: the price at the margin is the derivative."""
    problem = gpt(1 << 18, budget=50 * GIB, bandwidth=4e9)
    solution = Program(problem).solve()
    faster = Program(replace(problem, bandwidth_out=4.001e9, bandwidth_in=4.001e9)).solve()
    assert solution is not None and faster is not None and solution.link_worth > 0
    assert solution.seconds - faster.seconds == pytest.approx(solution.link_worth * 1e6, rel=0.05)


def test_whole_recomputation_is_whole() -> None:
    layer = gpt(1 << 18).layers[0]
    layer = replace(layer, mixer=replace(layer.mixer, whole_recompute=True, recompute_seconds=1e-3), projections=ClassCost())
    problem = replace(gpt(1 << 18, n_layers=8), layers=(layer,) * 8, budget_bytes=29 * GIB, host_bytes=0)
    solution = Program(problem).solve()
    assert solution is not None
    recomputed = [splits.mixer.recompute for splits in solution.layers]
    assert set(recomputed) == {0.0, 1.0}
    assert evaluate(problem, policy_of(problem, solution)).violations == ()


@quick
@given(problem=problems(groups=True))
def test_groups_as_layers_are_what_the_simulated_groups_take(problem: Problem) -> None:
    """The merged layers of a group against the walk that goes through its blocks one by one."""
    one = problem.with_tiles(Tiling(0, 0))
    for k in {case.k for case in cases(problem)}:
        solution = Program(grouped(one, k)).solve()
        if solution is None or k == 1:
            continue
        layers = spread(solution.layers, len(problem.layers), k)
        found = evaluate(problem, replace(policy_of(one, solution), layers=layers, group_blocks=k))
        assert found.violations == ()
        assert found.seconds == pytest.approx(solution.seconds, rel=1e-5)


def test_smallest_budget_is_the_least_that_is_feasible() -> None:
    problem = replace(gpt(1 << 20, n_layers=6), budget_bytes=GIB)
    assert Program(problem).solve() is None
    least = Program(problem, minimise="budget").solve()
    assert least is not None
    assert Program(replace(problem, budget_bytes=int(least.budget_bytes * 0.999))).solve() is None
    assert Program(replace(problem, budget_bytes=int(least.budget_bytes * 1.001))).solve() is not None


def test_every_class_has_a_variable_only_where_it_may() -> None:
    problem = gpt(1 << 18)
    solution = Program(replace(problem, host_bytes=0)).solve()
    assert solution is None or all(splits.of(name).swap == 0 for splits in solution.layers for name in CLASSES)


@pytest.mark.filterwarnings("ignore:PULP_CBC_CMD is deprecated")
def test_without_highs_cbc_solves_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = gpt(1 << 20, n_layers=6, budget=40 * GIB)
    first = Program(problem).solve()
    monkeypatch.setattr(pulp.HiGHS, "available", lambda self: False)
    second = Program(problem).solve()
    assert first is not None and second is not None
    assert (first.solver, second.solver) == ("HiGHS", "CBC")
    assert second.seconds == pytest.approx(first.seconds, rel=1e-6)
    assert second.device_worth == pytest.approx(first.device_worth, rel=1e-3)


def test_many_whole_layers_are_settled_within_the_gap() -> None:
    """80 layers, two classes whole or not at all, host memory and device memory both scarce: against the relaxation's bound."""
    problem = gpt(64 << 10, n_layers=80, d=8192, ranks=64, host=1e12)
    layer = problem.layers[0]
    unit = layer.input.bytes
    whole = replace(
        layer,
        mixer=replace(layer.mixer, whole_recompute=True, recompute_seconds=layer.projections.recompute_seconds / 3),
        feed_forward=replace(layer.feed_forward, whole_recompute=True),
    )
    budget = problem.resident_bytes + 340 * unit
    free = Program(replace(problem, layers=(replace(whole, mixer=replace(whole.mixer, whole_recompute=False),
        feed_forward=layer.feed_forward),) * 80, budget_bytes=budget)).solve()  # fmt: skip
    tight = replace(problem, layers=(whole,) * 80, budget_bytes=budget)
    settled = Program(tight).solve()
    assert free is not None and settled is not None
    assert all(splits.mixer.recompute in (0, 1) and splits.feed_forward.recompute in (0, 1) for splits in settled.layers)
    assert free.seconds * (1 - 1e-9) <= settled.seconds <= free.seconds * 1.002
    assert evaluate(tight, policy_of(tight, settled)).violations == ()
