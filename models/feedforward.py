"""RMSNorm and SwiGLU: the token-wise parts of a block, with backwards that keep as little as possible.

Plain autograd keeps four tensors of the feed-forward width and recomputes nothing; here two are kept, and the norm keeps
its input (the residual stream, alive anyway) and one number per token.

Legend: B row, T token, C channel, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.linear import Linear
from models.tokens import ALL_TOKENS, Tokens


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that products with ``x`` run in: autocast's when it is on (never for float64), else the tensor's own."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x_BTC: Tensor, weight_C: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``x / rms(x) * weight`` in ``dtype`` and 1 / rms per token [B, T, 1], wide. Not differentiable: see `rms_norm_backward`."""
    x = _wide(x_BTC)
    rnorm_BT1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * rnorm_BT1).mul_(weight_C).to(dtype), rnorm_BT1


def rms_norm_backward(grad_BTC: Tensor, x_BTC: Tensor, weight_C: Tensor, rnorm_BT1: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (in its dtype) and of the weight (wide, summed over tokens)."""
    grad = _wide(grad_BTC)
    normed = _wide(x_BTC) * rnorm_BT1
    dweight = (grad * normed).flatten(0, -2).sum(0)
    grad = grad * weight_C
    along = (grad * normed).mean(-1, keepdim=True)
    return grad.addcmul_(normed, along, value=-1).mul_(rnorm_BT1).to(x_BTC.dtype), dweight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTC: Tensor, weight_C: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
        out, rnorm_BT1 = rms_norm(x_BTC, weight_C, eps, out_dtype)
        ctx.save_for_backward(x_BTC, weight_C, rnorm_BT1)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BTC, weight_C, rnorm_BT1 = ctx.saved_tensors
        dx_BTC, dweight_C = rms_norm_backward(grads[0], x_BTC, weight_C, rnorm_BT1)
        return dx_BTC, dweight_C.to(weight_C.dtype), None, None


class RMSNorm(nn.Module):
    """x / rms(x) * weight with statistics in float32 (float64). Under autocast the output has the autocast dtype, so that
    the projections that read it share one low-precision copy instead of casting once each."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def init_parameter(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Ones."""
        return torch.ones(shape)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Same shape."""
        dtype = compute_dtype(x_BTC)
        with torch.autocast(x_BTC.device.type, enabled=False):
            return _RMSNorm.apply(x_BTC, self.weight, self.eps, dtype)  # type: ignore[return-value]


def gated_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. Not differentiable: see `gated_product_backward`."""
    return torch.nn.functional.silu(gate).mul_(up)


def gated_product_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    dup = torch.nn.functional.silu(gate).mul_(grad)
    return torch.ops.aten.silu_backward(grad * up, gate), dup


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gated_product(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return gated_product_backward(grads[0], *ctx.saved_tensors)


class SwiGLU(nn.Module):
    """w_down(silu(w_gate x) * w_up x), token-wise."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.w_gate = Linear(d_model, d_ff)
        self.w_up = Linear(d_model, d_ff)
        self.w_down = Linear(d_ff, d_model)
        self.tokens: Tokens = ALL_TOKENS

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Same shape; the inner width F exists for all given tokens at once (memory_mgmt/tiles bounds them)."""
        x_BTC = self.tokens.gathered(x_BTC)
        return self.tokens.summed(self.w_down(_GatedProduct.apply(self.w_gate(x_BTC), self.w_up(x_BTC))))
