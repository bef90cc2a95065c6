"""Weights and gradients in bfloat16: 20 steps on recorded gradients end at the bits that the papers' equations in float64 give when each
step's weight is rounded to the nearest bfloat16, and nearer to the unrounded ones than the published packages in bfloat16 end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from optim.build import build_optimizer
from optim.driver import ComposedOptimizer
from tests.optim.lockstep import relative
from tests.optim.tape import STEPS, over_shapes, tape, weights
from tests.optim.test_adafactor import adafactor
from tests.optim.test_apollo import GAP, apollo
from tests.optim.test_galore import Basis, galore
from tests.optim.test_muon import muon

BF16 = torch.bfloat16
LR = 3e-3
"""Of a weight near 0.02: many steps' updates are a few of bfloat16's steps long, so that the rounding decides."""
BETAS = (0.9, 0.999)
Gradients = list[np.ndarray]


def recorded(shape: tuple[int, int], noise: float) -> list[Tensor]:
    return [gradient.to(BF16) for gradient in tape(shape, noise=noise)]


def built(preset: str, shape: tuple[int, int], **settings: Any) -> tuple[nn.Parameter, ComposedOptimizer]:
    """One matrix of a feed-forward in bfloat16, and its optimizer."""
    model = nn.ModuleDict({"ffn": nn.Linear(shape[1], shape[0], bias=False)})
    weight = model["ffn"].weight
    assert isinstance(weight, nn.Parameter)
    weight.data = weights(shape).to(BF16)
    optimizer = build_optimizer(model, preset=preset, weights="bf16", lr=LR, weight_decay=0.0, **settings)
    assert isinstance(optimizer, ComposedOptimizer)
    return weight, optimizer


def adamw(gradients: Gradients) -> list[np.ndarray]:
    """torch's form: ε beside the bias-corrected second moment."""
    mean, square, updates = 0.0, 0.0, []
    for step, gradient in enumerate(gradients, 1):
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        updates.append(mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8))
    return updates


def rounded_walk(start: Tensor, updates: list[np.ndarray]) -> Tensor:
    """Weights in bfloat16 after every update, each computed in float64 from the one before."""
    weight = start
    for update in updates:
        weight = (weight.double() - LR * torch.from_numpy(np.ascontiguousarray(update))).to(BF16)
    return weight


PRESETS: dict[str, tuple[dict[str, Any], float]] = {
    "adamw": ({"betas": BETAS}, 0.3),
    "galore": ({"rank": 4, "update_gap": 50, "svd": "exact", "scale": 0.25, "betas": BETAS}, 0.3),
    "apollo": ({"rank": 4, "update_gap": GAP, "betas": BETAS}, 0.3),
    "adafactor": ({}, 0.3),
    "muon": ({}, 6.0),
}
"""Preset -> (settings, noise of its tape: Muon's polynomial asks for spectra that float32 can tell apart)."""


def exact_updates(preset: str, gradients: Gradients, start: Tensor, optimizer: ComposedOptimizer, weight: nn.Parameter) -> list[np.ndarray]:
    """By the papers' equations, with the settings that ``PRESETS`` and the presets' defaults give."""
    lane, state = optimizer.lanes[weight], optimizer.state[weight]
    references: dict[str, Callable[[], list[np.ndarray]]] = {
        "adamw": lambda: adamw(gradients),
        "galore": lambda: galore(gradients, Basis(4, state["basis"].double().numpy()), 50, 0.25),
        "apollo": lambda: apollo(gradients, 4, lane.key, "channel", 1.0),
        "adafactor": lambda: adafactor(gradients, start.double().numpy(), lane.rule),  # pyright: ignore[reportArgumentType]
        "muon": lambda: muon(gradients, True, lane.rule.adjust),  # pyright: ignore[reportAttributeAccessIssue]
    }
    return references[preset]()


@over_shapes
@pytest.mark.parametrize("preset", PRESETS)
def test_bits_of_the_rounded_equations(preset: str, shape: tuple[int, int]) -> None:
    settings, noise = PRESETS[preset]
    weight, optimizer = built(preset, shape, **settings)
    start = weight.detach().clone()
    gradients = recorded(shape, noise)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    updates = exact_updates(preset, [g.double().numpy() for g in gradients], start, optimizer, weight)
    expected = rounded_walk(start, updates)
    assert weight.dtype == BF16 and not torch.equal(expected, start)
    # Where float32 and float64 fall to two sides of a rounding's middle, by some 1e-7 of the weight against bfloat16's 4e-3.
    differ = int((weight.detach() != expected).sum())
    assert differ <= 0.01 * expected.numel(), f"{differ} of {expected.numel()} differ"
    assert relative(weight.detach(), expected) <= 2**-10


def published(preset: str, weight: nn.Parameter) -> torch.optim.Optimizer:
    """The other package's optimizer with the same settings."""
    if preset == "adamw":
        return torch.optim.AdamW([weight], lr=LR, weight_decay=0.0)
    if preset == "galore":
        package = pytest.importorskip("galore_torch")
        group = {"params": [weight], "rank": 4, "update_proj_gap": 50, "scale": 0.25, "proj_type": "std"}
        return package.GaLoreAdamW([group], lr=LR, no_deprecation_warning=True)
    package = pytest.importorskip("transformers")
    return package.Adafactor([weight], lr=LR, scale_parameter=False, relative_step=False)


@over_shapes
@pytest.mark.parametrize("preset", ["adamw", "galore", "adafactor"])
def test_nearer_to_the_exact_walk_than_the_published_packages(preset: str, shape: tuple[int, int]) -> None:
    """Both round weights to nearest at every step; ours with moments in float32, theirs with what they make of bfloat16."""
    settings, noise = PRESETS[preset]
    weight, optimizer = built(preset, shape, **settings)
    start = weight.detach().clone()
    theirs = nn.Parameter(start.clone())
    other = published(preset, theirs)
    gradients = recorded(shape, noise)
    assert len(gradients) == STEPS
    for gradient in gradients:
        weight.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        other.step()
    updates = exact_updates(preset, [g.double().numpy() for g in gradients], start, optimizer, weight)
    exact = start.double() - LR * torch.from_numpy(np.stack(updates).sum(axis=0))
    moved = [relative(end.detach().double() - start.double(), exact - start.double()) for end in (weight, theirs)]
    assert moved[0] <= moved[1] * 1.05 and moved[0] < 0.1, moved
