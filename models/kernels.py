"""One block of attention: ``(q, k, v, mask) -> (out, lse)`` and its backward, on whatever the device offers.

Blocks are what ring and window attention are made of: their outputs are merged through ``lse``, and the backward takes the
*merged* out and lse, so that each block contributes exactly its part of the gradient. This file picks the implementation
(``explain`` says which and why), and repairs what the kernels return for rows that see no key. It does not split, merge or
communicate (models/attention.py and parallel/ do) and is not differentiable by autograd.

Try alone: ``python -c "import torch; from models.kernels import *; print(explain('cpu', torch.float32, 64, CAUSAL))"``.

Legend: B batch, H query heads, G key/value heads (H a multiple of G), T queries, S keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch

_INF = float("inf")
_CHUNK_SCORES = 1 << 24
"""Scores that the plain implementation holds at a time, per pass over query rows."""


class MaskKind(Enum):
    """Which keys a query of a block sees."""

    NONE = "none"
    CAUSAL = "causal"
    BAND = "band"
    DENSE = "dense"


@dataclass(frozen=True)
class BlockMask:
    """The mask of one block, in local indices: query row a, key column b.

    NONE: everything. CAUSAL: b <= a, square blocks only. BAND: ``low <= b - a`` and, unless high is None, ``b - a <= high``.
    DENSE: ``tensor`` [.., T, S] broadcastable to [B, H, T, S]; boolean (True = visible) or additive (-inf = hidden).
    """

    kind: MaskKind
    low: int = 0
    high: int | None = None
    tensor: torch.Tensor | None = None
    no_empty_rows: bool = False
    """The caller's promise that every query sees a key; saves a pass over a dense mask."""

    @staticmethod
    def band(low: int, high: int | None) -> BlockMask:
        """Key minus query index between low and high (None: no upper limit)."""
        return BlockMask(MaskKind.BAND, low, high)

    @staticmethod
    def dense(tensor: torch.Tensor, no_empty_rows: bool = False) -> BlockMask:
        """A mask given as a tensor."""
        return BlockMask(MaskKind.DENSE, tensor=tensor, no_empty_rows=no_empty_rows)


NONE = BlockMask(MaskKind.NONE)
CAUSAL = BlockMask(MaskKind.CAUSAL)

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Implementation:
    """One way to compute a block."""

    name: str
    refuses: Callable[[str, torch.dtype, int, MaskKind], str | None]
    """(device type, dtype, D, mask kind) -> why it cannot, or None when it can."""
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    """(q, k, v, mask, scale) -> (out, lse)"""
    backward: Callable[..., Gradients]
    """(dout, q, k, v, out, lse, mask, scale) -> (dq, dk, dv)"""


