"""Recorded gradients and what every method of updating matrices must show on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from optim.methods import Method
from tests.optim.lockstep import Simulator, relative

STEPS = 20
SHAPES = {"tall": (48, 20), "wide": (20, 48), "square": (32, 32)}
UNEVEN = {**SHAPES, "few rows": (5, 12), "fewer rows than ranks": (2, 9)}
"""Over 4 ranks ``torch.chunk`` deals 5 rows as 2, 2, 1, 0 and 2 rows as 1, 1, 0, 0."""


def tape(shape: tuple[int, int], seed: int = 0, noise: float = 0.3) -> list[Tensor]:
    """A slowly turning low-rank part plus noise. The strengths are close to each other: Adam gives all directions of a subspace the same
    length, and with it the rounding of float32, which is a part of the strongest."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(shape[0], 4, generator=generator)
    right = torch.randn(4, shape[1], generator=generator)
    strength = torch.tensor([2.0, 1.5, 1.1, 0.8])
    gradients = []
    for _ in range(STEPS):
        gradients.append((left * strength) @ right + noise * torch.randn(shape, generator=generator))
        left = left + 0.2 * torch.randn(left.shape, generator=generator)
    return gradients


def weights(shape: tuple[int, int]) -> Tensor:
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(99))


def hf_adam(moments: list[np.ndarray], values: np.ndarray, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6) -> np.ndarray:
    """m / (√v + ε) in float64; ``moments`` [m, v] in place."""
    moments[0] = betas[0] * moments[0] + (1 - betas[0]) * values
    moments[1] = betas[1] * moments[1] + (1 - betas[1]) * values**2
    return moments[0] / (np.sqrt(moments[1]) + eps)


def bias(step: int, betas: tuple[float, float] = (0.9, 0.999)) -> float:
    return float(np.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step))


def close(actual: Tensor, expected: np.ndarray, bound: float = 1e-6) -> None:
    error = relative(actual, torch.from_numpy(np.ascontiguousarray(expected)))
    assert error <= bound, f"{error:.2e} > {bound:.0e}"


def check_sharded(method: Method, shape: tuple[int, int], bound: float = 1e-6, steps: int = 8, noise: float = 0.3) -> None:
    """Updates and states of 2, 3 and 4 ranks equal those of one."""
    alone = Simulator(method, shape)
    dealt = [Simulator(method, shape, ranks) for ranks in (2, 3, 4)]
    weight = weights(shape)
    for gradient in tape(shape, noise=noise)[:steps]:
        expected = alone.step(gradient, weight)
        for simulator in dealt:
            error = relative(simulator.step(gradient, weight), expected)
            assert error <= bound, f"{simulator.ranks} ranks: {error:.2e}"
            assert simulator.requests == alone.requests
    for simulator in dealt:
        states = simulator.whole_states()
        for name, expected in alone.whole_states().items():
            error = relative(states[name], expected)
            assert error <= bound, f"{simulator.ranks} ranks, {name}: {error:.2e}"


over_all_shapes = pytest.mark.parametrize("shape", UNEVEN.values(), ids=UNEVEN)
over_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
