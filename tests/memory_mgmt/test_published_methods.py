"""The closed forms of other systems behind ``benchmarks/plan_published.py``: known sizes, and the goals they must meet."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from plan_published import CASES, GPT_7B, LLAMA_8B, PEAK_GOAL, QWEN3_8B, TIME_GOAL, Row, compare, markdown, own_answers, own_cases
from published_methods import estimate, fits
from published_own import Own, own_choice, own_overrides
from published_recipes import Recipe
from published_times import alpha

from models.config import ModelConfig
from models.errors import UserError
from models.flops import model_flops_per_token, parameter_count
from trainer.config_file import resolve

GIB = 2**30


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return compare()


def test_shapes_are_the_published_models() -> None:
    assert pytest.approx(8.03e9, rel=2e-3) == LLAMA_8B.parameters
    assert pytest.approx(8.19e9, rel=2e-3) == QWEN3_8B.parameters
    ours = ModelConfig(d_model=4096, n_heads=32, n_kv_heads=8, d_ff=14336, layers=("full",), n_layers=32)
    count = parameter_count(ours, 128256)
    assert LLAMA_8B.parameters == count.total - count.norms
    assert LLAMA_8B.model_flops(10**6) == pytest.approx(model_flops_per_token(ours, 128256, 10**6) * 10**6)


def test_alpha_is_bounded_by_the_host_at_a_million_tokens() -> None:
    """The closed form by hand: 2 TB over 8 ranks and 30 layers, in units of 1 GiB (1M x 4096 x 2 bytes / 8)."""
    memo = Recipe("memo", GPT_7B, "a800", 8, 2**20, 8, host_bytes=2e12)
    assert alpha(memo) == pytest.approx((2e12 / 8 / 30 / GIB - 2) / 14)
    assert alpha(replace(memo, host_bytes=1e15)) == 1.0  # then the link: all of it hides at this length
    assert 0.2 < alpha(replace(memo, host_bytes=1e15, tokens=128 * 1024)) < 1.0  # MEMO: complete overlap beyond 192K tokens
    assert alpha(replace(memo, host_bytes=1e15, tokens=224 * 1024)) == 1.0


def test_terms_by_hand() -> None:
    """TRL's Qwen3-8B at 1M: one hidden state of a rank is 131072 x 4096 x 2 bytes = 1 GiB, its keys are a quarter."""
    found = estimate(Recipe("trl", QWEN3_8B, "h100", 8, 2**20, 8, "cudnn", offload_checkpoints=True))
    terms = found.moments["backward of an attention"]
    assert terms["layer input"] == GIB and terms["q, k, v"] == (4 * 1.25 + 0.25) * GIB
    assert terms["keys and values of all ranks"] == 4 * GIB
    assert terms["float32 parameters, gradients, moments"] == 2 * QWEN3_8B.parameters
    assert found.host_bytes == 36 * 8 * GIB
    assert found.moment == "backward of a feed-forward"


@pytest.mark.parametrize("case", [case for case in CASES if case.fits], ids=lambda case: case.name)
def test_levers_never_raise_the_peak_and_length_never_lowers_it(case) -> None:
    recipe = case.recipe
    peak = estimate(recipe).used_bytes
    assert estimate(replace(recipe, tokens=2 * recipe.tokens)).used_bytes > peak
    if recipe.system == "alst":
        for lever in ("tiled_loss", "tiled_mlp", "offload_checkpoints", "offload_parameters"):
            assert estimate(replace(recipe, **{lever: False})).used_bytes >= estimate(replace(recipe, **{lever: True})).used_bytes - 1


def test_a_small_host_does_not_fit() -> None:
    recipe = next(case.recipe for case in CASES if case.recipe.offload_checkpoints)
    small = replace(recipe, host_bytes=1e10)
    assert fits(recipe, estimate(recipe)) and not fits(small, estimate(small))


def test_goals(rows: list[Row]) -> None:
    """All outcomes but one (1.2M on 8 H100 without the tiled feed-forward: 72 of 79 GiB by the closed form) and every figure."""
    assert [row.case for row in rows if not row.right] == ["8 x H100, 1.2M, loss"]
    peaks = [row.peak_error for row in rows if row.peak_error is not None]
    times = [row.time_error for row in rows if row.time_error is not None]
    assert len(peaks) >= 9 and max(map(abs, peaks)) < PEAK_GOAL
    assert len(times) >= 7 and max(map(abs, times)) < TIME_GOAL


def test_the_result_file_shows_errors_and_misses(rows: list[Row]) -> None:
    text = markdown(rows, {})
    assert "fits (wrong)" in text and "35 of 36 cases" in text and "-7.5%" in text


@pytest.mark.parametrize("case", [CASES[5], CASES[11], CASES[24], CASES[33]], ids=lambda case: case.name)
def test_own_settings_are_valid(case) -> None:
    config = resolve(None, list(own_overrides(case.recipe)))
    count = parameter_count(config.model, config.model.vocab_size or 0)
    assert count.total == pytest.approx(case.recipe.shape.parameters, rel=0.01)
    assert config.parallel.ranks == case.recipe.gpus and config.train.grad_accum == case.recipe.gpus // case.recipe.sp
    assert config.parallel.chosen_by_plan and config.parallel.scheme_is_auto and config.memory.offload_parameters == "auto"


def test_own_choices_stand_beside_what_was_published(rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UserError("data.seq_len: 7 is odd\nmake it even")

    fits_ = Own("case 1", True, 70.04, 12.5, 366.4, 0.402, "0-31 input keep", 69.5, 380.0, 390.2, 501.0, ("a=b",))
    earlier = replace(fits_, case="case 0", seconds=390.3, settings=())
    monkeypatch.setattr("published_own.plan_target", refuse)
    refused = own_choice("case 2", CASES[5].recipe, None, 12.0)
    assert refused.fits is None and refused.words == "data.seq_len: 7 is odd" and refused.settings == own_overrides(CASES[5].recipe)
    text = markdown(rows, [earlier, fits_, refused])
    assert "| case 1 | fits | 70.0 | 69.5 | 12.5 | 366 | 390 | 380 | 40.2% | 501 | 0-31 input keep |" in text
    assert "| case 0 | fits (planned with earlier settings) | 70.0 |" in text
    assert "| case 2 | refused |  |  |  |  |" in text and "| 12 |  |  | data.seq_len: 7 is odd |" in text
    assert "2 of 3 fit" in text and "Slower than the published method: case 0." in text
    assert markdown(rows) in text  # the comparison itself does not change


def test_what_was_answered_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that did not fit come first; an answer to other settings is made anew."""
    cases, asked = own_cases(), []

    def choose(name: str, recipe: Recipe, *_: object) -> Own:
        asked.append(name)
        return Own(name, True, 1.0, 0.0, 1.0, 0.5, "", settings=own_overrides(recipe))

    monkeypatch.setattr("plan_published.own_choice", choose)
    known = [choose(case.name, case.recipe) for case in cases]
    known[0], known[1] = replace(known[0], settings=()), replace(known[1], settings=(), fits=False)
    asked.clear()
    answers = list(own_answers([one for i, one in enumerate(known) if i != 2]))
    assert asked == [cases[1].name, cases[2].name, cases[0].name]
    assert [one.case for one in answers[-1]] == [case.name for case in cases]
    assert not list(own_answers(answers[-1]))
