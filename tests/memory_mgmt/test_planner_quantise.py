"""Eight bits in the choice: what the simulated step makes of them, when they are taken, and that they never make a step slower."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings

from memory_mgmt.cost_rates import cpu_rates
from memory_mgmt.planner import solve
from memory_mgmt.planner_greedy import solve_greedy
from memory_mgmt.planner_lp import Program
from memory_mgmt.planner_memo import solve_memo
from memory_mgmt.planner_problem import ClassCost, Problem, Tiling
from memory_mgmt.planner_rounding import rounded
from memory_mgmt.planner_simulate import evaluate
from memory_mgmt.policy import KEEP, QUANTISE, LayerPolicy, Policy, Split
from memory_mgmt.quantised_costs import dequantise_seconds, packed_bytes, quantise_seconds
from tests.memory_mgmt.planner_cases import GIB, gpt, problems, without_eight_bits
from tests.memory_mgmt.test_planner import three_layers

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def packing(problem: Problem, share: float = 0.25, seconds: float = 0.02) -> Problem:
    """Every feed-forward may be kept in ``share`` of its bytes, at ``seconds`` each way."""

    def allowed(cost: ClassCost) -> ClassCost:
        return replace(cost, quantised_bytes=int(share * cost.bytes), quantise_seconds=seconds, dequantise_seconds=seconds)

    return replace(problem, layers=tuple(replace(layer, feed_forward=allowed(layer.feed_forward)) for layer in problem.layers))


# --- the simulated step, by hand -----------------------------------------------------------------------------------------------


def test_simulated_step_in_eight_bits() -> None:
    """4 GiB of each layer's 8 become 1 GiB. The largest moment is the backward of the last layer: 5 + 5 below it, its own 8 wide again,
    and 1 beside the feed-forward."""
    policy = Policy((LayerPolicy(feed_forward=QUANTISE),) * 3)
    found = evaluate(packing(three_layers(), seconds=0.25), policy)
    assert found.seconds == pytest.approx(10 + 3 * 0.5)
    assert found.quantise_seconds == pytest.approx(1.5) and found.recompute_seconds == 0
    assert found.peak_bytes == (10 + 5 + 5 + 8 + 1) * GIB
    assert found.peak_moment == "backward of layer 2, feed-forward"
    half = evaluate(packing(three_layers()), Policy((LayerPolicy(feed_forward=Split(0.5, 0.0, 0.0, 0.5)),) * 3))
    assert half.peak_bytes == (10 + 6.5 + 6.5 + 8 + 1) * GIB


def test_in_tiles_the_wide_values_never_exist_together() -> None:
    problem = packing(three_layers())
    layer = problem.layers[0]
    tiled = replace(layer, feed_forward=replace(layer.feed_forward, tiled_bytes=0))
    problem = replace(problem, layers=(tiled,) * 3, ffn_tiles=(512,))
    found = evaluate(problem, Policy((LayerPolicy(feed_forward=QUANTISE),) * 3, ffn_tile_tokens=512))
    # 5 a layer, and 1 beside the feed-forward (or 2 beside the mixer, when the feed-forward's 1 is gone).
    assert found.peak_bytes == (10 + 5 + 5 + 5 + 1) * GIB


def test_eight_bits_must_be_allowed() -> None:
    policy = Policy((LayerPolicy(feed_forward=Split(0.5, 0.0, 0.0, 0.5)),) * 3)
    found = evaluate(three_layers(), policy)
    assert "layer 1: feed_forward may not be kept in eight bits" in found.violations
    layer = three_layers().layers[0]
    with pytest.raises(ValueError, match="only feed_forward can"):
        replace(three_layers(), layers=(replace(layer, mixer=replace(layer.mixer, quantised_bytes=1)),))


# --- the choice ----------------------------------------------------------------------------------------------------------------


@quick
@given(problem=problems())
def test_permission_never_makes_the_program_slower(problem: Problem) -> None:
    one = problem.with_tiles(Tiling(0, 0))
    without, allowed = Program(without_eight_bits(one)).solve(), Program(one).solve()
    assume(without is not None)
    assert without is not None and allowed is not None
    assert allowed.seconds <= without.seconds * (1 + 1e-6)
    policy = Policy(allowed.layers, 1, one.loss_tiles[allowed.loss_tile].tokens, one.ffn_tiles[0])
    found = evaluate(one, policy)
    assert found.violations == () and found.seconds == pytest.approx(allowed.seconds, rel=1e-5)


@quick
@given(problem=problems(max_layers=3))
def test_permission_never_makes_the_choice_slower(problem: Problem) -> None:
    """Nor does it change MEMO's rule."""
    without, allowed = solve(without_eight_bits(problem), with_worth=False), solve(problem, with_worth=False)
    assert solve_memo(problem) == solve_memo(without_eight_bits(problem))
    assume(without is not None)
    assert without is not None and allowed is not None
    assert allowed.seconds <= without.seconds * (1 + 4e-3)  # equal layers are preferred to so much
    if without.extra_seconds <= 0:
        assert all(layer.feed_forward.quantise == 0 for layer in allowed.policy.layers)  # never without need