def block_attention(
    q_BHTD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSD: torch.Tensor, mask: BlockMask, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of one block and the log of its normaliser.

    Returns ``out_BHTD`` in q's dtype and contiguous ``lse_BHT`` (natural log; float64 for float64, else float32). A query
    that sees no key gets out 0 and lse -inf, which any merge leaves without effect. ``scale`` defaults to 1/sqrt(D).
    Raises ValueError for shapes or dtypes that do not fit together and for CAUSAL on a block that is not square.
    """
    _check(q_BHTD, k_BGSD, v_BGSD, mask)
    scale = q_BHTD.shape[-1] ** -0.5 if scale is None else scale
    implementation, _ = _select(q_BHTD.device.type, q_BHTD.dtype, q_BHTD.shape[-1], mask.kind)
    out_BHTD, lse_BHT = implementation.forward(*(_rows_contiguous(x) for x in (q_BHTD, k_BGSD, v_BGSD)), mask, scale)
    empty_BHT = _empty_rows(q_BHTD, k_BGSD, mask)
    if empty_BHT is not None:
        out_BHTD = out_BHTD.masked_fill(empty_BHT.unsqueeze(-1), 0.0)
        lse_BHT = lse_BHT.masked_fill(empty_BHT, -_INF)
    return out_BHTD, lse_BHT.contiguous()


def block_attention_backward(
    dout_BHTD: torch.Tensor,
    q_BHTD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    out_BHTD: torch.Tensor,
    lse_BHT: torch.Tensor,
    mask: BlockMask,
    scale: float | None = None,
) -> Gradients:
    """This block's part of ``(dq_BHTD, dk_BGSD, dv_BGSD)``, given the *merged* out and lse over all blocks of the query.

    out and dout have q's dtype. Summed over blocks the parts are the exact gradient, because rowsum(dout * out) and the
    probabilities exp(score - lse) are those of the whole softmax.
    """
    _check(q_BHTD, k_BGSD, v_BGSD, mask)
    scale = q_BHTD.shape[-1] ** -0.5 if scale is None else scale
    implementation, _ = _select(q_BHTD.device.type, q_BHTD.dtype, q_BHTD.shape[-1], mask.kind)
    empty_BHT = _empty_rows(q_BHTD, k_BGSD, mask)
    if empty_BHT is not None:
        # exp(-inf - 0) = 0: hidden rows give nothing; exp(-inf + inf) would be NaN.
        lse_BHT = lse_BHT.masked_fill(empty_BHT, 0.0)
    tensors = [_rows_contiguous(x) for x in (dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD)]
    return implementation.backward(*tensors, lse_BHT.contiguous(), mask, scale)


def block_attention_reference(
    q_BHTD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSD: torch.Tensor, mask: BlockMask, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The readable twin of ``block_attention`` in float64, all scores at once, differentiable by autograd."""
    q, k, v = q_BHTD.double(), k_BGSD.double(), v_BGSD.double()
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores_BHTS = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    hidden = additive_mask(mask, q.shape[2], k.shape[2], torch.float64, q.device)
    if hidden is not None:
        scores_BHTS = scores_BHTS + hidden
    top_BHT1 = scores_BHTS.amax(-1, keepdim=True).detach()
    weights_BHTS = torch.exp(scores_BHTS - top_BHT1.clamp_min(-1e300))
    total_BHT1 = weights_BHTS.sum(-1, keepdim=True)
    out_BHTD = weights_BHTS @ v / total_BHT1.clamp_min(1e-300)
    return out_BHTD, (torch.log(total_BHT1) + top_BHT1).squeeze(-1)


def explain(device_type: str, dtype: torch.dtype, head_dim: int, mask: BlockMask = NONE) -> str:
    """One line: which implementation a block of this kind uses, and why each earlier candidate was passed over."""
    implementation, passed_over = _select(device_type, dtype, head_dim, mask.kind)
    reasons = "".join(f"; not {name}: {why}" for name, why in passed_over)
    return f"{mask.kind.value} block, {dtype}, head size {head_dim} on {device_type}: {implementation.name}{reasons}"


def has_native_band(device_type: str, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a BAND block costs its visible scores only, so that large window blocks are cheap and need no mask tensor."""
    return _select(device_type, dtype, head_dim, MaskKind.BAND)[0] is FLASH_CUDA


def additive_mask(mask: BlockMask, n_queries: int, n_keys: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """The mask as a tensor to add to the scores, broadcastable to [B, H, T, S]; None when nothing is hidden."""
    if mask.kind is MaskKind.NONE:
        return None
    if mask.kind is MaskKind.DENSE:
        assert mask.tensor is not None
        if mask.tensor.dtype != torch.bool:
            return mask.tensor.to(dtype)
        return torch.zeros(mask.tensor.shape, dtype=dtype, device=device).masked_fill_(~mask.tensor, -_INF)
    low, high = (None, 0) if mask.kind is MaskKind.CAUSAL else (mask.low, mask.high)
    hidden_TS = torch.full((n_queries, n_keys), -_INF, dtype=dtype, device=device)
    if high is None:
        return hidden_TS.tril_(mask.low - 1)
    above_TS = hidden_TS.triu(high + 1)
    return above_TS if low is None else above_TS.add_(hidden_TS.tril_(low - 1))


def _rows_contiguous(x_BHTD: torch.Tensor) -> torch.Tensor:
    """The kernels take any strides but one: a token's values must be adjacent."""
    return x_BHTD if x_BHTD.stride(-1) == 1 else x_BHTD.contiguous()


def _check(q_BHTD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSD: torch.Tensor, mask: BlockMask) -> None:
    if not q_BHTD.dtype == k_BGSD.dtype == v_BGSD.dtype:
        raise ValueError(f"q, k and v must share one dtype, got {q_BHTD.dtype}, {k_BGSD.dtype}, {v_BGSD.dtype}")
    if k_BGSD.shape != v_BGSD.shape or q_BHTD.shape[1] % k_BGSD.shape[1] or q_BHTD.shape[::3] != k_BGSD.shape[::3]:
        raise ValueError(f"q {tuple(q_BHTD.shape)}, k {tuple(k_BGSD.shape)}, v {tuple(v_BGSD.shape)} do not fit together")
    if mask.kind is MaskKind.CAUSAL and q_BHTD.shape[2] != k_BGSD.shape[2]:
        # The kernels disagree on how a causal mask is aligned when T != S (top left on CPU, bottom right in flash-attn).
        raise ValueError(f"a causal block must be square, got {q_BHTD.shape[2]} queries and {k_BGSD.shape[2]} keys; use BlockMask.band")


def _empty_rows(q_BHTD: torch.Tensor, k_BGSD: torch.Tensor, mask: BlockMask) -> torch.Tensor | None:
    """Queries that see no key, broadcastable to [B, H, T]; None when there is none for sure."""
    if mask.kind is MaskKind.BAND:
        last_row_sees = q_BHTD.shape[2] - 1 + mask.low < k_BGSD.shape[2]
        if last_row_sees and (mask.high is None or mask.high >= max(0, mask.low)):
            return None
    elif mask.kind is not MaskKind.DENSE or mask.no_empty_rows:
        return None
    hidden = additive_mask(mask, q_BHTD.shape[2], k_BGSD.shape[2], torch.float32, q_BHTD.device)
    assert hidden is not None
    return (hidden == -_INF).all(-1)


# --- CPU: torch's flash kernel -----------------------------------------------------------------------------------------


def _refuses_flash_cpu(device_type: str, dtype: torch.dtype, head_dim: int, kind: MaskKind) -> str | None:
    return None if device_type == "cpu" else "runs on CPU only"


def _mask_4d(mask: BlockMask, q_BHTD: torch.Tensor, k_BGSD: torch.Tensor) -> torch.Tensor | None:
    """The additive mask as the 4-dimensional tensor that the kernels want, without copies along B and H."""
    if mask.kind in (MaskKind.NONE, MaskKind.CAUSAL):
        return None
    hidden = additive_mask(mask, q_BHTD.shape[2], k_BGSD.shape[2], q_BHTD.dtype, q_BHTD.device)
    assert hidden is not None
    return hidden.reshape((1,) * (4 - hidden.ndim) + hidden.shape)


def _flash_cpu(q_BHTD, k_BGSD, v_BGSD, mask, scale):
    causal = mask.kind is MaskKind.CAUSAL
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BHTD, k_BGSD, v_BGSD, 0.0, causal, attn_mask=_mask_4d(mask, q_BHTD, k_BGSD), scale=scale
    )


def _flash_cpu_backward(dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD, lse_BHT, mask, scale):
    causal = mask.kind is MaskKind.CAUSAL
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD, lse_BHT, 0.0, causal, attn_mask=_mask_4d(mask, q_BHTD, k_BGSD), scale=scale
    )


