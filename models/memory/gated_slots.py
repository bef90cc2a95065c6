"""Chunked parallel form of gated slot attention, forward and backward written out.

The recurrence (arXiv 2409.07146, section 3), per head, M slots with keys R^K and values R^V, S = [slot keys | slot values] in R^{M x W}:

    S_t = diag(a_t) S_{t-1} + (1 - a_t) [k_t | v_t]^T        p_t = softmax(S_t^K q_t)        o_t = (S_t^V)^T p_t

Both halves decay alike and neither depends on what is read, so they are one state with one decay per slot. In a chunk with h_t = sum of
log a up to t (of the token's own document), e_t = e^{h_t}, s'_t = (1 - a_t) e^{-h_t} and the causal mask o:

    Y = Q S_0^K^T + (Q K^T o) s'      P = softmax(e Y)      P' = P e      O = P' S_0^V + (P' s'^T o) V

e^{-h} must stay within float32: a log decay is at least ``MIN_LOG_DECAY`` and a chunk has at most ``MAX_CHUNK`` tokens. States before
the chunks are made again in backward: with chunks this short they would be most of what is kept.

Legend: N chunk, B row, G row x head, C token in chunk, K key, V value, W = K + V, M slot.
Try alone: ``pytest tests/models/memory/test_gated_slots.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.memory.chunks import bmm, running_sum, scan, scan_reverse

MAX_CHUNK = 16
MIN_LOG_DECAY = -4.0
"""A slot keeps at least e^-4 of itself per token; e^{4 x 16} leaves float32 ten digits of room for queries and keys."""


class _Chunks:
    """Decays, masks and slots' weights of all chunks."""

    def __init__(self, log_decay_NGCM: Tensor, segment_NBC: Tensor | None) -> None:
        N, G, C, M = log_decay_NGCM.shape
        self.shape, self.segment = (N, G, C, M), segment_NBC
        h_NGMC = self._sum(log_decay_NGCM)
        h_NGCM = h_NGMC.mT
        self.grow_NGCM = h_NGCM.neg().exp_()
        """e^{-h}"""
        self.decay_NGCM = h_NGCM.exp()
        self.to_end_NGCM = (h_NGCM[..., -1:, :] - h_NGCM).exp_()
        self.written_NGCM = -torch.expm1(log_decay_NGCM)
        self.whole_NGM1 = self.decay_NGCM[..., -1, :].unsqueeze(-1).clone()
        self.mask = torch.ones(C, C, dtype=h_NGCM.dtype, device=h_NGCM.device).tril_()
        self.from_start: Tensor | None = None
        if segment_NBC is not None:
            heads = G // segment_NBC.shape[1]
            same = segment_NBC.unsqueeze(-1) == segment_NBC.unsqueeze(-2)
            self.mask = (self.mask * same).repeat_interleave(heads, 1)
            self.from_start = (segment_NBC == 0).to(h_NGCM.dtype).repeat_interleave(heads, 1).unsqueeze(-1)
            last = (segment_NBC == segment_NBC[..., -1:]).repeat_interleave(heads, 1)
            self.to_end_NGCM = self.to_end_NGCM.masked_fill(~last.unsqueeze(-1), 0)
            self.whole_NGM1.masked_fill_((segment_NBC[..., -1] != 0).repeat_interleave(heads, 1)[..., None, None], 0)

    def _sum(self, x_NGCM: Tensor, reverse: bool = False) -> Tensor:
        """Within chunk and document, [N, G, M, C]."""
        N, G, C, M = x_NGCM.shape
        heads_first = x_NGCM.mT.reshape(N, G * M, C)
        return running_sum(heads_first, self.segment, reverse).view(N, G, M, C)

    def log_decay_gradient(self, dh_NGCM: Tensor) -> Tensor:
        """The gradient of log decays from that of their running sums."""
        return self._sum(dh_NGCM, reverse=True).mT

    def seen(self, x_NGCW: Tensor) -> Tensor:
        """``x`` where a token sees the state that came into the chunk, 0 elsewhere."""
        return x_NGCW if self.from_start is None else x_NGCW * self.from_start

    def states(self, kv_NGCW: Tensor, state_GMW: Tensor) -> Tensor:
        """The state before every chunk and after the last."""
        return scan(bmm((self.written_NGCM * self.to_end_NGCM).mT, kv_NGCW), self.whole_NGM1, state_GMW)


