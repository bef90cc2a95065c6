"""From a projection to the chunks of a recurrence: causal depthwise convolution, SiLU, l2 norm and layout in one step.

Written as one autograd function so that only the projection and the result stay alive for the backward pass; what lies
between is recomputed. Sums run in float32 (float64 for float64 inputs) whatever the projection's dtype.

Legend: B row, T token, C channel, n = kernel - 1 tokens before the range, N chunk, G row x head, c token in chunk, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.memory.documents import DocumentPlan

_NORM_EPS = 1e-6


def to_chunks(x_BTHD: Tensor, chunk: int) -> Tensor:
    """[B, T, H, D] -> [N, B*H, chunk, D], the last chunk filled up with zeros."""
    B, T, H, D = x_BTHD.shape
    N, whole = -(-T // chunk), T // chunk
    out = x_BTHD.new_empty(N, B, H, chunk, D)
    view = out.permute(1, 0, 3, 2, 4)  # [B, N, chunk, H, D]
    view[:, :whole] = x_BTHD[:, : whole * chunk].unflatten(1, (whole, chunk))
    if T % chunk:
        view[:, whole, : T - whole * chunk] = x_BTHD[:, whole * chunk :]
        view[:, whole, T - whole * chunk :] = 0
    return out.flatten(1, 2)


def from_chunks(x_NGcD: Tensor, batch_size: int, tokens: int) -> Tensor:
    """[N, B*H, chunk, D] -> [B, T, H, D], the filling dropped."""
    N, G, chunk, D = x_NGcD.shape
    x = x_NGcD.view(N, batch_size, G // batch_size, chunk, D).permute(1, 0, 3, 2, 4)
    return x.reshape(batch_size, N * chunk, G // batch_size, D)[:, :tokens]


def _convolve(x_BTC: Tensor, before_BnC: Tensor, weight_CK: Tensor, plan: DocumentPlan) -> Tensor:
    """pre[t] = sum_j weight[:, n - j] x[t - j], taps before a document start left out."""
    T, n = x_BTC.shape[1], weight_CK.shape[1] - 1
    dtype = weight_CK.dtype
    out = x_BTC * weight_CK[:, n]
    for j in range(1, n + 1):
        m = min(j, T)
        out[:, j:].addcmul_(x_BTC[:, : T - m].to(dtype), weight_CK[:, n - j])
        out[:, :m].addcmul_(before_BnC[:, n - j : n - j + m].to(dtype), weight_CK[:, n - j])
    if plan.cut_rows_R is not None:
        out[plan.cut_rows_R, plan.cut_tokens_R] = sum(  # type: ignore[assignment]
            x * weight_CK[:, n - j] for j, x in _cut_taps(x_BTC, n, plan)
        )
    return out


def _cut_taps(x_BTC: Tensor, n: int, plan: DocumentPlan) -> list[tuple[int, Tensor]]:
    """(j, x[t - j]) of the tokens next to a document start, zero (not scaled to zero) where t - j is before it."""
    assert plan.cut_rows_R is not None and plan.cut_tokens_R is not None and plan.cut_ages_R is not None
    taps = []
    for j in range(n + 1):
        x = x_BTC[plan.cut_rows_R, (plan.cut_tokens_R - j).clamp_(min=0)]
        taps.append((j, x.masked_fill_((plan.cut_ages_R < j).unsqueeze(-1), 0)))
    return taps


def _convolve_backward(
    dpre_BTC: Tensor, x_BTC: Tensor, before_BnC: Tensor, weight_CK: Tensor, plan: DocumentPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, before and weight; overwrites ``dpre``."""
    T, n = x_BTC.shape[1], weight_CK.shape[1] - 1
    dtype = weight_CK.dtype
    dcut = None
    if plan.cut_rows_R is not None:
        dcut = dpre_BTC[plan.cut_rows_R, plan.cut_tokens_R]
        dpre_BTC[plan.cut_rows_R, plan.cut_tokens_R] = 0
    dx = dpre_BTC * weight_CK[:, n]
    dbefore = torch.zeros_like(before_BnC, dtype=dtype)
    dweight = torch.empty_like(weight_CK)
    x, before = x_BTC.to(dtype), before_BnC.to(dtype)
    dweight[:, n] = (dpre_BTC * x).sum((0, 1))
    for j in range(1, n + 1):
        m = min(j, T)
        dx[:, : T - m].addcmul_(dpre_BTC[:, m:], weight_CK[:, n - j])
        dbefore[:, n - j : n - j + m].addcmul_(dpre_BTC[:, :m], weight_CK[:, n - j])
        inside = (dpre_BTC[:, m:] * x[:, : T - m]).sum((0, 1))
        dweight[:, n - j] = inside + (dpre_BTC[:, :m] * before[:, n - j : n - j + m]).sum((0, 1))
    if dcut is not None:
        for j, tap in _cut_taps(x, n, plan):
            valid = (plan.cut_ages_R >= j).unsqueeze(-1)  # type: ignore[operator]
            index = (plan.cut_rows_R, (plan.cut_tokens_R - j).clamp_(min=0))  # type: ignore[operator]
            dx.index_put_(index, (dcut * weight_CK[:, n - j]).masked_fill_(~valid, 0), accumulate=True)
            dweight[:, n - j] += (dcut * tap).sum(0)
    return dx, dbefore, dweight


