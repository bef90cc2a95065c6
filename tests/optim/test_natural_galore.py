"""Natural GaLore against the paper's formula in float64 and over ranks."""

from __future__ import annotations

import numpy as np
import pytest

from optim.natural_galore import NaturalGaLore
from optim.projectors import Refresh, SingularProjector
from tests.optim.lockstep import Simulator
from tests.optim.tape import bias, check_sharded, close, hf_adam, over_all_shapes, over_shapes, tape

PROJECTOR = SingularProjector(4, Refresh(7, stagger=False), how="exact")


@over_shapes
def test_the_paper_in_float64(shape: tuple[int, int]) -> None:
    """Mostly noise: the Fisher matrix of gradients that resemble each other multiplies float32's rounding by its condition."""
    tall = shape[0] >= shape[1]
    simulator = Simulator(NaturalGaLore(PROJECTOR, history=5), shape)
    past: list[np.ndarray] = []
    moments = [np.zeros(()), np.zeros(())]
    for index, gradient in enumerate(tape(shape, noise=8.0)):
        actual = simulator.step(gradient)
        basis = simulator.states[0]["basis"].double().numpy()
        g = gradient.double().numpy().T if tall else gradient.double().numpy()
        low = (basis.T @ g).reshape(-1)
        past = [*past[-4:], low]
        fisher = sum(np.outer(old, old) for old in past) + 1e-3 * np.eye(low.size)
        ratio = hf_adam(moments, np.linalg.solve(fisher, low).reshape(-1, g.shape[1]))
        expected = 0.25 * bias(index + 1) * basis @ ratio
        close(actual, expected.T if tall else expected)


@over_all_shapes
def test_over_ranks(shape: tuple[int, int]) -> None:
    projector = SingularProjector(2, Refresh(3, stagger=False), how="exact")
    check_sharded(NaturalGaLore(projector, history=3), shape, noise=8.0)


def test_requests_and_state_bytes() -> None:
    for shape, requests in (((40, 16), ["Sum"]), ((16, 40), ["SumRows", "Sum", "GatherRows"])):
        simulator = Simulator(NaturalGaLore(PROJECTOR), shape, 4)
        for gradient in tape(shape)[:2]:
            simulator.step(gradient)
        assert simulator.requests == requests
        basis = 16 * 4 if shape == (40, 16) else 4 * 4
        assert simulator.local_bytes() == [4 * (22 * 10 * 4 + basis)] * 4


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="history 0 must be at least 1"):
        NaturalGaLore(PROJECTOR, history=0)
