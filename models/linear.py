"""A linear map that keeps no low-precision copy of its weight.

Under autocast torch casts the weight in forward and autograd keeps the copy until backward: 2 bytes per parameter of the model.
Here the weight itself is kept, which is alive anyway, and cast again in backward. Results and gradients are the same bits. A weight
that arrives in the low precision (gathered so, parallel/fsdp.py) is used as it is, and its gradient leaves in the weight's ``grad_dtype``.
Weights in eight bits (``int8_weight.py``) are read the same way.

Legend: n tokens of all rows, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.int8_weight import Int8Weight, in_dtype


@dataclass(frozen=True)
class Columns:
    """In place of a weight: what `linear` would make of its input is in these columns of it already."""

    first: int
    last: int


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """What the gradient of ``weight`` is kept in. A compiler's graphs know its own dtype only; ``models/compiled.py`` refuses others."""
    if torch.compiler.is_compiling():
        return weight.dtype
    return (weight.grad_dtype if weight.is_leaf else None) or weight.dtype


class _Widen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = gradient_dtype(weight)
        return weight.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


def widened(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` in a wider ``dtype``, where gradients of many tiles add up; their sum is not narrowed to the weight's own dtype."""
    return weight if weight.dtype == dtype else _Widen.apply(weight, dtype)  # type: ignore[return-value]


class _CastLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.gradient_dtype = gradient_dtype(weight_OI)
        return F.linear(x, in_dtype(weight_OI, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        (dy,) = grads
        dx = dweight_OI = None
        if ctx.needs_input_grad[0]:
            dx = torch.matmul(dy, in_dtype(weight_OI, dy.dtype))
        if ctx.needs_input_grad[1]:
            dweight_OI = torch.mm(dy.flatten(0, -2).t(), x.flatten(0, -2)).to(ctx.gradient_dtype)
        return dx, dweight_OI, None


def linear(x: Tensor, weight_OI: Tensor | Columns) -> Tensor:
    """``x @ weight^T`` in autocast's dtype if it is on (never for float64), else in the operands' own."""
    if isinstance(weight_OI, Columns):
        return x[..., weight_OI.first : weight_OI.last]
    device, packed = x.device.type, isinstance(weight_OI, Int8Weight)
    if not packed and (not torch.is_autocast_enabled(device) or weight_OI.dtype == torch.float64):
        return F.linear(x, weight_OI)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if not packed and weight_OI.dtype == dtype == gradient_dtype(weight_OI):
        return F.linear(x, weight_OI)
    x = x.to(dtype)  # outside, so that autograd returns the gradient in x's own dtype
    with torch.autocast(device, enabled=False):
        return _CastLinear.apply(x, weight_OI, dtype)  # type: ignore[return-value]


def add_bias_(y: Tensor, bias_O: Tensor) -> Tensor:
    """``y + bias`` in y's dtype, written over ``y``. Not differentiable: see `bias_gradient`."""
    return y.add_(bias_O.to(y.dtype))


def bias_gradient(dy: Tensor) -> Tensor:
    """The gradient of a bias, summed over tokens in float32 (float64): a sum in bfloat16 would stop growing after some hundred tokens."""
    return dy.flatten(0, -2).sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, bias_O: Tensor) -> Tensor:
        ctx.gradient_dtype = gradient_dtype(bias_O)
        ctx.mark_dirty(y)
        return add_bias_(y, bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], bias_gradient(grads[0]).to(ctx.gradient_dtype)


class _NewSum(torch.autograd.Function):
    """`_AddBias` that leaves ``y`` alone: a compiler takes no function that writes over its input, and makes one pass of it anyway."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias_O: Tensor) -> Tensor:
        ctx.gradient_dtype = gradient_dtype(bias_O)
        return y + bias_O.to(y.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], bias_gradient(grads[0]).to(ctx.gradient_dtype)


class Linear(nn.Linear):
    """``nn.Linear`` that runs `linear`, without a bias unless asked for one, which begins at zero."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)

    def init_parameter(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """Zeros for a bias; matrices by the model's default rule."""
        return torch.zeros(shape) if name == "bias" else None

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]"""
        y = linear(input, self.weight)
        if self.bias is None:
            return y
        add = _NewSum if torch.compiler.is_compiling() else _AddBias
        return add.apply(y, self.bias)  # type: ignore[return-value]
