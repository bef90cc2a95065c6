"""Weights in eight bits: values, what products read, and what is refused."""

from __future__ import annotations

from typing import cast

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from models.int8_weight import Int8Weight, group_of, quantise_weights_, stored
from models.linear import Linear


def of(value: Tensor) -> Int8Weight:
    weight = Int8Weight.empty(*value.shape)
    weight.copy_(value)
    return weight


@pytest.mark.parametrize(("shape", "group"), [((7, 512), 256), ((5, 96), 96), ((3, 260), 130), ((4, 16), 16)])
def test_values_are_the_nearest_of_256_steps(shape, group):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = of(value).dequantised(torch.float32)
    assert group_of(shape[1]) == group
    for row, line in enumerate(value.double()):
        for numbers, ours in zip(line.split(group), found[row].split(group), strict=True):
            low, high = numbers.min(), numbers.max()
            expected = low + torch.round((numbers - low) / ((high - low) / 255)) * ((high - low) / 255)
            assert torch.allclose(ours.double(), expected, rtol=0, atol=1e-6)
            assert ours.min() == low.float()  # the ends of a group are kept


def test_groups_of_one_sign_and_of_one_number():
    """Q-GaLore's reference clamps an integer zero point to the codes and makes one number of a group in [1, 2]."""
    value = torch.linspace(1, 2, 256).expand(2, -1).contiguous()
    value[1] = -3.25
    found = of(value).dequantised(torch.float32)
    assert float((found[0] - value[0]).abs().max()) <= 0.5 / 255 + 1e-6 and torch.equal(found[1], value[1])
    assert torch.equal(of(torch.zeros(2, 256)).dequantised(torch.float32), torch.zeros(2, 256))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("kind", [Linear, nn.Linear])
def test_products_are_those_of_the_numbers(kind, autocast):
    torch.manual_seed(2)
    linear = (kind(64, 48, bias=False) if kind is nn.Linear else kind(64, 48)).to(torch.bfloat16)
    plain = nn.Linear(64, 48, bias=False).to(torch.bfloat16)
    quantise_weights_([linear])
    with torch.no_grad():
        plain.weight.copy_(cast(Int8Weight, linear.weight).dequantised(torch.bfloat16))
    ends = []
    for module in (linear, plain):
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = module(x if autocast else x.to(torch.bfloat16))
        y.float().square().sum().backward()
        ends.append((y.detach(), x.grad, module.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert type(linear.weight.grad) is Tensor and linear.weight.grad.dtype == torch.bfloat16


def test_rows_that_cannot_be_stored_stay_as_they_are():
    assert group_of(66) is None and group_of(4 * 257) is None and group_of(344) == 172
    linear = Linear(66, 48).to(torch.bfloat16)
    quantise_weights_([linear])
    assert type(linear.weight.detach()) is Tensor and stored(linear.weight) is linear.weight
    with pytest.raises(ValueError, match="rows of 66 elements cannot be kept in eight bits"):
        Int8Weight.empty(3, 66)


def test_other_operations_are_refused_by_name():
    weight = of(torch.zeros(4, 64))
    for operation in (lambda: weight + 1, lambda: weight.t(), lambda: weight[:, :3], lambda: weight.view(2, 128)):
        with pytest.raises(NotImplementedError, match="weight"):
            operation()
    assert "Int8Weight((4, 64)" in repr(weight)


def test_it_is_moved_and_copied_whole():
    weight = of(torch.randn(6, 64))
    linear = Linear(64, 6).to(torch.bfloat16)
    linear.weight = nn.Parameter(weight)
    with torch.no_grad():
        again = cast(Int8Weight, weight.clone())
    assert torch.equal(again.packed, weight.packed) and again.packed.data_ptr() != weight.packed.data_ptr()
    assert torch.equal(weight.to(torch.float32), weight.dequantised(torch.float32))
    linear.to_empty(device="meta")
    assert linear.weight.is_meta and linear.weight.requires_grad and isinstance(linear.weight, Int8Weight)
    assert torch.equal(stored(nn.Parameter(weight)), weight.packed)
