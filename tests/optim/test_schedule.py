"""Learning rate at the points that define each schedule."""

from __future__ import annotations

import itertools

import pytest

from optim.config import OptimConfig
from optim.schedule import learning_rate


def config(kind: str, **schedule: object) -> OptimConfig:
    return OptimConfig.model_validate({"lr": 2.0, "schedule": {"kind": kind, "warmup_steps": 10, "min_lr_ratio": 0.1, **schedule}})


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    for kind in ("wsd", "cosine", "constant", "inverse_sqrt", "infinite"):
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


def test_inverse_square_root_of_the_step() -> None:
    rate = [learning_rate(step, config("inverse_sqrt"), 100) for step in range(1, 161)]
    assert rate[9] == 2.0 and rate[39] == pytest.approx(1.0) and rate[159] == pytest.approx(0.5)
    assert learning_rate(1, config("inverse_sqrt", warmup_steps=0), 100) == 2.0


def test_infinite_comes_down_stays_and_ends() -> None:
    schedule = config("infinite", cooldown_steps=20, constant_lr_ratio=0.5, decay_fraction=0.2)
    rate = [learning_rate(step, schedule, 100) for step in range(101)]
    assert rate[10] == 2.0 and rate[20] == pytest.approx(1.5)  # half a cosine from 2 to 1
    assert rate[30:81] == pytest.approx([1.0] * 51)
    assert rate[90] == pytest.approx((1.0 * 0.2) ** 0.5) and rate[100] == pytest.approx(0.2)
    assert learning_rate(70, schedule, 10_000) == 1.0  # a longer run is the same until its own end
    with pytest.raises(ValueError, match="min_lr_ratio 0.6 must be .* constant_lr_ratio 0.5"):
        config("infinite", min_lr_ratio=0.6)


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant", "inverse_sqrt", "infinite"])
@pytest.mark.parametrize("total", [1, 3, 10, 11, 12])
def test_short_runs_are_positive_and_never_above_the_peak(kind: str, total: int) -> None:
    for step in range(1, total + 1):
        assert 0 < learning_rate(step, config(kind), total) <= 2.0
