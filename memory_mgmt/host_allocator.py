"""Make the C library give large freed blocks back, so that a CPU rank holds about what its live tensors take.

glibc serves a block above its mmap threshold by a mapping of its own, which goes back to the kernel when it is freed. By default the
threshold grows to 32 MiB with the blocks that are freed; tensors below it then come from a heap that is seldom trimmed. Measured on
the one-million-token configuration at 131,072 tokens, two ranks: 1.57 GiB resident per rank by default, 0.77 GiB with a fixed
threshold, at the same CPU time (0.86 GiB planned).
"""

from __future__ import annotations

import ctypes

MMAP_THRESHOLD_BYTES = 1 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def return_freed_memory() -> bool:
    """Fix the mmap threshold of this process at ``MMAP_THRESHOLD_BYTES``; False where the C library has no ``mallopt`` (not glibc)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Setting either one switches the growing of the threshold off.
    return bool(mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, 2 * MMAP_THRESHOLD_BYTES))


if __name__ == "__main__":
    print("freed blocks are given back" if return_freed_memory() else "this C library cannot be told to give freed blocks back")
