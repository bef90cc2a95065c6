"""The native engine and DeepSpeed's ZeRO train alike, on two ranks, and go on from one another's checkpoints."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.trainer.deepspeed_cases import BESIDE, STAGES, all_cases
from tests.trainer.engine_questions import QUESTIONS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DEEPSPEED IS NOT INSTALLED: nothing of engine deepspeed is tested (scripts/install.sh DIR dev installs it)",
)
NAMES = [
    *(f"20 steps, {name}" for name in STAGES),
    *(f"{name}, zero_{3 - number % 2}" for number, name in enumerate(BESIDE)),
    *(f"refused steps, {name}" for name in STAGES),
    *(f"given weights, {name}" for name in STAGES),
    "handed from engine to engine",
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_distributed(all_cases, 2, str(tmp_path_factory.mktemp("engines")), timeout=280)[0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_both_engines_train_alike(found: dict[str, Any], name: str) -> None:
    native, deepspeed = found[name]
    assert len(native) == len(deepspeed) >= 5
    # Under autocast a weight that differs in its last bit may round to the next of bfloat16's 8 bits.
    near = 2e-4 if name.startswith("autocast") else 1e-5
    for expected, other in zip(native, deepspeed, strict=True):
        assert other == pytest.approx(expected, rel=0, abs=near)
    losses = [loss for loss, _ in native[:-1]]
    assert len(set(losses)) > len(losses) // 2  # it is a run in which something happens


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("question", QUESTIONS)
def test_what_holds_of_one_engine_holds_of_the_other(found: dict[str, Any], question: str, stage: str) -> None:
    """What test_engine.py asks of the native engine, where ZeRO has an answer: labels on some ranks only, losses by position, gradients
    that are not finite, the state that is saved."""
    native, other = found[f"{question}, {stage}"]
    assert other == pytest.approx(native, rel=1e-5, abs=1e-6, nan_ok=True)


def test_every_question_was_asked(found: dict[str, Any]) -> None:
    assert sorted(found) == sorted([*NAMES, *(f"{question}, {stage}" for question in QUESTIONS for stage in STAGES)])
