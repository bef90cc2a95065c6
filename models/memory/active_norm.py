"""RMSNorm of an activation, in one autograd function that keeps its inputs and one statistic per token.

Legend: B row, T token, C channel; groups of channels may stand in a dim of their own before C.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_silu = torch.nn.functional.silu


class _ActiveNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o_BTC: Tensor, gate_BTC: Tensor | None, weight_C: Tensor, eps: float) -> Tensor:
        active = _active(o_BTC, gate_BTC)
        rnorm = torch.linalg.vector_norm(active, dim=-1, keepdim=True).square_().div_(active.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(o_BTC, gate_BTC, weight_C, rnorm)
        return active.mul_(rnorm).mul_(weight_C)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        o, gate, weight, rnorm = ctx.saved_tensors
        (dout,) = grads
        active = _active(o, gate)
        normed = active * rnorm
        dweight = (dout * normed).sum((0, 1))
        dnormed = dout * weight
        along = (dnormed * normed).mean(-1, keepdim=True)
        dactive = dnormed.addcmul_(normed, along, value=-1).mul_(rnorm)
        if gate is None:
            return torch.ops.aten.silu_backward(dactive, o), None, dweight, None
        wide = gate.to(o.dtype)
        dgate = torch.ops.aten.silu_backward(dactive * o, wide)
        return dactive.mul_(_silu(wide)), dgate.to(gate.dtype), dweight, None


def _active(o_BTC: Tensor, gate_BTC: Tensor | None) -> Tensor:
    return _silu(o_BTC) if gate_BTC is None else o_BTC * _silu(gate_BTC.to(o_BTC.dtype))


def active_norm(o_BTC: Tensor, gate_BTC: Tensor | None, weight_C: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dim of o * silu(gate), or of silu(o) without a gate; in the dtype of ``o``, which is ``weight``'s."""
    with torch.autocast(o_BTC.device.type, enabled=False):
        return _ActiveNorm.apply(o_BTC, gate_BTC, weight_C, eps)  # type: ignore[return-value]
