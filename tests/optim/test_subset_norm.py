"""Subset-Norm with Subspace-Momentum against the paper in float64 and over ranks."""

from __future__ import annotations

import numpy as np
import pytest

from optim.projectors import Refresh, SingularProjector
from optim.subset_norm import SubsetNormMomentum
from tests.optim.lockstep import Simulator
from tests.optim.tape import bias, check_sharded, close, over_all_shapes, over_shapes, tape


@over_shapes
def test_the_paper_in_float64(shape: tuple[int, int]) -> None:
    tall = shape[0] >= shape[1]
    simulator = Simulator(SubsetNormMomentum(SingularProjector(4, Refresh(7, stagger=False), how="exact")), shape)
    momentum, square = np.zeros(()), np.zeros(())
    for index, gradient in enumerate(tape(shape)):
        actual = simulator.step(gradient)
        basis = simulator.states[0]["basis"].double().numpy()
        g = gradient.double().numpy().T if tall else gradient.double().numpy()
        if index % 7 == 0:
            momentum = np.zeros(())
        momentum = 0.9 * momentum + 0.1 * basis.T @ g
        square = 0.999 * square + 0.001 * (g**2).sum(axis=0)
        numerator = basis @ momentum + (g - basis @ (basis.T @ g))
        expected = bias(index + 1) * numerator / (np.sqrt(square) + 1e-6)
        close(actual, expected.T if tall else expected)


@pytest.mark.parametrize("how", ["exact", "subspace"])
@over_all_shapes
def test_over_ranks(shape: tuple[int, int], how: str) -> None:
    check_sharded(SubsetNormMomentum(SingularProjector(3, Refresh(3), how=how)), shape)  # pyright: ignore[reportArgumentType]


def test_requests_and_state_bytes() -> None:
    for shape, requests in (((40, 16), []), ((16, 40), ["SumRows", "GatherRows"])):
        simulator = Simulator(SubsetNormMomentum(SingularProjector(4, Refresh(50, stagger=False))), shape, 4)
        for gradient in tape(shape)[:2]:
            simulator.step(gradient)
        assert simulator.requests == requests
        basis = 16 * 4 if shape == (40, 16) else 4 * 4
        assert simulator.local_bytes() == [4 * (10 * 4 + 10 + basis)] * 4
