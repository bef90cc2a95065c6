"""Blocks by plain matrix products, on any device and in any dtype, a bounded number of query rows at a time.

Computed in float32 (float64 for float64), or in float64 whatever the inputs: the slow truth that others can be replaced by to see
whether a kernel is at fault.

Legend: B batch, H query heads, G key/value heads, R query heads of one key/value head, T queries, S keys, D head size.
"""

from __future__ import annotations

import torch

from models.block import Block, BlockMask, Implementation, MaskKind, additive_mask

_INF = float("inf")
_CHUNK_SCORES = 1 << 24
"""Scores held at a time, per pass over query rows."""


def _refuses_nothing(block: Block) -> str | None:
    return None


def _plain_scores(q_BGRtD, k_BGSD, mask, rows, scale):
    """Scores of the query rows ``rows`` with their part of the mask."""
    scores_BGRtS = torch.einsum("bgrtd,bgsd->bgrts", q_BGRtD, k_BGSD) * scale
    if mask.kind is MaskKind.NONE:
        return scores_BGRtS
    if mask.kind is not MaskKind.DENSE:  # the band of row a is that of row 0, shifted by a
        low, high = (-k_BGSD.shape[2], 0) if mask.kind is MaskKind.CAUSAL else (mask.low, mask.high)
        mask = BlockMask.band(low + rows.start, None if high is None else high + rows.start)
    n_rows, n_keys = scores_BGRtS.shape[-2:]
    hidden = additive_mask(mask, n_rows, n_keys, scores_BGRtS.dtype, scores_BGRtS.device)
    assert hidden is not None
    hidden = hidden.reshape((1,) * (4 - hidden.ndim) + hidden.shape)
    if mask.kind is MaskKind.DENSE and hidden.shape[2] > 1:
        hidden = hidden[:, :, rows]
    return scores_BGRtS + (hidden.unflatten(1, q_BGRtD.shape[1:3]) if hidden.shape[1] > 1 else hidden.unsqueeze(2))


def _row_slices(q_BHTD, k_BGSD):
    """Slices of query rows that bound the scores held at a time."""
    n_queries = q_BHTD.shape[2]
    step = max(1, _CHUNK_SCORES // max(1, q_BHTD.shape[0] * q_BHTD.shape[1] * k_BGSD.shape[2]))
    return [slice(i, min(i + step, n_queries)) for i in range(0, n_queries, step)]


def _grouped(x_BHT: torch.Tensor, n_kv_heads: int) -> torch.Tensor:
    """[B, H, ...] -> [B, G, R, ...]"""
    return x_BHT.unflatten(1, (n_kv_heads, x_BHT.shape[1] // n_kv_heads))


def _plain(q_BHTD, k_BGSD, v_BGSD, mask, scale, at_least=torch.float32):
    dtype = torch.promote_types(q_BHTD.dtype, at_least)
    q, k, v = _grouped(q_BHTD, k_BGSD.shape[1]).to(dtype), k_BGSD.to(dtype), v_BGSD.to(dtype)
    outs, lses = [], []
    for rows in _row_slices(q_BHTD, k_BGSD):
        scores = _plain_scores(q[:, :, :, rows], k, mask, rows, scale)
        lse = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - lse.masked_fill(lse == -_INF, 0.0).unsqueeze(-1))
        outs.append(torch.einsum("bgrts,bgsd->bgrtd", weights, v))
        lses.append(lse)
    return torch.cat(outs, 3).flatten(1, 2).to(q_BHTD.dtype), torch.cat(lses, 3).flatten(1, 2)


def _plain_backward(dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD, lse_BHT, mask, scale, at_least=torch.float32):
    dtype = torch.promote_types(q_BHTD.dtype, at_least)
    dout, q, out = (_grouped(x, k_BGSD.shape[1]).to(dtype) for x in (dout_BHTD, q_BHTD, out_BHTD))
    k, v, lse = k_BGSD.to(dtype), v_BGSD.to(dtype), _grouped(lse_BHT, k_BGSD.shape[1])
    dqs, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
    for rows in _row_slices(q_BHTD, k_BGSD):
        dout_r, q_r = dout[:, :, :, rows], q[:, :, :, rows]
        weights = torch.exp(_plain_scores(q_r, k, mask, rows, scale) - lse[:, :, :, rows].unsqueeze(-1))
        delta = (dout_r * out[:, :, :, rows]).sum(-1, keepdim=True)
        dscores = weights * (torch.einsum("bgrtd,bgsd->bgrts", dout_r, v) - delta) * scale
        dqs.append(torch.einsum("bgrts,bgsd->bgrtd", dscores, k))
        dk += torch.einsum("bgrts,bgrtd->bgsd", dscores, q_r)
        dv += torch.einsum("bgrts,bgrtd->bgsd", weights, dout_r)
    return torch.cat(dqs, 3).flatten(1, 2).to(q_BHTD.dtype), dk.to(k_BGSD.dtype), dv.to(v_BGSD.dtype)


def _float64(q_BHTD, k_BGSD, v_BGSD, mask, scale):
    out_BHTD, lse_BHT = _plain(q_BHTD, k_BGSD, v_BGSD, mask, scale, torch.float64)
    return out_BHTD, lse_BHT.to(torch.promote_types(q_BHTD.dtype, torch.float32))


def _float64_backward(*args):
    return _plain_backward(*args, at_least=torch.float64)


PLAIN = Implementation("plain", _refuses_nothing, _plain, _plain_backward)
FLOAT64 = Implementation("float64", _refuses_nothing, _float64, _float64_backward)