# --- CUDA: FlashAttention behind aten (torch can route it to FA3 or FA4) ------------------------------------------------


def _refuses_flash_cuda(device_type: str, dtype: torch.dtype, head_dim: int, kind: MaskKind) -> str | None:
    if device_type != "cuda":
        return "runs on CUDA only"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {dtype}"
    if head_dim % 8 or head_dim > 256:
        return f"takes head sizes that are multiples of 8 up to 256, not {head_dim}"
    return "takes no dense mask" if kind is MaskKind.DENSE else None


def _flash_window(mask: BlockMask, n_queries: int, n_keys: int) -> dict[str, int]:
    """A band as flash-attn's window, which is aligned at the bottom right: -left <= b - a - (S - T) <= right, -1 for no limit."""
    if mask.kind is not MaskKind.BAND:
        return {}
    shift = n_keys - n_queries
    left, right = shift - mask.low, -1 if mask.high is None else mask.high - shift
    if left < 0 or (mask.high is not None and right < 0):
        raise ValueError(f"flash-attn cannot express the band {mask.low}..{mask.high} on {n_queries} queries and {n_keys} keys")
    return {"window_size_left": left, "window_size_right": right}


def _flash_cuda(q_BHTD, k_BGSD, v_BGSD, mask, scale):
    n_queries, n_keys = q_BHTD.shape[2], k_BGSD.shape[2]
    out_BTHD, lse_BHT, *_ = torch.ops.aten._flash_attention_forward(
        *(x.transpose(1, 2) for x in (q_BHTD, k_BGSD, v_BGSD)),
        *(None, None, n_queries, n_keys, 0.0, mask.kind is MaskKind.CAUSAL, False),
        scale=scale,
        **_flash_window(mask, n_queries, n_keys),
    )
    return out_BTHD.transpose(1, 2), lse_BHT


