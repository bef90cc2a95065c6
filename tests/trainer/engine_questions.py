"""Questions that every engine answers alike, asked on two ranks: what test_engine.py asks of one engine, as numbers to compare."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from models.batch import IGNORE_INDEX, Batch, Bounds
from trainer import engine as engines
from trainer.engine import Engine

Make = Callable[[dict[str, Any] | None], Engine]
"""An engine with these settings beside those of deepspeed_cases.config."""
SEQ_LEN, VOCAB = 32, 64
TOGETHER: dict[str, Any] = {"parallel": {"cp": 2}}
QUESTIONS = ("labels on one rank or none", "unequal micro-batches", "losses by position", "not finite", "state after an evaluation")


def batch(first_valid: int, last_valid: int, seed: int = 0) -> Batch:
    """A sequence in which only positions [first_valid, last_valid) have labels."""
    tokens_BT = torch.randint(VOCAB, (1, SEQ_LEN), generator=torch.Generator().manual_seed(seed))
    labels_BT = tokens_BT.roll(-1, 1).clone()
    labels_BT[:, :first_valid] = IGNORE_INDEX
    labels_BT[:, last_valid:] = IGNORE_INDEX
    return Batch(tokens_BT, labels_BT, torch.arange(SEQ_LEN)[None], Bounds.whole(1, SEQ_LEN))


def answers(make: Make) -> dict[str, list[float]]:
    """By question."""
    asked = (_some_labels, _micro_batches, _by_position, _not_finite, _state)
    return {question: ask(make) for question, ask in zip(QUESTIONS, asked, strict=True)}


def _some_labels(make: Make) -> list[float]:
    """The sequence is shared: labels in the first half only, in the second, in none. Without any the loss is nan and gradients are 0."""
    found: list[float] = []
    engine = make(TOGETHER)
    for first, last in ((0, 10), (20, 31), (0, 0)):
        sums = engine.forward_backward([batch(first, last)])
        found += [sums.nll, sums.valid_tokens, engine.step(1e-2)]
    return [*found, engine.evaluate([batch(0, 31)]).loss]


def _micro_batches(make: Make) -> list[float]:
    """The mean is over tokens, not over micro-batches or ranks."""
    engine = make(None)
    rank = dist.get_rank()
    sums = engine.forward_backward([batch(0, 31, seed=1 + rank), batch(0, 5 - 3 * rank, seed=3 + rank)])
    return [sums.nll, sums.loss, sums.valid_tokens, engine.step(1e-2), engine.evaluate([batch(0, 31)]).loss]


def _by_position(make: Make) -> list[float]:
    before, engines.POSITION_BUCKET_TOKENS = engines.POSITION_BUCKET_TOKENS, 8
    try:
        sums = make(TOGETHER).evaluate([batch(4, 24, seed=3)])
    finally:
        engines.POSITION_BUCKET_TOKENS = before
    assert sums.bucket_tokens == (4, 8, 8, 0)
    return [*sums.bucket_nll, *sums.bucket_tokens]


def _not_finite(make: Make) -> list[float]:
    """One rank's loss is not a number: no rank updates, and the next step is as if there had been none."""
    engine = make(None)
    before = engine.evaluate([batch(0, 31, seed=5)]).loss
    module: Any = sys.modules[type(engine).__module__]  # forward is a name in each engine's module
    real = module.forward

    def spoiled(*arguments: Any) -> torch.Tensor:
        return real(*arguments) * (float("nan") if dist.get_rank() == 1 else 1.0)

    module.forward = spoiled
    try:
        engine.forward_backward([batch(0, 31)])
    finally:
        module.forward = real
    norm = engine.step(1e-2)
    after = engine.evaluate([batch(0, 31, seed=5)]).loss
    assert norm != norm and after == before, (norm, before, after)
    sums = engine.forward_backward([batch(0, 31)])
    return [after, sums.loss, engine.step(1e-2), engine.evaluate([batch(0, 31, seed=5)]).loss]


def _state(make: Make) -> list[float]:
    """What is saved after an evaluation has every parameter and its states, whole over the ranks: numbers of elements and their sums."""
    engine = make(None)
    engine.forward_backward([batch(0, 31)])
    engine.step(1e-2)
    engine.evaluate([batch(0, 31, seed=5)])
    state = engine.state_dict()
    assert all(f"{name}.{key}" in state["optim"] for name in state["model"] for key in ("exp_avg", "exp_avg_sq", "step"))
    found = [sum(tensor.numel() for tensor in state["model"].values()), len(state["model"]), len(state["optim"])]
    engine.forward_backward([batch(0, 31, seed=6)])  # reading the state disturbs nothing
    return [*map(float, found), engine.step(1e-2)]
