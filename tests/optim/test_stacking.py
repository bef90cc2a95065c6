"""Small tensors stepped as one: the same as each by itself, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn

from optim import driver
from optim.build import build_optimizer
from optim.driver import ComposedOptimizer
from optim.stacking import Workspace, stacks

STACKED = {
    "adamw_8bit": {"kernel": "eager"},
    "adamw_4bit": {"kernel": "eager"},
    "sgd": {"momentum": 0.9},
}


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    shapes = [(130, 48)] * 3 + [(48, 130)] * 3 + [(64, 64)] * 2
    return nn.ModuleList([nn.Linear(n, m) for m, n in shapes] + [nn.LayerNorm(48)]).to(dtype)


def trained(preset: str, steps: int = 6, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[nn.Module, ComposedOptimizer]:
    """The second matrix has no gradient in the second step, so that its counter differs from the others'."""
    model = model_of(dtype)
    optimizer = build_optimizer(model, preset=preset, lr=1e-2, **settings)
    assert isinstance(optimizer, ComposedOptimizer)
    for step in range(steps):
        for index, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + index)
            parameter.grad = None if (step, index) == (1, 2) else torch.randn(parameter.shape, generator=generator).to(dtype)
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("preset", STACKED)
def test_as_one_is_as_each_by_itself(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = driver.rows_together
    monkeypatch.setattr(driver, "rows_together", lambda tensors: (calls.append(len(tensors)), original(tensors))[1])
    model, optimizer = trained(preset, **STACKED[preset])
    assert max(calls) > 1 and sum(calls) > 20
    monkeypatch.setattr(driver, "stacks", lambda items, kind, size, most: ([item] for item in items))
    plain, alone = trained(preset, **STACKED[preset])
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
        assert all(torch.equal(state, alone.state[other][name]) for name, state in optimizer.state[one].items())


def test_stacks_are_alike_in_order_and_not_too_large() -> None:
    items = [("a", 3), ("b", 5), ("a", 4), ("a", 4), ("b", 90), ("a", 1)]
    found = list(stacks(items, lambda item: item[0], lambda item: item[1], most=8))
    assert sorted(found) == sorted([[("a", 3), ("a", 4)], [("b", 5)], [("a", 4), ("a", 1)], [("b", 90)]])


def test_a_workspace_is_the_same_memory_until_more_is_asked() -> None:
    work, like = Workspace(8), torch.zeros(2)
    first = work.take("x", (2, 3), like)
    assert work.take("x", (4,), like).data_ptr() == first.data_ptr() != work.take("y", (4,), like).data_ptr()
    assert work.take("x", (50,), like).shape == (50,) and work.take("x", (2,), like, torch.float64).dtype == torch.float64
    assert work.scratch(like).shape == (2, 8)