def _flash_cuda_backward(dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD, lse_BHT, mask, scale):
    n_queries, n_keys = q_BHTD.shape[2], k_BGSD.shape[2]
    no_dropout_state = torch.zeros(2, dtype=torch.uint64, device=q_BHTD.device)
    grads = torch.ops.aten._flash_attention_backward(
        *(x.transpose(1, 2) for x in (dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD)),
        *(lse_BHT, None, None, n_queries, n_keys, 0.0, mask.kind is MaskKind.CAUSAL, no_dropout_state, no_dropout_state),
        scale=scale,
        **_flash_window(mask, n_queries, n_keys),
    )
    return tuple(grad.transpose(1, 2) for grad in grads)


# --- CUDA: memory-efficient attention, for dense masks and float32 ------------------------------------------------------


def _refuses_efficient_cuda(device_type: str, dtype: torch.dtype, head_dim: int, kind: MaskKind) -> str | None:
    if device_type != "cuda":
        return "runs on CUDA only"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bfloat16, float16 and float32, not {dtype}"
    return f"takes head sizes that are multiples of 8, not {head_dim}" if head_dim % 8 else None


def _efficient_bias(mask: BlockMask, q_BHTD: torch.Tensor, k_BGSD: torch.Tensor) -> torch.Tensor | None:
    """The additive mask expanded to [B, H, T, S]; rows are padded in memory because the kernel wants aligned strides."""
    hidden = _mask_4d(mask, q_BHTD, k_BGSD)
    if hidden is None:
        return None
    n_keys = k_BGSD.shape[2]
    aligned = torch.nn.functional.pad(hidden.expand(*hidden.shape[:3], n_keys), (0, -n_keys % 16))[..., :n_keys]
    return aligned.expand(*q_BHTD.shape[:3], n_keys)


def _repeat_heads(x_BGSD: torch.Tensor, n_heads: int) -> torch.Tensor:
    return x_BGSD if x_BGSD.shape[1] == n_heads else x_BGSD.repeat_interleave(n_heads // x_BGSD.shape[1], dim=1)


def _efficient_cuda(q_BHTD, k_BGSD, v_BGSD, mask, scale):
    k_BHSD, v_BHSD = (_repeat_heads(x, q_BHTD.shape[1]) for x in (k_BGSD, v_BGSD))
    out_BHTD, lse_BHT, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q_BHTD, k_BHSD, v_BHSD, _efficient_bias(mask, q_BHTD, k_BGSD), True, 0.0, mask.kind is MaskKind.CAUSAL, scale=scale
    )
    return out_BHTD, lse_BHT[..., : q_BHTD.shape[2]]  # the kernel pads lse to a multiple of 32