class _ConvSiluChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTC: Tensor,
        before_BnC: Tensor,
        weight_CK: Tensor,
        plan: DocumentPlan,
        n_heads: int,
        chunk: int,
        norm_scale: float,
    ) -> Tensor:
        active_BTC = torch.nn.functional.silu(_convolve(x_BTC, before_BnC, weight_CK, plan), inplace=True)
        out_NGcD = to_chunks(active_BTC.unflatten(-1, (n_heads, -1)), chunk)
        rnorm_NGc1 = None
        if norm_scale:
            rnorm_NGc1 = torch.linalg.vector_norm(out_NGcD, dim=-1, keepdim=True).square_().add_(_NORM_EPS).rsqrt_()
            out_NGcD *= rnorm_NGc1 * norm_scale
        ctx.save_for_backward(x_BTC, before_BnC, weight_CK, rnorm_NGc1, out_NGcD if norm_scale else None)
        ctx.plan, ctx.norm_scale, ctx.n_heads = plan, norm_scale, n_heads
        return out_NGcD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BTC, before_BnC, weight_CK, rnorm_NGc1, out_NGcD = ctx.saved_tensors
        (grad_NGcD,) = grads
        if ctx.norm_scale:  # out = s x r, r = (x.x + eps)^-1/2: dx = s r grad - out (out . grad) r / s
            along = (out_NGcD * grad_NGcD).sum(-1, keepdim=True)
            grad_NGcD = (grad_NGcD * ctx.norm_scale).addcmul_(out_NGcD, along, value=-1 / ctx.norm_scale).mul_(rnorm_NGc1)
        dactive = from_chunks(grad_NGcD, x_BTC.shape[0], x_BTC.shape[1]).flatten(2)
        pre = _convolve(x_BTC, before_BnC, weight_CK, ctx.plan)
        dpre = torch.ops.aten.silu_backward(dactive, pre)
        dx, dbefore, dweight = _convolve_backward(dpre, x_BTC, before_BnC, weight_CK, ctx.plan)
        return dx.to(x_BTC.dtype), dbefore.to(before_BnC.dtype), dweight, None, None, None, None


def conv_silu_chunks(
    x_BTC: Tensor,
    before_BnC: Tensor,
    weight_CK: Tensor,
    plan: DocumentPlan,
    n_heads: int,
    chunk: int,
    norm_scale: float = 0.0,
) -> Tensor:
    """silu(causal depthwise conv(x)) per head and chunk [N, B*H, chunk, D] in the dtype of ``weight`` (float32 or float64).

    ``before`` holds the n = K - 1 tokens before the range; ``plan`` the document starts in it. With ``norm_scale`` != 0
    each head vector is divided by its l2 norm and multiplied by ``norm_scale``. Filling of the last chunk is zero.
    """
    if plan.hidden_Bn1 is not None:
        before_BnC = before_BnC.masked_fill(plan.hidden_Bn1, 0)
    with torch.autocast(x_BTC.device.type, enabled=False):
        return _ConvSiluChunks.apply(x_BTC, before_BnC, weight_CK, plan, n_heads, chunk, norm_scale)  # type: ignore[return-value]


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o_NGcD: Tensor, gate_BTC: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        B, T, _ = gate_BTC.shape
        rnorm_NGc1 = _rms(o_NGcD, eps)
        out = from_chunks(o_NGcD * rnorm_NGc1, B, T) * weight_D
        out = out.flatten(2).mul_(torch.nn.functional.silu(gate_BTC.to(weight_D.dtype)))
        ctx.save_for_backward(o_NGcD, gate_BTC, weight_D, rnorm_NGc1)
        return out.to(gate_BTC.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        o_NGcD, gate_BTC, weight_D, rnorm_NGc1 = ctx.saved_tensors
        B, T, _ = gate_BTC.shape
        _, G, chunk, D = o_NGcD.shape
        dtype = weight_D.dtype
        dout, gate = grads[0].to(dtype), gate_BTC.to(dtype)
        normed_NGcD = o_NGcD * rnorm_NGc1
        normed_BTHD = from_chunks(normed_NGcD, B, T)
        active = torch.nn.functional.silu(gate).unflatten(-1, (G // B, D))
        through = dout.unflatten(-1, (G // B, D)) * normed_BTHD  # [B, T, H, D]
        dgate = torch.ops.aten.silu_backward((through * weight_D).flatten(2), gate)
        dweight = through.mul_(active).sum((0, 1, 2))
        dnormed_NGcD = to_chunks(active.mul_(dout.unflatten(-1, (G // B, D))).mul_(weight_D), chunk)
        along = (dnormed_NGcD * normed_NGcD).mean(-1, keepdim=True)
        do = dnormed_NGcD.addcmul_(normed_NGcD, along, value=-1).mul_(rnorm_NGc1)
        return do, dgate.to(gate_BTC.dtype), dweight, None


def _rms(x: Tensor, eps: float) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def gated_norm(o_NGcD: Tensor, gate_BTC: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm of every head's output times silu(gate), back in token order [B, T, H*D] and in the gate's dtype."""
    with torch.autocast(o_NGcD.device.type, enabled=False):
        return _GatedNorm.apply(o_NGcD, gate_BTC, weight_D, eps)  # type: ignore[return-value]
