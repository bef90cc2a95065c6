"""Blocks by torch's other CUDA kernels: cuDNN's fused attention, and memory-efficient attention for dense masks and float32.
``models/kernels.py`` chooses among them.

Legend: B batch, H query heads, G key/value heads (H a multiple of G), T queries, S keys, D head size.
"""

from __future__ import annotations

import torch

from models.block import Block, BlockMask, Implementation, MaskKind, mask_4d, repeat_heads
from models.kernels_flash import active_flash

_INF = float("inf")

# --- cuDNN


def _cudnn_version() -> int:
    """As 91002 for 9.10.2; of a torch without CUDA, which only plans, that of torch's usual builds."""
    return (torch.backends.cudnn.version() or 0) if torch.version.cuda else 91_002


def _refuses_cudnn(block: Block) -> str | None:
    if block.device != "cuda":
        return "runs on CUDA only"
    if block.capability is None or block.capability < (8, 0):
        return "needs compute capability 8.0, which is not known to be here"
    version = _cudnn_version()
    if version < 90_000:
        return f"needs cuDNN 9, not {version}"
    if block.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {block.dtype}"
    largest = 256 if block.capability == (9, 0) and version >= 91_000 else 128
    if block.head_dim % 8 or block.head_dim > largest:
        return f"takes head sizes that are multiples of 8 up to {largest}, not {block.head_dim}"
    if block.deterministic:
        return "is not deterministic (train.deterministic, torch.use_deterministic_algorithms)"
    return None if block.kind in (MaskKind.NONE, MaskKind.CAUSAL) else f"is not used for a {block.kind.value} mask"


def _yields_cudnn(block: Block) -> str | None:
    """Faster than FlashAttention 2 on Hopper (1.7 to 2.3 times) and data-centre Blackwell, slower elsewhere (0.82 on an A100, 0.88 on an
    RTX PRO 6000: huggingface/transformers#48163)."""
    if block.capability is None or block.capability[0] not in (9, 10):
        return "FlashAttention is faster before Hopper and on Blackwell without data-centre tensor memory"
    return f"{active_flash()} is active in torch" if active_flash() != "FA2" else None


def _cudnn(q_BHTD, k_BGSD, v_BGSD, mask, scale):
    out_BHTD, lse_BHT1, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q_BHTD, k_BGSD, v_BGSD, None, True, 0.0, mask.kind is MaskKind.CAUSAL, False, scale=scale
    )
    return out_BHTD, lse_BHT1.reshape(q_BHTD.shape[:3])


def _cudnn_backward(dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD, lse_BHT, mask, scale):
    no_dropout_state = torch.zeros((), dtype=torch.int64, device=q_BHTD.device)
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD, lse_BHT.unsqueeze(-1), no_dropout_state, no_dropout_state),
        *(None, None, None, q_BHTD.shape[2], k_BGSD.shape[2], 0.0, mask.kind is MaskKind.CAUSAL),
        scale=scale,
    )


CUDNN = Implementation("cudnn", _refuses_cudnn, _cudnn, _cudnn_backward, _yields_cudnn)

# --- memory-efficient attention


def _refuses_efficient_cuda(block: Block) -> str | None:
    if block.device != "cuda":
        return "runs on CUDA only"
    if block.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bfloat16, float16 and float32, not {block.dtype}"
    return f"takes head sizes that are multiples of 8, not {block.head_dim}" if block.head_dim % 8 else None


def _efficient_bias(mask: BlockMask, q_BHTD: torch.Tensor, k_BGSD: torch.Tensor) -> torch.Tensor | None:
    """The additive mask expanded to [B, H, T, S]; rows are padded in memory because the kernel wants aligned strides."""
    hidden = mask_4d(mask, q_BHTD, k_BGSD)
    if hidden is None:
        return None
    n_keys = k_BGSD.shape[2]
    aligned = torch.nn.functional.pad(hidden.expand(*hidden.shape[:3], n_keys), (0, -n_keys % 16))[..., :n_keys]
    return aligned.expand(*q_BHTD.shape[:3], n_keys)


def _efficient_cuda(q_BHTD, k_BGSD, v_BGSD, mask, scale):
    k_BHSD, v_BHSD = (repeat_heads(x, q_BHTD.shape[1]) for x in (k_BGSD, v_BGSD))
    out_BHTD, lse_BHT, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q_BHTD, k_BHSD, v_BHSD, _efficient_bias(mask, q_BHTD, k_BGSD), True, 0.0, mask.kind is MaskKind.CAUSAL, scale=scale
    )
    return out_BHTD, lse_BHT[..., : q_BHTD.shape[2]]  # the kernel pads lse to a multiple of 32


def _efficient_cuda_backward(dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD, lse_BHT, mask, scale):
    k_BHSD, v_BHSD = (repeat_heads(x, q_BHTD.shape[1]) for x in (k_BGSD, v_BGSD))
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


EFFICIENT_CUDA = Implementation("efficient_cuda", _refuses_efficient_cuda, _efficient_cuda, _efficient_cuda_backward)
