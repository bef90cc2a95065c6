"""The choice: valid, never slower than the greedy's or MEMO's, made of whole tiles, with its reasons."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings

from memory_mgmt import planner_search
from memory_mgmt.planner import _FOR_SIMPLICITY, cases, solve
from memory_mgmt.planner_lp import Program
from memory_mgmt.planner_memo import memo_alpha, solve_memo
from memory_mgmt.planner_problem import ClassCost, LossTile, Problem, Stage
from memory_mgmt.planner_search import smallest_budget
from memory_mgmt.planner_simulate import evaluate
from memory_mgmt.policy import CLASSES, KEEP, RECOMPUTE, SWAP, LayerPolicy, Policy, Split
from tests.memory_mgmt.planner_cases import GIB, gpt, problems

quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# --- the simulated step, by hand ------------------------------------------------------------------------------------------------


def three_layers(**changes) -> Problem:
    """Layers of 1 + 2 + 1 + 4 GiB; 1 s forward, 2 s backward; 1 GiB/s; a loss of 1 s and 1 GiB; 10 GiB resident."""
    layer = replace(
        gpt(1 << 16).layers[0],
        input=ClassCost(GIB, may_recompute=False),
        projections=ClassCost(2 * GIB, 0.2),
        mixer=ClassCost(GIB, 0.7),
        feed_forward=ClassCost(4 * GIB, 0.1),
        forward_seconds=1.0,
        backward_seconds=2.0,
        mixer_stages=(Stage(0, 2 * GIB),),
        ffn_stages=(Stage(0, GIB),),
    )
    fields = {"resident_bytes": 10 * GIB, "host_bytes": 100 * GIB, "bandwidth_out": GIB, "bandwidth_in": GIB, "unswapped_last": 0}
    return Problem((layer,) * 3, (LossTile(4096, GIB, 1.0),), **{**fields, **changes})


def test_simulated_step_that_keeps_everything() -> None:
    found = evaluate(three_layers(), Policy((LayerPolicy(),) * 3))
    assert found.seconds == 3 * 1 + 1 + 3 * 2
    assert found.peak_bytes == (10 + 24 + 1) * GIB
    assert found.peak_moment == "loss"  # and the last backward, which comes later
    assert (found.host_bytes, found.recompute_seconds, found.waiting_seconds, found.violations) == (0, 0, 0, ())


def test_simulated_step_that_recomputes_blocks() -> None:
    found = evaluate(three_layers(), Policy((LayerPolicy(KEEP, RECOMPUTE, RECOMPUTE, RECOMPUTE),) * 3))
    assert found.seconds == pytest.approx(10 + 3 * 1.0)
    # backward of the last layer: two inputs, the whole last layer, 1 GiB beside its feed-forward
    assert found.peak_bytes == (10 + 2 + 8 + 1) * GIB
    assert found.peak_moment == "backward of layer 2, feed-forward"


def test_simulated_step_that_waits_for_copies() -> None:
    """Layer 0 swaps 6 GiB, which takes 6 s either way. Out: from 1 to 7; forward of layer 1 ends at 2, of layer 2 may start at 7 and
    ends at 8; loss at 9; backward of layer 2 ends at 11, when the copy back is due (started one layer ahead, when backward of layer 2
    had ended): 17; backward of layer 1 from 11 to 13; of layer 0 from 17 to 19."""
    swapped = LayerPolicy(KEEP, SWAP, KEEP, SWAP)
    found = evaluate(three_layers(), Policy((swapped, LayerPolicy(), LayerPolicy())))
    assert found.seconds == pytest.approx(19)
    assert found.waiting_seconds == pytest.approx(5 + 4)
    assert found.host_bytes == 6 * GIB
    # forward of layer 1: layer 0 whole (2 kept, 6 on their way), layer 1; loss: 2 + 8 + 8 + 1
    assert found.peak_bytes == (10 + 2 + 8 + 8 + 1) * GIB


def test_simulated_step_on_a_device_whose_copies_hide_nowhere() -> None:
    """Forward 1 + 6 (copies) + 1 + 1, loss 1, backward 2 + 2 + 6 (copies) + 2; the swapped bytes are gone at once."""
    swapped = LayerPolicy(KEEP, SWAP, KEEP, SWAP)
    found = evaluate(three_layers(overlap=False), Policy((swapped, LayerPolicy(), LayerPolicy())))
    assert found.seconds == pytest.approx(22)
    assert found.waiting_seconds == pytest.approx(12)
    assert found.peak_bytes == (10 + 2 + 8 + 8 + 1) * GIB
    halved = evaluate(three_layers(overlap=False, swap_ratio=0.5), Policy((swapped, LayerPolicy(), LayerPolicy())))
    assert (halved.host_bytes, halved.seconds) == (3 * GIB, pytest.approx(16))


def test_simulated_groups() -> None:
    """Two groups of two. With the inside of both blocks alive: forward once more (1 s a block, 0.5 s from one to the next). One block
    at a time: the first block of a group is computed a third time."""
    layer = replace(three_layers().layers[0], input=ClassCost(GIB, 0.5))
    inner = LayerPolicy(RECOMPUTE, RECOMPUTE, RECOMPUTE, RECOMPUTE)
    first = LayerPolicy(KEEP, RECOMPUTE, RECOMPUTE, RECOMPUTE)
    policy = Policy((first, inner) * 2, group_blocks=2)
    problem = three_layers(group_blocks=(2,), group_inside="all")
    found = evaluate(replace(problem, layers=(layer,) * 4), policy)
    assert found.seconds == pytest.approx(4 + 1 + 8 + 2 * 2.5)
    assert found.peak_bytes == (10 + 1 + 1 + 7 + 1 + 7 + 1) * GIB
    found = evaluate(replace(problem, layers=(layer,) * 4, group_inside="one"), policy)
    assert found.seconds == pytest.approx(4 + 1 + 8 + 2 * 3.5)
    assert found.peak_bytes == (10 + 1 + 1 + 1 + 7 + 1) * GIB


def test_simulated_step_says_what_is_not_allowed() -> None:
    problem = three_layers(budget_bytes=30 * GIB, host_bytes=GIB, unswapped_last=1)
    found = evaluate(problem, Policy((LayerPolicy(RECOMPUTE), LayerPolicy(KEEP, SWAP), LayerPolicy(SWAP))))
    text = "\n".join(found.violations)
    assert "layer 0: the input cannot be recomputed" in text and "layer 2: input may not be swapped" in text
    assert "device memory" in text and "host memory: 3221225472 bytes, allowed 1073741824" in text


# --- the choice -----------------------------------------------------------------------------------------------------------------


@quick
@given(problem=problems(groups=True))
def test_choice_is_valid_and_never_slower(problem: Problem) -> None:
    choice = solve(problem)
    memo = evaluate(problem, solve_memo(problem)) if 1 in problem.group_blocks else None
    if choice is None:
        assert memo is None or memo.violations
        return
    found = evaluate(problem, choice.policy)
    assert found.violations == () and found.seconds == choice.seconds
    for other in (choice.greedy_seconds, choice.lp_seconds, choice.memo_seconds):
        assert other is None or choice.seconds <= other
    if memo is not None and not memo.violations:
        assert choice.seconds <= memo.seconds * (1 + 1e-9)


@pytest.mark.parametrize("seq_k", [64, 128, 256, 512, 1024])
@pytest.mark.parametrize("host", [1e12, 2e12])
def test_faster_than_memo_on_its_own_model(seq_k: int, host: float) -> None:
    problem = replace(gpt(seq_k << 10, host=host), tokens=(seq_k << 10) // 8, share_tokens=1024)
    choice = solve(problem)
    memo = evaluate(problem, solve_memo(problem))
    assert choice is not None and choice.lp_seconds is not None
    # The program itself, and at most what equal layers may cost it behind the greedy.
    assert choice.method == "lp" or choice.lp_seconds <= choice.seconds * (1 + _FOR_SIMPLICITY)
    assert memo.violations or choice.lp_seconds <= memo.seconds
    if not memo.violations:
        assert choice.seconds <= memo.seconds


def test_memo_alpha_is_the_closed_form() -> None:
    """The figures of research on GPT-7B with one PCIe 5 link each: bandwidth decides at 64K, host memory at 1M."""
    assert memo_alpha(gpt(64 << 10)) == pytest.approx(0.81, abs=0.01)
    assert memo_alpha(gpt(256 << 10)) == 1.0
    assert memo_alpha(gpt(1 << 20)) == pytest.approx(0.41, abs=0.01)
    assert memo_alpha(gpt(1 << 20, host=1e12)) == pytest.approx(0.13, abs=0.01)


def test_keeps_everything_when_it_fits() -> None:
    choice = solve(gpt(64 << 10))
    assert choice is not None
    assert choice.extra_seconds == pytest.approx(0, abs=1e-9)
    assert all(layer == LayerPolicy() for layer in choice.policy.layers)
    assert choice.binding.startswith("nothing") and choice.worth == ()


def test_attention_output_stays_and_cheap_classes_are_recomputed() -> None:
    """At 1M tokens the attention costs seconds per GiB, projections and feed-forward milliseconds."""
    choice = solve(replace(gpt(1 << 20), host_bytes=150 * GIB))
    assert choice is not None
    assert all(layer.mixer.recompute == 0 for layer in choice.policy.layers)
    assert sum(layer.projections.recompute + layer.feed_forward.recompute for layer in choice.policy.layers) > 10


def test_recompute_is_preferred_to_a_slow_link() -> None:
    choice = solve(gpt(256 << 10, bandwidth=0.5e9, budget=45 * GIB))
    assert choice is not None
    swapped = sum(layer.of(name).swap for layer in choice.policy.layers for name in ("projections", "feed_forward"))
    recomputed = sum(layer.of(name).recompute for layer in choice.policy.layers for name in ("projections", "feed_forward"))
    assert recomputed > 5 * swapped


def test_equal_layers_get_equal_shares_where_it_costs_nothing() -> None:
    choice = solve(gpt(1 << 20))
    assert choice is not None
    assert len(set(choice.policy.layers[:-2])) == 1


def test_shares_are_whole_tiles() -> None:
    problem = replace(gpt(1 << 20), tokens=1 << 17, share_tokens=2048)
    choice = solve(problem)
    assert choice is not None
    for layer in choice.policy.layers:
        for name in CLASSES:
            split = layer.of(name)
            for share in (split.keep, split.swap, split.recompute):
                assert share * 64 == pytest.approx(round(share * 64), abs=1e-6)
    free = solve(gpt(1 << 20))
    assert free is not None and free.seconds <= choice.seconds * (1 + 1e-9)
    assert choice.seconds <= free.seconds * 1.002


def test_binding_constraint_and_worth() -> None:
    choice = solve(gpt(1 << 20))
    assert choice is not None
    assert "device memory at backward of layer 31" in choice.binding and "host memory" in choice.binding
    assert "copy bandwidth" not in choice.binding
    assert any(line.startswith("1 GiB more device memory:") for line in choice.worth)
    assert any(line.startswith("1 GiB more host memory") for line in choice.worth)
    slow = solve(gpt(128 << 10, bandwidth=3e9, budget=40 * GIB))
    assert slow is not None and "copy bandwidth" in slow.binding and any("copy bandwidth" in line for line in slow.worth)


def test_worth_counts_whole_layers() -> None:
    """Attention is recomputed whole: the duals, with integers fixed, do not see that one GiB more spares a layer of it."""
    layer = gpt(1 << 20, n_layers=16).layers[0]
    layer = replace(layer, mixer=replace(layer.mixer, whole_recompute=True), input=replace(layer.input, may_swap=False))
    problem = replace(gpt(1 << 20, n_layers=16), layers=(layer,) * 16, host_bytes=0, budget_bytes=54 * GIB)
    choice, more = solve(problem), solve(replace(problem, budget_bytes=55 * GIB))
    assert choice is not None and more is not None
    assert 0 < sum(splits.mixer.recompute for splits in choice.policy.layers) < 16
    (line,) = choice.worth
    assert float(line.split(": ")[1].split(" s")[0]) == pytest.approx(choice.seconds - more.seconds, rel=0.02)
    assert choice.seconds - more.seconds > 0.9 * layer.mixer.recompute_seconds


def test_tiles_are_chosen_where_they_pay() -> None:
    problem = gpt(1 << 20)
    layer = problem.layers[0]
    unit = layer.input.bytes
    feed_forward = replace(layer.feed_forward, tiled_bytes=2 * unit)
    tiled = replace(layer, feed_forward=feed_forward, ffn_stages=(Stage(2 * unit, 8 * unit), Stage(2 * unit, 2 * unit, 0.05)))
    tight = replace(problem, layers=(tiled,) * 32, ffn_tiles=(0, 4096), budget_bytes=38 * GIB)
    choice = solve(tight)
    assert choice is not None and choice.policy.ffn_tile_tokens == 4096
    assert (whole := solve(replace(problem, budget_bytes=38 * GIB))) is None or whole.seconds > choice.seconds
    assert solve(replace(problem, budget_bytes=30 * GIB)) is None and solve(replace(tight, budget_bytes=30 * GIB)) is not None
    roomy = solve(replace(tight, budget_bytes=78 * GIB))
    assert roomy is not None and roomy.policy.ffn_tile_tokens == 0


def test_memory_layers_are_cut_at_their_tiles() -> None:
    layer = replace(
        gpt(256 << 10).layers[0],
        kind="memory",
        projections=ClassCost(),
        mixer=ClassCost(8 * GIB, 0.05, tiled_bytes=GIB // 4),
        mixer_stages=(Stage(GIB, 8 * GIB), Stage(GIB, GIB, 0.06)),
    )
    problem = replace(gpt(256 << 10), layers=(layer,) * 8, memory_tiles=(0, 8192), host_bytes=0, budget_bytes=27 * GIB, tokens=1 << 15)
    choice = solve(problem)
    assert choice is not None and choice.policy.memory_tile_tokens == 8192
    shares = [splits.mixer.recompute for splits in choice.policy.layers]
    assert sum(shares) > 4 and all(share * 4 == round(share * 4) for share in shares)


def test_groups_are_chosen_when_only_they_fit() -> None:
    """Small insides beside large inputs: only checkpoints of every other block fit."""
    layer = replace(three_layers().layers[0], input=ClassCost(4 * GIB, 0.01, may_swap=False), feed_forward=ClassCost(GIB, 0.1))
    problem = replace(three_layers(), layers=(layer,) * 8, group_blocks=(1, 2, 4), group_inside="one", budget_bytes=40 * GIB)
    choice = solve(problem)
    assert choice is not None and choice.policy.group_blocks > 1
    assert solve(replace(problem, group_blocks=(1,))) is None
    assert choice.policy.layers[1].input == RECOMPUTE and choice.policy.layers[0].input.recompute == 0


def test_smaller_loss_tile_only_where_the_loss_is_the_peak() -> None:
    problem = replace(gpt(128 << 10), host_bytes=0)
    big = problem.loss_tiles[0]
    tiles = (replace(big, working_bytes=60 * GIB), replace(big, tokens=256, working_bytes=GIB, seconds=big.seconds * 1.5))
    assert (choice := solve(replace(problem, loss_tiles=tiles))) is not None and choice.policy.loss_tile_tokens == 256
    roomy = solve(replace(problem, loss_tiles=tiles, budget_bytes=200 * GIB))
    assert roomy is not None and roomy.policy.loss_tile_tokens == 4096


# --- when nothing fits -----------------------------------------------------------------------------------------------------------


def test_smallest_budget() -> None:
    problem = replace(gpt(1 << 20), budget_bytes=20 * GIB, tokens=1 << 17, share_tokens=1024)
    assert solve(problem) is None
    least = smallest_budget(problem)
    assert least.choice.peak_bytes <= least.budget_bytes
    assert solve(replace(problem, budget_bytes=least.budget_bytes)) is not None
    assert Program(replace(problem, budget_bytes=int(least.budget_bytes * 0.995))).solve() is None


@quick
@given(problems(groups=True))
def test_smallest_budget_where_the_solver_gets_no_time(problem: Problem) -> None:
    """A busy machine: the leanest solution of the program is the answer, in whole tiles or as it is."""
    problem = replace(problem, tokens=64, share_tokens=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner_search, "solve", lambda *args: None)
        try:
            least = smallest_budget(problem)
        except ValueError as error:
            assert "no device memory is enough" in str(error)
            return
    assert evaluate(replace(problem, budget_bytes=least.budget_bytes), least.choice.policy).violations == ()
    programs = [Program(case.units(), minimise="budget").solve() for case in cases(problem)]
    assert min(found.budget_bytes for found in programs if found is not None) <= least.budget_bytes * (1 + 1e-6)


def test_smallest_budget_counts_the_update() -> None:
    least = smallest_budget(replace(gpt(64 << 10), other_peak_bytes=70 * GIB, budget_bytes=GIB))
    assert least.budget_bytes == pytest.approx(70 * GIB, rel=1e-5)


def test_eighty_layers_within_the_limit() -> None:
    """Llama-70B's depth with tiles, loss tiles and groups to choose from. The goal is 10 s; the bound here allows a busy machine."""
    problem = gpt(1 << 20, n_layers=80, d=8192, ranks=64)
    layer = problem.layers[0]
    unit = layer.input.bytes
    stages = (Stage(2 * unit, 8 * unit), *(Stage(2 * unit, unit, t * 1e-3) for t in (1, 2)))
    layer = replace(layer, feed_forward=replace(layer.feed_forward, tiled_bytes=2 * unit), ffn_stages=stages)
    problem = replace(problem, layers=(layer,) * 80, ffn_tiles=(0, 8192, 2048), group_blocks=(1, 2, 4), budget_bytes=45 * GIB)
    choice = solve(problem)
    assert choice is not None and choice.complete and choice.solve_time < 10
    assert not math.isnan(choice.seconds) and evaluate(problem, choice.policy).violations == ()


def test_policy_of_another_problem_is_refused() -> None:
    with pytest.raises(ValueError, match="3 layers, the problem 32"):
        evaluate(gpt(1 << 16), Policy((LayerPolicy(),) * 3))
    with pytest.raises(ValueError, match="not among the problem's candidates"):
        evaluate(three_layers(), Policy((LayerPolicy(mixer=Split()),) * 3, ffn_tile_tokens=7))
