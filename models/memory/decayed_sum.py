"""Chunked parallel form of linear attention with one decay per head (Mamba-2's SSD), forward and backward written out.

The recurrence (arXiv 2405.21060, section 6), per head, S in R^{K x V}, keys and queries shared by the heads of a group:

    S_t = a_t S_{t-1} + b_t k_t v_t^T        o_t = S_t^T q_t

In a chunk with g_t = sum of log a up to t, G_ti = exp(g_t - g_i) for i <= t (0 across a document start), and U = diag(b) V:

    O = diag(e^g) Q S_0 + (Q K^T o G) U      S_C = e^{g_C} S_0 + K^T diag(e^{g_C - g}) U

All products are batched over chunks; only S_{n+1} = d_n S_n + U_n runs in order, elementwise. Without queries only the last state
is made: a shard's summary, before it is known what comes in.

Legend: N chunk, B row, C token in chunk, K key, V value, Q row x group of heads, J heads of a group, G = Q*J row x head.
Try alone: ``pytest tests/models/memory/test_decayed_sum.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.memory.chunks import Decays, bmm, running_sum, scan, scan_reverse


def _per_head(x_NQCK: Tensor, heads: int) -> Tensor:
    """Keys or queries of a group for each of its heads, [N, G, C, K]; a view where a group is one head."""
    J = heads // x_NQCK.shape[1]
    return x_NQCK if J == 1 else x_NQCK.unsqueeze(2).expand(-1, -1, J, -1, -1).flatten(1, 2)


def _per_group(x_NGCK: Tensor, groups: int) -> Tensor:
    """The sum over the heads of each group, [N, Q, C, K]."""
    return x_NGCK if x_NGCK.shape[1] == groups else x_NGCK.unflatten(1, (groups, -1)).sum(2)


def _of_pairs(gram_NQCC: Tensor, decay: Decays) -> Tensor:
    """Scores times decay, per head: [N, G, C, C]; overwrites nothing."""
    pair = decay.pair_NGCC
    return (pair.unflatten(1, (gram_NQCC.shape[1], -1)) * gram_NQCC.unsqueeze(2)).flatten(1, 2)


class _DecayedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_NQCK: Tensor | None,
        k_NQCK: Tensor,
        v_NGCV: Tensor,
        beta_NGC: Tensor,
        log_decay_NGC: Tensor,
        state_GKV: Tensor,
        segment_NBC: Tensor | None,
    ) -> tuple[Tensor | None, Tensor]:
        with torch.autocast(k_NQCK.device.type, enabled=False):
            heads = v_NGCV.shape[1]
            g_NGC = running_sum(log_decay_NGC, segment_NBC)
            decay = Decays(g_NGC, segment_NBC)
            u_NGCV = v_NGCV * beta_NGC.unsqueeze(-1)
            end_NGCV = u_NGCV * decay.to_end_NGC.unsqueeze(-1)
            s_NGKV = scan(bmm(_per_head(k_NQCK, heads).mT, end_NGCV), decay.whole_NG11, state_GKV)
            del end_NGCV
            o_NGCV = None
            if q_NQCK is not None:
                o_NGCV = bmm(_of_pairs(bmm(q_NQCK, k_NQCK.mT), decay), u_NGCV)
                q_start = _per_head(q_NQCK, heads) * decay.from_start_NGC.unsqueeze(-1)
                o_NGCV.flatten(0, 1).baddbmm_(q_start.flatten(0, 1), s_NGKV[:-1].flatten(0, 1))
        ctx.save_for_backward(q_NQCK, k_NQCK, v_NGCV, beta_NGC, g_NGC, segment_NBC, s_NGKV)
        return o_NGCV, s_NGKV[-1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        do_NGCV, dfinal_GKV = grads
        q, k, v, beta, g, segment, s = ctx.saved_tensors
        groups, heads = k.shape[1], v.shape[1]
        with torch.autocast(k.device.type, enabled=False):
            decay = Decays(g, segment)
            end = decay.to_end_NGC.unsqueeze(-1)
            k_heads, u = _per_head(k, heads), v * beta.unsqueeze(-1)
            dq, dg = None, torch.zeros_like(g)
            if q is None:
                ds = scan_reverse(torch.zeros_like(s[:-1]), decay.whole_NG11, dfinal_GKV)
                du = bmm(k_heads, ds[1:]) * end
                dk_NGCK = bmm(u * end, ds[1:].mT)
            else:
                do_start = do_NGCV * decay.from_start_NGC.unsqueeze(-1)
                q_heads = _per_head(q, heads)
                ds = scan_reverse(bmm(q_heads.mT, do_start), decay.whole_NG11, dfinal_GKV)
                dq_NGCK = bmm(do_start, s[:-1].mT)
                dg += (dq_NGCK * q_heads).sum(-1)
                gram = bmm(q, k.mT)
                pairs = _of_pairs(gram, decay)
                du = bmm(k_heads, ds[1:]).mul_(end)
                du.flatten(0, 1).baddbmm_(pairs.mT.flatten(0, 1), do_NGCV.flatten(0, 1))
                dpairs = bmm(do_NGCV, u.mT)
                through = dpairs * pairs
                dg += through.sum(-1) - through.sum(-2)
                dgram = _per_group(dpairs.mul_(decay.pair_NGCC), groups)
                dk_NGCK = bmm(u * end, ds[1:].mT)
                dq = _per_group(dq_NGCK, groups) + bmm(dgram, k)
            dend = (dk_NGCK * k_heads).sum(-1)  # through the decay from a token to the end of its chunk
            dg -= dend
            dg[..., -1] += dend.sum(-1) + (ds[1:] * s[:-1]).sum((-1, -2)) * decay.from_start_NGC[..., -1]
            dk = _per_group(dk_NGCK, groups)
            if q is not None:
                dk = dk + bmm(dgram.mT, q)
            dlog = running_sum(dg, segment, reverse=True)
            return dq, dk, du * beta.unsqueeze(-1), (du * v).sum(-1), dlog, ds[0], None


def decayed_sum(
    q_NQCK: Tensor | None,
    k_NQCK: Tensor,
    v_NGCV: Tensor,
    beta_NGC: Tensor,
    log_decay_NGC: Tensor,
    state_GKV: Tensor,
    segment_NBC: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Outputs o_NGCV (None without queries) and the final state over N chunks in order.

    All tensors share one dtype (float32 or float64). ``beta`` and ``log_decay`` are 0 and ``k``, ``v`` are 0 at padding, which leaves
    the state as it is. ``segment`` as for `models.memory.delta_rule.gated_delta_rule`.
    """
    return _DecayedSum.apply(q_NQCK, k_NQCK, v_NGCV, beta_NGC, log_decay_NGC, state_GKV, segment_NBC)  # type: ignore[return-value]