class _GatedSlots(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_NGCK: Tensor | None,
        k_NGCK: Tensor,
        v_NGCV: Tensor,
        log_decay_NGCM: Tensor,
        state_GMW: Tensor,
        segment_NBC: Tensor | None,
    ) -> tuple[Tensor | None, Tensor]:
        with torch.autocast(k_NGCK.device.type, enabled=False):
            chunks = _Chunks(log_decay_NGCM, segment_NBC)
            s_NGMW = chunks.states(torch.cat([k_NGCK, v_NGCV], -1), state_GMW)
            o_NGCV = None if q_NGCK is None else _read(chunks, q_NGCK, k_NGCK, v_NGCV, s_NGMW)[0]
        ctx.save_for_backward(q_NGCK, k_NGCK, v_NGCV, log_decay_NGCM, state_GMW, segment_NBC)
        return o_NGCV, s_NGMW[-1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        do_NGCV, dfinal_GMW = grads
        q, k, v, log_decay, state, segment = ctx.saved_tensors
        with torch.autocast(k.device.type, enabled=False):
            chunks = _Chunks(log_decay, segment)
            kv = torch.cat([k, v], -1)
            s = chunks.states(kv, state)
            read = None if q is None else _read_backward(chunks, q, k, v, s, do_NGCV)
            sent = torch.zeros_like(s[:-1]) if read is None else read[-1]
            ds = scan_reverse(sent, chunks.whole_NGM1, dfinal_GMW)
            # Through what a chunk adds to the state, w = (1 - a) e^{h_end - h}, and through the decay of the whole chunk
            written_end = chunks.written_NGCM * chunks.to_end_NGCM
            dkv = bmm(written_end, ds[1:])
            dwritten_end = bmm(kv, ds[1:].mT)
            dend = dwritten_end * written_end
            dwritten = dwritten_end.mul_(chunks.to_end_NGCM)
            dh = -dend
            dh[..., -1, :] += dend.sum(-2) + (ds[1:] * s[:-1]).sum(-1) * chunks.whole_NGM1.squeeze(-1)
            dq, (dk, dv) = None, dkv.split([k.shape[-1], v.shape[-1]], -1)
            if read is not None:
                dq, dk_read, dv_read, dgrown, ddecay, _ = read
                dwritten += dgrown * chunks.grow_NGCM
                dh -= dgrown * chunks.written_NGCM * chunks.grow_NGCM
                dh += ddecay * chunks.decay_NGCM
                dk, dv = dk + dk_read, dv + dv_read
            dlog = chunks.log_decay_gradient(dh) + dwritten * (chunks.written_NGCM - 1)  # written = 1 - e^f
            return dq, dk, dv, dlog, ds[0], None


def _read(chunks: _Chunks, q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """Outputs, and the intermediate results that backward starts from: masked scores, Y, P, P', (P' s'^T o)."""
    K = k.shape[-1]
    grown = chunks.written_NGCM * chunks.grow_NGCM
    scores = bmm(q, k.mT).mul_(chunks.mask)
    y = chunks.seen(bmm(q, s[:-1, ..., :K].mT)) + bmm(scores, grown)
    p = (y * chunks.decay_NGCM).softmax(-1)
    p_decayed = p * chunks.decay_NGCM
    weights = bmm(p_decayed, grown.mT).mul_(chunks.mask)
    o = chunks.seen(bmm(p_decayed, s[:-1, ..., K:])) + bmm(weights, v)
    return o, scores, y, p, p_decayed, weights


def _read_backward(chunks: _Chunks, q: Tensor, k: Tensor, v: Tensor, s: Tensor, do: Tensor) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, s', e, and what goes to the states before the chunks."""
    K = k.shape[-1]
    _, scores, y, p, p_decayed, weights = _read(chunks, q, k, v, s)
    grown = chunks.written_NGCM * chunks.grow_NGCM
    do_seen = chunks.seen(do)
    dweights = bmm(do, v.mT).mul_(chunks.mask)
    dp_decayed = bmm(dweights, grown) + bmm(do_seen, s[:-1, ..., K:].mT)
    dgrown = bmm(dweights.mT, p_decayed)
    dv = bmm(weights.mT, do)
    ddecay = dp_decayed * p
    dp = dp_decayed.mul_(chunks.decay_NGCM)
    dz = p * (dp - (dp * p).sum(-1, keepdim=True))
    ddecay += dz * y
    dy = dz.mul_(chunks.decay_NGCM)
    dy_seen = chunks.seen(dy)
    dscores = bmm(dy, grown.mT).mul_(chunks.mask)
    dgrown += bmm(scores.mT, dy)
    dq = bmm(dscores, k) + bmm(dy_seen, s[:-1, ..., :K])
    dk = bmm(dscores.mT, q)
    sent = torch.cat([bmm(dy_seen.mT, q), bmm(p_decayed.mT, do_seen)], -1)
    return dq, dk, dv, dgrown, ddecay, sent


def gated_slots(
    q_NGCK: Tensor | None,
    k_NGCK: Tensor,
    v_NGCV: Tensor,
    log_decay_NGCM: Tensor,
    state_GMW: Tensor,
    segment_NBC: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Outputs o_NGCV (None without queries) and the final state over N chunks in order.

    All tensors share one dtype (float32 or float64). ``log_decay`` is within [MIN_LOG_DECAY, 0], and 0 at padding, which leaves the
    state as it is. ``segment`` as for `models.memory.delta_rule.gated_delta_rule`. Raises ValueError for chunks that are too long.
    """
    if k_NGCK.shape[2] > MAX_CHUNK:
        raise ValueError(f"chunks of {k_NGCK.shape[2]} tokens: gated slots keep float32's range up to {MAX_CHUNK}")
    return _GatedSlots.apply(q_NGCK, k_NGCK, v_NGCV, log_decay_NGCM, state_GMW, segment_NBC)  # type: ignore[return-value]
