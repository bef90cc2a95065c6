"""Kernels that oneDNN writes at run time for low-precision products on CPU and keeps to the end of the process, by what sets them apart.

Measured with ``mallinfo2`` around single operations, torch 2.13, AVX-512: every product in bf16 whose sizes or layout are new leaves 0.52
MiB in use for good (a buffer of 512 KiB for the code, whatever the sizes), the second call of the same nothing. FlashAttention's forward
pass leaves 2 such kernels, its backward pass 3.3, and up to 10 where the length is no multiple of its blocks. In float32 none: MKL has
ready-made kernels. Nothing of this goes through torch's allocator. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

_MATRICES = {"aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::addmm": (1, 2), "aten::baddbmm": (1, 2)}
"""Which arguments are the factors."""
_FLASH = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": (0, 2),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": (1, 4),
}
"""(argument that is the queries, kernels)"""


def onednn_kernels(name: str, args: Sequence[Any]) -> tuple[Hashable, int]:
    """(what sets its kernels apart, how many they are) of an operation on CPU tensors; no kernels: zero.

    ``args``: of the operator, tensors that may be fake. Wide types have none.
    """
    if name in _MATRICES:
        factors = [args[i] for i in _MATRICES[name]]
        if factors[0].element_size() != 2:
            return None, 0
        return (name, *((tuple(x.shape), _is_transposed(x)) for x in factors)), 1
    if name in _FLASH:
        first, count = _FLASH[name]
        if args[first].element_size() != 2:
            return None, 0
        return (name, *(tuple(x.shape[2:]) for x in args[first : first + 2])), count
    return None, 0


def _is_transposed(x: Any) -> bool:
    """Whether rows, not columns, are adjacent in memory."""
    return x.stride(-1) != 1 and x.stride(-2) == 1
