"""One block of attention: ``(q, k, v, mask) -> (out, lse)`` and its backward, on whatever the device offers.

Blocks are what ring and window attention are made of: their outputs are merged through ``lse``, and the backward takes the
*merged* out and lse, so that each block contributes exactly its part of the gradient. This file picks the implementation
by device, dtype, head size and mask (``explain`` says which and why), and repairs what the kernels return for rows that see no key. The
implementations are in ``kernels_flash.py``, ``kernels_cuda.py`` and ``kernels_plain.py``, masks in ``block.py``. It does not split, merge
or communicate (models/attention.py and parallel/ do) and is not differentiable by autograd.

Try alone: ``python -c "import torch; from models.kernels import *; print(explain('cpu', torch.float32, 64, CAUSAL))"``.

Legend: B batch, H query heads, G key/value heads (H a multiple of G), T queries, S keys, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from models.block import CAUSAL, NONE, Block, BlockMask, Gradients, Implementation, MaskKind, additive_mask
from models.errors import UserError
from models.head_runs import by_heads, head_runs
from models.kernels_cuda import CUDNN, EFFICIENT_CUDA
from models.kernels_flash import FLASH_ATTN, FLASH_CPU, FLASH_CUDA
from models.kernels_plain import FLOAT64, PLAIN

__all__ = [
    "CAUSAL",
    "KERNELS",
    "NONE",
    "BlockMask",
    "Gradients",
    "block_attention",
    "block_attention_backward",
    "explain",
    "has_native_band",
]

_INF = float("inf")
IMPLEMENTATIONS = (FLASH_CPU, CUDNN, FLASH_CUDA, FLASH_ATTN, EFFICIENT_CUDA, PLAIN, FLOAT64)
"""Candidates, best first; the first that neither refuses nor yields is used."""
KERNELS = ("auto", *(implementation.name for implementation in IMPLEMENTATIONS))
"""What a caller may ask for."""
_planned: tuple[tuple[int, int] | None, bool] | None = None
"""See ``planned_for``; not a context variable, because autograd's threads must see it."""


def block_attention(
    q_BHTD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    mask: BlockMask,
    scale: float | None = None,
    kernel: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of one block and the log of its normaliser.

    Returns ``out_BHTD`` in q's dtype and contiguous ``lse_BHT`` (natural log; float64 for float64, else float32). A query
    that sees no key gets out 0 and lse -inf, which any merge leaves without effect. ``scale`` defaults to 1/sqrt(D);
    ``kernel`` is one of ``KERNELS``. Raises ValueError for shapes or dtypes that do not fit together and for CAUSAL on a block that is
    not square, UserError for a kernel that is not there or cannot compute this block.
    """
    _check(q_BHTD, k_BGSD, v_BGSD, mask)
    scale = q_BHTD.shape[-1] ** -0.5 if scale is None else scale
    implementation, _ = _select(block_of(q_BHTD, mask), kernel)
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
    kernel: str = "auto",
) -> Gradients:
    """This block's part of ``(dq_BHTD, dk_BGSD, dv_BGSD)``, given the *merged* out and lse over all blocks of the query.

    out and dout have q's dtype. Summed over blocks the parts are the exact gradient, because rowsum(dout * out) and the
    probabilities exp(score - lse) are those of the whole softmax.
    """
    _check(q_BHTD, k_BGSD, v_BGSD, mask)
    scale = float(q_BHTD.shape[-1] ** -0.5) if scale is None else scale
    implementation, _ = _select(block_of(q_BHTD, mask), kernel)
    empty_BHT = _empty_rows(q_BHTD, k_BGSD, mask)
    if empty_BHT is not None:
        # exp(-inf - 0) = 0: hidden rows give nothing; exp(-inf + inf) would be NaN.
        lse_BHT = lse_BHT.masked_fill(empty_BHT, 0.0)
    tensors = [_rows_contiguous(x) for x in (dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD)]
    runs = head_runs(q_BHTD, k_BGSD.shape[1]) if q_BHTD.device.type == "cuda" and mask.tensor is None else 1
    return by_heads(implementation.backward, (*tensors, lse_BHT.contiguous()), mask, scale, runs)


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


def explain(
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    mask: BlockMask = NONE,
    kernel: str = "auto",
    capability: tuple[int, int] | None = None,
    deterministic: bool = False,
) -> str:
    """One line: which implementation a block of this kind uses, and why each earlier candidate was passed over."""
    implementation, passed_over = _select(Block(device_type, dtype, head_dim, mask.kind, capability, deterministic), kernel)
    reasons = "".join(f"; not {name}: {why}" for name, why in passed_over)
    return f"{mask.kind.value} block, {dtype}, head size {head_dim} on {device_type}: {implementation.name}{reasons}"


def has_native_band(block: Block, kernel: str = "auto") -> bool:
    """Whether a BAND block costs its visible scores only, so that large window blocks are cheap and need no mask tensor."""
    return _select(block._replace(kind=MaskKind.BAND), kernel)[0].native_band


def block_of(q_BHTD: torch.Tensor, mask: BlockMask = NONE) -> Block:
    """What the choice of an implementation for these queries depends on."""
    device = q_BHTD.device
    if device.type != "cuda":
        return Block(device.type, q_BHTD.dtype, q_BHTD.shape[-1], mask.kind)
    capability, deterministic = circumstances(device)
    return Block(device.type, q_BHTD.dtype, q_BHTD.shape[-1], mask.kind, capability, deterministic)


def circumstances(device: torch.device) -> tuple[tuple[int, int] | None, bool]:
    """The compute capability of ``device`` (None: not known, or none) and whether only deterministic kernels may run; in a process that
    traces steps of another machine, those of that machine and its run."""
    return _planned or (capability_of(device), torch.are_deterministic_algorithms_enabled())


@contextmanager
def planned_for(capability: tuple[int, int] | None, deterministic: bool) -> Iterator[None]:
    """Blocks on CUDA are chosen as on such a device and in such a run: for a process that traces steps of another machine."""
    global _planned
    before, _planned = _planned, (capability, deterministic)
    try:
        yield
    finally:
        _planned = before


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; None for others, and where no driver can be asked."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def check_kernel(kernel: str) -> None:
    """Raise UserError unless ``kernel`` is one of ``KERNELS``."""
    if kernel not in KERNELS:
        raise UserError(f"kernel {kernel!r} is not known; use one of {', '.join(KERNELS)}")


def _select(block: Block, kernel: str) -> tuple[Implementation, list[tuple[str, str]]]:
    """The implementation for a block and (name, reason) of those passed over."""
    if kernel != "auto":
        return _named(block, kernel), []
    passed_over: list[tuple[str, str]] = []
    for implementation in IMPLEMENTATIONS:
        reason = implementation.refuses(block) or implementation.yields(block)
        if reason is None:
            return implementation, passed_over
        passed_over.append((implementation.name, reason))
    raise AssertionError("the plain implementation refuses nothing")


def _named(block: Block, kernel: str) -> Implementation:
    check_kernel(kernel)
    implementation = next(implementation for implementation in IMPLEMENTATIONS if implementation.name == kernel)
    reason = implementation.refuses(block)
    if reason is not None:
        raise UserError(
            f"kernel {kernel!r} cannot compute a {block.kind.value} block of {block.dtype} on {block.device}: it {reason}; use 'auto'"
        )
    return implementation


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
