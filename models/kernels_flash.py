"""Blocks by FlashAttention: torch's kernel for CPU, the one behind aten on CUDA (torch can route it to FlashAttention 3 or 4,
``torch.nn.attention.activate_flash_attention_impl``), and the flash-attn package. ``models/kernels.py`` chooses among them.

Legend: B batch, H query heads, G key/value heads (H a multiple of G), T queries, S keys, D head size.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch

from models.block import Block, BlockMask, Implementation, MaskKind, mask_4d

# --- CPU


def _refuses_flash_cpu(block: Block) -> str | None:
    return None if block.device == "cpu" else "runs on CPU only"


def _flash_cpu(q_BHTD, k_BGSD, v_BGSD, mask, scale):
    causal = mask.kind is MaskKind.CAUSAL
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BHTD, k_BGSD, v_BGSD, 0.0, causal, attn_mask=mask_4d(mask, q_BHTD, k_BGSD), scale=scale
    )


def _flash_cpu_backward(dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD, lse_BHT, mask, scale):
    causal = mask.kind is MaskKind.CAUSAL
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD, lse_BHT, 0.0, causal, attn_mask=mask_4d(mask, q_BHTD, k_BGSD), scale=scale
    )


FLASH_CPU = Implementation("flash_cpu", _refuses_flash_cpu, _flash_cpu, _flash_cpu_backward)

# --- CUDA


def _refuses_any_flash(block: Block) -> str | None:
    if block.device != "cuda":
        return "runs on CUDA only"
    if block.capability is not None and block.capability < (8, 0):
        return f"needs compute capability 8.0, not {block.capability[0]}.{block.capability[1]}"
    if block.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {block.dtype}"
    if block.head_dim % 8 or block.head_dim > 256:
        return f"takes head sizes that are multiples of 8 up to 256, not {block.head_dim}"
    return "takes no dense mask" if block.kind is MaskKind.DENSE else None


@lru_cache
def _left_out() -> str | None:
    """Why a CUDA torch cannot call FlashAttention. A torch without CUDA only plans for machines that have the usual one."""
    if torch.version.cuda is None or torch.backends.cuda.is_flash_attention_available():
        return None
    return "this torch was built without FlashAttention"


def _refuses_flash_cuda(block: Block) -> str | None:
    return _refuses_any_flash(block) or _left_out()


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


FLASH_CUDA = Implementation("flash_cuda", _refuses_flash_cuda, _flash_cuda, _flash_cuda_backward, native_band=True)


def active_flash() -> str:
    """Which FlashAttention torch's own operators call: FA2, FA3 or FA4."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    return current or "FA2"


# --- CUDA: the flash-attn package (2.7 or newer)


@lru_cache
def _package_missing() -> bool:
    return find_spec("flash_attn") is None


def _refuses_package(block: Block) -> str | None:
    return _refuses_any_flash(block) or ("the package flash-attn is not installed" if _package_missing() else None)


def _yields_package(block: Block) -> str | None:
    return None if _left_out() else "torch's own FlashAttention does the same"


def _package_window(mask: BlockMask, n_queries: int, n_keys: int) -> tuple[int, int]:
    window = _flash_window(mask, n_queries, n_keys)
    return window.get("window_size_left", -1), window.get("window_size_right", -1)


def _flash_attn(q_BHTD, k_BGSD, v_BGSD, mask, scale):
    from flash_attn.flash_attn_interface import _flash_attn_forward  # pyright: ignore[reportMissingImports]

    out_BTHD, lse_BHT, *_ = _flash_attn_forward(
        *(x.transpose(1, 2) for x in (q_BHTD, k_BGSD, v_BGSD)),
        *(0.0, scale, mask.kind is MaskKind.CAUSAL, *_package_window(mask, q_BHTD.shape[2], k_BGSD.shape[2])),
        *(0.0, None, False),  # softcap, alibi slopes, probabilities
    )
    return out_BTHD.transpose(1, 2), lse_BHT


def _flash_attn_backward(dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD, lse_BHT, mask, scale):
    from flash_attn.flash_attn_interface import _flash_attn_backward as backward  # pyright: ignore[reportMissingImports]

    tensors = [x.transpose(1, 2) for x in (dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD)]
    dq_BTHD, dk_BSGD, dv_BSGD = (torch.empty_like(x) for x in tensors[1:4])
    backward(
        *tensors,
        *(lse_BHT, dq_BTHD, dk_BSGD, dv_BSGD),
        *(0.0, scale, mask.kind is MaskKind.CAUSAL, *_package_window(mask, q_BHTD.shape[2], k_BGSD.shape[2])),
        *(0.0, None, torch.are_deterministic_algorithms_enabled()),
    )
    return dq_BTHD.transpose(1, 2), dk_BSGD.transpose(1, 2), dv_BSGD.transpose(1, 2)


FLASH_ATTN = Implementation("flash_attn", _refuses_package, _flash_attn, _flash_attn_backward, _yields_package, native_band=True)
