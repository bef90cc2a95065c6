"""Adafactor and AdaLomo's rule against the papers in float64, against transformers and torch, and over ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optim.adafactor import Adafactor, adalomo
from tests.optim.lockstep import Simulator, relative
from tests.optim.tape import check_sharded, close, over_all_shapes, over_shapes, tape, weights


def adafactor(gradients: list[np.ndarray], weight: np.ndarray, method: Adafactor) -> list[np.ndarray]:
    """Algorithm 4 of arXiv 1804.04235 with sections 5 to 8, and a constant weight."""
    row, column, mean = np.zeros(()), np.zeros(()), np.zeros(())
    updates = []
    for step, gradient in enumerate(gradients, start=1):
        keep = 1 - step**-0.8
        squares = gradient**2 + 1e-30
        row = keep * row + (1 - keep) * squares.mean(axis=1)
        column = keep * column + (1 - keep) * squares.mean(axis=0)
        update = gradient / np.sqrt(np.outer(row, column) / row.mean())
        update /= max(1.0, float(np.sqrt((update**2).mean())) / 1.0) if method.clip else 1.0
        if method.beta1 is not None:
            mean = method.beta1 * mean + (1 - method.beta1) * update
            update = mean
        if method.scale_parameter:
            update = update * max(1e-3, float(np.sqrt((weight**2).mean())))
        updates.append(update * (min(1e-2, step**-0.5) if method.relative_step else 1.0))
    return updates


METHODS = {
    "plain": Adafactor(),
    "unclipped": Adafactor(clip=None),
    "momentum": Adafactor(beta1=0.9),
    "original": Adafactor(scale_parameter=True, relative_step=True),
    "adalomo": adalomo(),
}
over_methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@over_methods
@over_shapes
def test_the_paper_in_float64(shape: tuple[int, int], method: Adafactor) -> None:
    simulator, weight = Simulator(method, shape), weights(shape)
    expected = adafactor([g.double().numpy() for g in tape(shape)], weight.double().numpy(), method)
    for gradient, wanted in zip(tape(shape), expected, strict=True):
        close(simulator.step(gradient, weight), wanted)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (Adafactor(), {"lr": 1.0, "scale_parameter": False, "relative_step": False}),
        (Adafactor(beta1=0.9), {"lr": 1.0, "scale_parameter": False, "relative_step": False, "beta1": 0.9}),
        (Adafactor(scale_parameter=True, relative_step=True), {}),
    ],
)
@over_shapes
def test_transformers(shape: tuple[int, int], method: Adafactor, options: dict[str, float]) -> None:
    transformers = pytest.importorskip("transformers")
    parameter = torch.nn.Parameter(weights(shape).double())
    reference = transformers.Adafactor([parameter], **options)
    simulator = Simulator(method, shape)
    for gradient in tape(shape):
        before = parameter.detach().clone()
        parameter.grad = gradient.double()
        reference.step()
        assert relative(simulator.step(gradient, before), before - parameter.detach()) <= 1e-6


@over_shapes
def test_torch(shape: tuple[int, int]) -> None:
    """Its step is min(lr, 1/√t) · max(ε₂, RMS(weight)): with a rate below 1/√20 and ours set to it, the same."""
    parameter = torch.nn.Parameter(weights(shape).double())
    reference = torch.optim.Adafactor([parameter], lr=0.1)
    simulator = Simulator(adalomo(), shape)
    for gradient in tape(shape):
        before = parameter.detach().clone()
        parameter.grad = gradient.double()
        reference.step()
        assert relative(0.1 * simulator.step(gradient, before), before - parameter.detach()) <= 1e-6


@over_methods
@over_all_shapes
def test_over_ranks(shape: tuple[int, int], method: Adafactor) -> None:
    check_sharded(method, shape)


def test_requests_and_state_bytes() -> None:
    simulator = Simulator(adalomo(), (40, 16), 4)
    simulator.step(tape((40, 16))[0])
    assert simulator.requests == ["SumRows", "GatherRows", "Weight", "Sum"]
    assert simulator.local_bytes() == [4 * (10 + 4)] * 4
    plain = Simulator(Adafactor(), (40, 16), 2)
    plain.step(tape((40, 16))[0])
    assert plain.requests == ["SumRows", "GatherRows", "Sum"]
