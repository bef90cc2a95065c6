"""Chunked parallel form of the gated delta rule, forward and backward written out.

The recurrence (Gated DeltaNet, arXiv 2412.06464, eq. 10), per head, S in R^{K x V}:

    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T        o_t = S_t^T q_t

In a chunk of C tokens with g_t = sum of log a up to t, G_ti = exp(g_t - g_i) for i <= t (0 across a document start):

    (I + L) U = diag(b) V - diag(b e^g) K S_0,   L_ti = b_t G_ti k_t.k_i (i < t)          the WY form
    O = diag(e^g) Q S_0 + (Q K^T o G) U          S_C = e^{g_C} S_0 + (diag(e^{g_C - g}) K)^T U

All products are batched over chunks; only ``U_n = U0_n - W_n S_n`` and ``S_{n+1} = d_n S_n + K_n^T U_n`` run in order.
The backward is by hand: the recurrence run in reverse for (dS, dU), then batched products, no autograd node per chunk.

Legend: N chunk, G row x head, C token in chunk, K key, V value, W columns of the state (V, or V + K with the identity
appended, which makes the same call return a range's transition matrix and the read-out of its incoming state).
Try alone: ``pytest tests/models/memory/test_delta_rule.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.memory.chunks import Decays, bmm, running_sum
from models.memory.lanes import Switches
from models.repeat import repeated

_BASE = 16
"""Diagonal blocks up to this size are inverted by substitution; larger ones are composed from halves."""


def invert_unit_lower(lower_NGCC: Tensor) -> Tensor:
    """(I + strictly lower)^-1 for a batch of matrices.

    Substitution on small diagonal blocks, then [[A, 0], [X, B]]^-1 = [[A', 0], [-B' X A', B']]. A Neumann series would
    need only products but loses all digits in fp32 when keys repeat (entries of L^32 reach 1e18).
    """
    *batch, size, _ = lower_NGCC.shape
    if size <= _BASE or size % 2:
        eye = torch.eye(size, dtype=lower_NGCC.dtype, device=lower_NGCC.device).expand_as(lower_NGCC)
        return torch.linalg.solve_triangular(lower_NGCC, eye, upper=False, unitriangular=True)
    half = size // 2
    # Both diagonal blocks in one batch: [..., 2, half, half]
    blocks = torch.stack([lower_NGCC[..., :half, :half], lower_NGCC[..., half:, half:]], dim=-3)
    first, second = invert_unit_lower(blocks).unbind(-3)
    inverse = lower_NGCC.new_zeros(*batch, size, size)
    inverse[..., :half, :half] = first
    inverse[..., half:, half:] = second
    inverse[..., half:, :half] = -(second @ (lower_NGCC[..., half:, :half] @ first))
    return inverse


class _GatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_NGCK: Tensor,
        k_NGCK: Tensor,
        v_NGCV: Tensor,
        beta_NGC: Tensor,
        log_decay_NGC: Tensor,
        state_GKW: Tensor,
        segment_NBC: Tensor | None,
        switches: Switches | None,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(q_NGCK.device.type, enabled=False):
            g_NGC = running_sum(log_decay_NGC, segment_NBC)
            decay = Decays(g_NGC, segment_NBC)
            lower = bmm(k_NGCK, k_NGCK.mT).mul_(decay.pair_NGCC).mul_(beta_NGC.unsqueeze(-1)).tril_(-1)
            inverse_NGCC = invert_unit_lower(lower)
            w_NGCK = bmm(inverse_NGCC, k_NGCK * (beta_NGC * decay.from_start_NGC).unsqueeze(-1))
            u_NGCW = _values(inverse_NGCC, v_NGCV * beta_NGC.unsqueeze(-1), state_GKW.shape[-1])
            scanned = w_NGCK, k_NGCK * decay.to_end_NGC.unsqueeze(-1), decay.whole_NG11, u_NGCW, state_GKW
            if switches is None:
                s_NGKW = _scan(*scanned)
                final_GKW = s_NGKW[-1].clone()
            else:
                s_NGKW, final_GKW = switches.scan(*scanned)
            del scanned
            read_NGCC = bmm(q_NGCK, k_NGCK.mT).mul_(decay.pair_NGCC)
            o_NGCW = bmm(read_NGCC, u_NGCW)
            o_NGCW.flatten(0, 1).baddbmm_((q_NGCK * decay.from_start_NGC.unsqueeze(-1)).flatten(0, 1), s_NGKW[:-1].flatten(0, 1))
        ctx.save_for_backward(q_NGCK, k_NGCK, v_NGCV, beta_NGC, g_NGC, segment_NBC, inverse_NGCC, w_NGCK, u_NGCW, s_NGKW)
        ctx.switches = switches
        return o_NGCW, final_GKW

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        do_NGCW, dfinal_GKW = grads
        q, k, v, beta, g, segment, inverse, w, u, s = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            decay = Decays(g, segment)
            start, end = decay.from_start_NGC.unsqueeze(-1), decay.to_end_NGC.unsqueeze(-1)
            q_start = q * start
            read = bmm(q, k.mT).mul_(decay.pair_NGCC)
            gram = bmm(k, k.mT).mul_(decay.pair_NGCC).tril_(-1)  # L without beta
            du = bmm(read.mT, do_NGCW)
            scanned = w, k * end, decay.whole_NG11, du, bmm(q_start.mT, do_NGCW), dfinal_GKW
            if ctx.switches is None:
                ds = _scan_reverse(*scanned)
                dstate_GKW = ds[0]
            else:
                ds, dstate_GKW = ctx.switches.scan_reverse(*scanned)
            del scanned

            # Through the read-out: O = diag(start) Q S + read U
            dq_start = bmm(do_NGCW, s[:-1].mT)
            dread = bmm(do_NGCW, u.mT)
            # Through the state update: S' = whole S + (end K)^T U
            dk_end = bmm(u, ds[1:].mT)
            # Through the solve: with F = T^T dU, dL = -F U^T, d(beta V) = F, d(beta start K) = -F S^T
            f = bmm(inverse.mT, du)
            dlower = bmm(f, u.mT).neg_().tril_(-1)
            dk_start = bmm(f, s[:-1].mT).neg_()
            dvalue = f[..., : v.shape[-1]]

            dbeta = (dvalue * v).sum(-1) + (dlower * gram).sum(-1)
            from_k = (dk_start * k).sum(-1)
            dbeta += from_k * decay.from_start_NGC
            dstart = (dq_start * q).sum(-1) + from_k * beta
            dstart[..., -1] += (ds[1:] * s[:-1]).sum((-1, -2))
            dend = (dk_end * k).sum(-1) * decay.to_end_NGC

            dlower *= beta.unsqueeze(-1)  # now the gradient of gram
            dpair = (dlower * gram).addcmul_(dread, read)
            dg = dpair.sum(-1) - dpair.sum(-2) + dstart * decay.from_start_NGC - dend
            dg[..., -1] += dend.sum(-1)

            dread *= decay.pair_NGCC
            dlower *= decay.pair_NGCC
            dq = dq_start.mul_(start)
            dq.flatten(0, 1).baddbmm_(dread.flatten(0, 1), k.flatten(0, 1))
            dk = dk_end.mul_(end).addcmul_(dk_start, (beta * decay.from_start_NGC).unsqueeze(-1))
            dk.flatten(0, 1).baddbmm_(dread.mT.flatten(0, 1), q.flatten(0, 1))
            dk.flatten(0, 1).baddbmm_((dlower + dlower.mT).flatten(0, 1), k.flatten(0, 1))
            return dq, dk, dvalue * beta.unsqueeze(-1), dbeta, running_sum(dg, segment, reverse=True), dstate_GKW, None, None


def _values(inverse_NGCC: Tensor, value_NGCV: Tensor, width: int) -> Tensor:
    """U0 = T (beta V), zero in the columns that only carry the incoming state."""
    solved = bmm(inverse_NGCC, value_NGCV)
    extra = width - solved.shape[-1]
    return torch.nn.functional.pad(solved, (0, extra)) if extra else solved


def _scan(w_NGCK: Tensor, k_end_NGCK: Tensor, whole_NG11: Tensor, u_NGCW: Tensor, state_GKW: Tensor) -> Tensor:
    """Run the chunks in order; turns U0 into U in place and returns the state before every chunk and after the last."""
    N, G, _, K = w_NGCK.shape
    s = u_NGCW.new_empty(N + 1, G, K, u_NGCW.shape[-1])
    s[0] = state_GKW
    k_T = k_end_NGCK.mT
    for n in repeated(N, s):
        u_NGCW[n].baddbmm_(w_NGCK[n], s[n], alpha=-1)
        torch.mul(s[n], whole_NG11[n], out=s[n + 1])
        s[n + 1].baddbmm_(k_T[n], u_NGCW[n])
    return s


def _scan_reverse(
    w_NGCK: Tensor, k_end_NGCK: Tensor, whole_NG11: Tensor, du_NGCW: Tensor, ds_read_NGKW: Tensor, dfinal_GKW: Tensor
) -> Tensor:
    """Gradients of the states, last to first; completes dU in place. ``ds_read`` holds what the outputs send to each state."""
    N = len(w_NGCK)
    ds = torch.cat([ds_read_NGKW, dfinal_GKW.unsqueeze(0)])
    w_T = w_NGCK.mT
    for turn in repeated(N, ds):
        n = N - 1 - turn
        du_NGCW[n].baddbmm_(k_end_NGCK[n], ds[n + 1])
        ds[n].addcmul_(ds[n + 1], whole_NG11[n])
        ds[n].baddbmm_(w_T[n], du_NGCW[n], alpha=-1)
    return ds


def gated_delta_rule(
    q_NGCK: Tensor,
    k_NGCK: Tensor,
    v_NGCV: Tensor,
    beta_NGC: Tensor,
    log_decay_NGC: Tensor,
    state_GKW: Tensor,
    segment_NBC: Tensor | None = None,
    switches: Switches | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs o_NGCW and final state of the gated delta rule over N chunks in order.

    All tensors share one dtype (float32 or float64). ``beta`` and ``log_decay`` are 0 and ``k``, ``v`` are 0 at padding,
    which leaves the state as it is. ``state`` may have more columns W than V; the extra ones receive no values.
    ``segment`` (integers, nondecreasing along C) counts the document starts in the chunk up to and including each
    token: nothing crosses from one number to the next, and the incoming state reaches only number 0.
    ``switches``: chunks are lanes of several memories (`models.memory.lanes`), whose states ``state`` holds.
    """
    return _GatedDeltaRule.apply(q_NGCK, k_NGCK, v_NGCV, beta_NGC, log_decay_NGC, state_GKW, segment_NBC, switches)  # type: ignore[return-value]
