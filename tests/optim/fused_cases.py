"""Eager and fused steps of Adam in eight and four bits on the same gradients, for both kernels' tests."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from optim.build import build_optimizer
from optim.driver import ComposedOptimizer

SHAPES = ((64, 128), (33, 200), (21, 400), (129, 77), (70, 65))
"""Rows of whole blocks, with a short last one, odd, and of one element more than a half block."""


def gradients(shape: tuple[int, int], steps: int) -> list[Tensor]:
    """Of columns decades apart, with a row that is always zero and one that becomes so."""
    generator, found = torch.Generator().manual_seed(shape[1]), []
    for step in range(steps):
        gradient = torch.randn(shape, generator=generator) * torch.logspace(-6, 1, shape[1])
        gradient[3] = 0
        gradient[5] *= step < 3
        found.append(gradient)
    return found


def optimizer_of(shape: tuple[int, int], preset: str, kernel: str, dtype: torch.dtype = torch.float32, **more: Any) -> ComposedOptimizer:
    """Of one matrix, the same in each call."""
    model = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    with torch.no_grad():
        model.weight.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    return cast(ComposedOptimizer, build_optimizer(model, preset=preset, lr=1e-2, weight_decay=0.1, kernel=kernel, **more))


def kept(optimizer: ComposedOptimizer) -> dict[str, Tensor]:
    """Weight and states of its one parameter."""
    (weight,) = optimizer.lanes
    return {"weight": weight.detach(), **optimizer.state[weight]}


def stepped(optimizer: ComposedOptimizer, given: list[Tensor]) -> dict[str, Tensor]:
    (weight,) = optimizer.lanes
    for gradient in given:
        weight.grad = gradient.to(weight.dtype)
        optimizer.step()
    return kept(optimizer)
