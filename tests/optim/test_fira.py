"""Fira against the paper in float64 and over ranks."""

from __future__ import annotations

import numpy as np
import pytest

from optim.low_rank import Fira
from optim.projectors import Refresh, SingularProjector
from tests.optim.lockstep import Simulator, relative
from tests.optim.tape import bias, check_sharded, close, hf_adam, over_all_shapes, over_shapes, tape


def fira(gradients: list[np.ndarray], bases: list[np.ndarray], scale: float, inside: float) -> list[np.ndarray]:
    """Algorithm 1 of arXiv 2410.01623, written for a left basis; a tall matrix is transposed."""
    moments = [np.zeros(()), np.zeros(())]
    limited, updates = 0.0, []
    for index, (gradient, basis) in enumerate(zip(gradients, bases, strict=True)):
        tall = gradient.shape[0] >= gradient.shape[1]
        g = gradient.T if tall else gradient
        low = basis.T @ g
        ratio = hf_adam(moments, low)
        phi = np.linalg.norm(ratio, axis=0) / (np.linalg.norm(low, axis=0) + 1e-8)
        rest = (g - inside * basis @ low) * phi
        norm = np.linalg.norm(rest)
        if index and norm > 1.01 * limited:
            rest *= 1.01 * limited / norm
            norm = 1.01 * limited
        limited = norm
        update = bias(index + 1) * (scale * basis @ ratio + rest)
        updates.append(update.T if tall else update)
    return updates


@pytest.mark.parametrize("scaled", [False, True])
@over_shapes
def test_the_paper_in_float64(shape: tuple[int, int], scaled: bool) -> None:
    gradients = tape(shape)
    method = Fira(SingularProjector(4, Refresh(7, stagger=False), how="exact"), scaled_residual=scaled)
    simulator = Simulator(method, shape)
    updates, bases = [], []
    for gradient in gradients:
        updates.append(simulator.step(gradient))
        bases.append(simulator.states[0]["basis"].double().numpy().copy())
    expected = fira([g.double().numpy() for g in gradients], bases, 0.25, 0.25 if scaled else 1.0)
    for actual, wanted in zip(updates, expected, strict=True):
        close(actual, wanted)


@over_all_shapes
def test_over_ranks(shape: tuple[int, int]) -> None:
    check_sharded(Fira(SingularProjector(3, Refresh(gap=3), how="exact")), shape)


def test_a_step_of_zero_does_not_stop_training() -> None:
    """The reference would hold the norm below 1e-8 from then on."""
    gradients = tape((12, 8))
    simulator = Simulator(Fira(SingularProjector(2)), (12, 8))
    simulator.step(0 * gradients[0])
    assert relative(simulator.step(gradients[1]), 0 * gradients[1]) > 1
    assert simulator.states[0]["norm"] > 0.1


def test_requests() -> None:
    for shape, requests in (((40, 16), ["Sum"]), ((16, 40), ["SumRows", "GatherRows", "Sum"])):
        simulator = Simulator(Fira(SingularProjector(4, Refresh(50, stagger=False))), shape, 4)
        for gradient in tape(shape)[:2]:
            simulator.step(gradient)
        assert simulator.requests == requests