def test_eight_bits_are_taken_where_they_are_cheapest() -> None:
    """A feed-forward that is dear to recompute and a slow link: with permission the step is faster, by eight bits alone."""
    exact = gpt(256 << 10, bandwidth=0.5e9, budget=45 * GIB)
    problem = packing(exact, seconds=0.001)
    without, allowed = solve(exact), solve(problem)
    assert without is not None and allowed is not None
    assert allowed.seconds < without.seconds
    assert sum(layer.feed_forward.quantise for layer in allowed.policy.layers) > 5
    assert allowed.evaluation.quantise_seconds > 0
    greedy = solve_greedy(problem.with_tiles(Tiling(0, 0)))
    assert greedy is not None and evaluate(problem, greedy).violations == ()
    assert evaluate(problem, greedy).seconds <= 1.05 * allowed.seconds
    dear = solve(packing(exact, seconds=10.0))
    assert dear is not None and all(layer.feed_forward.quantise == 0 for layer in dear.policy.layers)


def test_greedy_lets_go_of_eight_bits_where_they_are_not_enough() -> None:
    """Eight bits are cheapest, and still too much: the rest goes altogether."""
    exact = replace(gpt(256 << 10, n_layers=8), host_bytes=0)
    layer = exact.layers[0]
    unit = layer.input.bytes
    problem = packing(exact, seconds=0.001)
    tight = replace(problem, budget_bytes=exact.resident_bytes + 8 * 6 * unit + 26 * unit)
    found = solve_greedy(tight)
    assert found is not None and evaluate(tight, found).violations == ()
    splits = [one.feed_forward for one in found.layers]
    assert any(split.recompute > 0 for split in splits) and all(split.keep < 1e-9 for split in splits[:-1])


def test_rounded_shares_are_whole_steps_and_hold_no_more() -> None:
    problem = replace(packing(gpt(1 << 20)), tokens=1 << 17, share_tokens=2048)
    layers = (LayerPolicy(feed_forward=Split(0.1, 0.2, 0.3, 0.4)), LayerPolicy(feed_forward=Split(0.55, 0.0, 0.0, 0.45)))
    first, second = rounded(layers * 16, problem)[:2]
    for split, given_split in ((first.feed_forward, layers[0].feed_forward), (second.feed_forward, layers[1].feed_forward)):
        assert all(share * 64 == pytest.approx(round(share * 64), abs=1e-6) for share in (split.keep, split.swap, split.quantise))
        assert split.keep <= given_split.keep + 1e-9
    assert first.feed_forward.quantise <= 0.4 and first.feed_forward.recompute >= 0.3
    assert second.feed_forward.recompute == 0 and second.input == KEEP


# --- costs -------------------------------------------------------------------------------------------------------------------


def test_costs_of_eight_bits() -> None:
    assert packed_bytes(10, 300, 4) == 10 * (300 + 3 * 4) and packed_bytes(10, 256, 2) == 10 * (256 + 2 * 2)
    rates = cpu_rates(1)
    n = 1 << 20
    assert quantise_seconds(2 * n, 4, rates, cuda=False) == pytest.approx(2 * quantise_seconds(n, 4, rates, cuda=False))
    assert dequantise_seconds(n, 4, rates, cuda=False) == pytest.approx((5 + 8) * n / 6e9, rel=0.05)
    assert quantise_seconds(n, 2, rates, cuda=True) < quantise_seconds(n, 2, rates, cuda=False)
    assert quantise_seconds(0, 2, rates, cuda=True) == 0.0
