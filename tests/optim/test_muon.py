"""Muon against the paper in float64, against torch.optim.Muon, and over ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optim.muon import Muon, newton_schulz
from tests.optim.lockstep import Simulator, relative
from tests.optim.tape import check_sharded, close, over_all_shapes, over_shapes, tape


def muon(gradients: list[np.ndarray], nesterov: bool, adjust: str) -> list[np.ndarray]:
    """Newton-Schulz acts on singular values alone: here by an SVD, σ ← aσ + bσ³ + cσ⁵ five times."""
    average, updates = np.zeros(gradients[0].shape), []
    m, n = gradients[0].shape
    factor = max(1.0, m / n) ** 0.5 if adjust == "original" else 0.2 * max(m, n) ** 0.5
    for gradient in gradients:
        average = 0.95 * average + 0.05 * gradient
        direction = 0.05 * gradient + 0.95 * average if nesterov else average
        u, sigma, vh = np.linalg.svd(direction, full_matrices=False)
        sigma = sigma / np.linalg.norm(sigma)
        for _ in range(5):
            sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
        updates.append(factor * (u * sigma) @ vh)
    return updates


@pytest.mark.parametrize(("precision", "bound"), [(torch.float64, 1e-6), (None, 3e-6)])
@pytest.mark.parametrize(("nesterov", "adjust"), [(True, "original"), (False, "match_rms_adamw")])
@over_shapes
def test_the_paper_in_float64(shape: tuple[int, int], nesterov: bool, adjust: str, precision: torch.dtype | None, bound: float) -> None:
    """The polynomial takes differences of terms up to ten times its value, five times over: in float32 that costs a digit."""
    gradients = tape(shape, noise=6.0)
    simulator = Simulator(Muon(nesterov=nesterov, adjust=adjust, precision=precision), shape)  # pyright: ignore[reportArgumentType]
    for gradient, expected in zip(gradients, muon([g.double().numpy() for g in gradients], nesterov, adjust), strict=True):
        close(simulator.step(gradient), expected, bound)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@over_shapes
def test_torch(shape: tuple[int, int], adjust: str) -> None:
    """It computes in bfloat16."""
    parameter = torch.nn.Parameter(torch.zeros(shape))
    reference = torch.optim.Muon([parameter], lr=1.0, weight_decay=0.0, adjust_lr_fn=adjust)
    exact = Simulator(Muon(adjust=adjust), shape)  # pyright: ignore[reportArgumentType]
    rounded = Simulator(Muon(adjust=adjust, precision=torch.bfloat16), shape)  # pyright: ignore[reportArgumentType]
    for gradient in tape(shape, noise=2.0):
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        reference.step()
        theirs = before - parameter.detach()
        assert relative(exact.step(gradient), theirs) <= 5e-2
        assert relative(rounded.step(gradient), theirs) <= 1e-2


@over_shapes
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    u, _, vh = torch.linalg.svd(tape(shape)[0], full_matrices=False)
    values = torch.linalg.svdvals(newton_schulz(((u * torch.logspace(0, -1.5, len(vh))) @ vh)[None], 5)[0])
    assert float(values.min()) > 0.65 and float(values.max()) < 1.25


@over_all_shapes
def test_over_ranks(shape: tuple[int, int]) -> None:
    check_sharded(Muon(), shape)


def test_requests_and_state_bytes() -> None:
    simulator = Simulator(Muon(), (40, 16), 4)
    simulator.step(tape((40, 16))[0])
    assert simulator.requests == ["OnOwner"]
    assert simulator.local_bytes() == [4 * 10 * 16] * 4