def _efficient_cuda_backward(dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD, lse_BHT, mask, scale):
    k_BHSD, v_BHSD = (_repeat_heads(x, q_BHTD.shape[1]) for x in (k_BGSD, v_BGSD))
    lse_padded = torch.nn.functional.pad(lse_BHT, (0, -lse_BHT.shape[-1] % 32), value=_INF)
    seed = torch.zeros((), dtype=torch.int64, device=q_BHTD.device)
    dq_BHTD, dk_BHSD, dv_BHSD, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        *(dout_BHTD, q_BHTD, k_BHSD, v_BHSD, _efficient_bias(mask, q_BHTD, k_BGSD), out_BHTD, lse_padded, seed, seed, 0.0),
        *([True, True, True, False], mask.kind is MaskKind.CAUSAL),
        scale=scale,
    )
    group = (k_BGSD.shape[1], q_BHTD.shape[1] // k_BGSD.shape[1])
    dk_BGSD, dv_BGSD = (x.unflatten(1, group).sum(2) if group[1] > 1 else x for x in (dk_BHSD, dv_BHSD))
    return dq_BHTD, dk_BGSD, dv_BGSD


# --- Anywhere: plain matrix products, a bounded number of query rows at a time -----------------------------------------


def _refuses_plain(device_type: str, dtype: torch.dtype, head_dim: int, kind: MaskKind) -> str | None:
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


def _plain(q_BHTD, k_BGSD, v_BGSD, mask, scale):
    dtype = torch.promote_types(q_BHTD.dtype, torch.float32)
    q, k, v = _grouped(q_BHTD, k_BGSD.shape[1]).to(dtype), k_BGSD.to(dtype), v_BGSD.to(dtype)
    outs, lses = [], []
    for rows in _row_slices(q_BHTD, k_BGSD):
        scores = _plain_scores(q[:, :, :, rows], k, mask, rows, scale)
        lse = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - lse.masked_fill(lse == -_INF, 0.0).unsqueeze(-1))
        outs.append(torch.einsum("bgrts,bgsd->bgrtd", weights, v))
        lses.append(lse)
    return torch.cat(outs, 3).flatten(1, 2).to(q_BHTD.dtype), torch.cat(lses, 3).flatten(1, 2)


def _plain_backward(dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD, lse_BHT, mask, scale):
    dtype = torch.promote_types(q_BHTD.dtype, torch.float32)
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


FLASH_CPU = Implementation("flash_cpu", _refuses_flash_cpu, _flash_cpu, _flash_cpu_backward)
FLASH_CUDA = Implementation("flash_cuda", _refuses_flash_cuda, _flash_cuda, _flash_cuda_backward)
EFFICIENT_CUDA = Implementation("efficient_cuda", _refuses_efficient_cuda, _efficient_cuda, _efficient_cuda_backward)
PLAIN = Implementation("plain", _refuses_plain, _plain, _plain_backward)
IMPLEMENTATIONS = (FLASH_CPU, FLASH_CUDA, EFFICIENT_CUDA, PLAIN)
"""Candidates, best first; the first that does not refuse is used."""


def _select(device_type: str, dtype: torch.dtype, head_dim: int, kind: MaskKind) -> tuple[Implementation, list[tuple[str, str]]]:
    """The implementation for a block and (name, reason) of those passed over."""
    passed_over: list[tuple[str, str]] = []
    for implementation in IMPLEMENTATIONS:
        reason = implementation.refuses(device_type, dtype, head_dim, kind)
        if reason is None:
            return implementation, passed_over
        passed_over.append((implementation.name, reason))
    raise AssertionError("the plain implementation refuses nothing")
