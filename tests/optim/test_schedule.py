"""Learning rate at the points that define each schedule."""

from __future__ import annotations

import itertools

import pytest

from optim.config import OptimConfig
from optim.schedule import learning_rate


def config(kind: str, **schedule: object) -> OptimConfig:
    return OptimConfig.model_validate({"lr": 2.0, "schedule": {"kind": kind, "warmup_steps": 10, "min_lr_ratio": 0.1, **schedule}})


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    for kind in ("wsd", "cosine", "constant"):
        rates = [learning_rate(step, config(kind), 100) for step in range(1, 11)]
        assert rates == pytest.approx([0.2 * step for step in range(1, 11)])


def test_wsd_stays_then_falls_linearly_to_the_minimum() -> None:
    rate = [learning_rate(step, config("wsd", decay_fraction=0.2), 100) for step in range(101)]
    assert rate[10:81] == pytest.approx([2.0] * 71)
    assert rate[90] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rate[100] == pytest.approx(0.2)
    falls = [a - b for a, b in itertools.pairwise(rate[80:101])]
    assert falls == pytest.approx([falls[0]] * 20)


def test_cosine_halfway_and_end() -> None:
    assert learning_rate(55, config("cosine"), 100) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate(100, config("cosine"), 100) == pytest.approx(0.2)


def test_constant_never_falls() -> None:
    assert learning_rate(100, config("constant"), 100) == 2.0


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("total", [1, 3, 10, 11, 12])
def test_short_runs_are_positive_and_never_above_the_peak(kind: str, total: int) -> None:
    for step in range(1, total + 1):
        assert 0 < learning_rate(step, config(kind), total) <= 2.0
