"""Scratch memory that kernels allocate and free before they return: no trace of operators sees it, so it is modelled.

The CPU figures were read off the real allocator's log (``memory_mgmt/allocator_log.py``) with torch 2.13. What CUDA kernels take from the
caching allocator: FlashAttention's backward accumulates queries' gradients in float32 and, with grouped heads, expands keys and
values; cuBLAS has one workspace per process (``memory_mgmt/overheads.py``), not one per call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from memory_mgmt.op_scratch import MKLDNN_PER_THREAD, flash_cpu_backward_scratch, flash_cpu_scratch


def workspace_bytes(name: str, args: Sequence[Any], kwargs: dict[str, Any], device_type: str, threads: int) -> int:
    """Bytes that a kernel takes and gives back; ``threads``: of a CPU rank."""
    rules = _CPU if device_type == "cpu" else _CUDA
    rule = rules.get(name)
    return rule(args, kwargs, threads) if rule is not None else 0


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _logsumexp(args: Sequence[Any], kwargs: dict[str, Any], threads: int) -> int:
    """The exponentials of all inputs, and their largest."""
    x: Tensor = args[0]
    return _size(x) + _size(x) // x.shape[-1]


def _norm_in_other_dtype(args: Sequence[Any], kwargs: dict[str, Any], threads: int) -> int:
    """A copy of the input in the dtype asked for."""
    dtype = kwargs.get("dtype")
    return args[0].numel() * dtype.itemsize if dtype is not None and dtype != args[0].dtype else 0


def _low_precision_product(args: Sequence[Any], kwargs: dict[str, Any], threads: int) -> int:
    return threads * MKLDNN_PER_THREAD if args[-1].element_size() == 2 else 0


def _flash_cpu(args: Sequence[Any], kwargs: dict[str, Any], threads: int) -> int:
    q, k = args[0], args[1]
    return threads * flash_cpu_scratch(q.shape[2], k.shape[2], q.shape[3], q.element_size())


def _flash_cpu_backward(args: Sequence[Any], kwargs: dict[str, Any], threads: int) -> int:
    q, k = args[1], args[2]
    return threads * flash_cpu_backward_scratch(q.shape[2], k.shape[2], q.element_size())


def _flash_cuda_backward(args: Sequence[Any], kwargs: dict[str, Any], threads: int) -> int:
    """dq in float32, the row sums of dout * out; dk and dv per query head before they are summed over groups; dout and out, where they
    are not contiguous (at::_flash_attention_backward)."""
    dout, q, k, _, out = args[:5]  # [B, T, H, D]
    return _attention_backward(q, k) + sum(_size(x) for x in (dout, out) if not x.is_contiguous())


def _attention_backward(q: Tensor, k: Tensor) -> int:
    """[B, T, H, D] each."""
    head = -(-q.shape[3] // 32) * 32
    rows = -(-q.shape[1] // 128) * 128
    accumulator = q.shape[0] * rows * q.shape[2] * (head + 1) * 4
    expanded = 2 * k.shape[0] * k.shape[1] * q.shape[2] * k.shape[3] * k.element_size() if q.shape[2] != k.shape[2] else 0
    return accumulator + expanded


def _cudnn_backward(args: Sequence[Any], kwargs: dict[str, Any], threads: int) -> int:
    """As FlashAttention's backward, whose algorithm it is: dq in float32, row sums, dk and dv per query head (cudnn-frontend's workspace
    of the same three). An assumption: it has not been measured."""
    _, q, k = args[:3]  # [B, H, T, D]
    return _attention_backward(q.transpose(1, 2), k.transpose(1, 2))


_Rule = Callable[[Sequence[Any], dict[str, Any], int], int]
_CPU: dict[str, _Rule] = {
    "aten::logsumexp": _logsumexp,
    "aten::linalg_vector_norm": _norm_in_other_dtype,
    "aten::mm": _low_precision_product,
    "aten::addmm": _low_precision_product,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _flash_cpu,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _flash_cpu_backward,
}
_CUDA: dict[str, _Rule] = {
    "aten::logsumexp": _logsumexp,
    "aten::linalg_vector_norm": _norm_in_other_dtype,
    "aten::_flash_attention_backward": _flash_cuda_backward,
    "aten::_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
}
