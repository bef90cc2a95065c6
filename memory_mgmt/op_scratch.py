"""Scratch of torch's CPU kernels per thread, from shapes: measured in the log of the CPU allocator. Imports no torch."""

from __future__ import annotations

MKLDNN_PER_THREAD = 80 * 1024
"""oneDNN packs blocks of a low-precision matrix product; measured 81 to 165 KB per thread, hardly depending on the shape."""
_FLASH_QUERY_BLOCKS = ((768, 256), (192, 64), (0, 32))
"""(from so many queries on, queries per block)"""
_FLASH_KEY_BLOCK = 512


def flash_cpu_scratch(queries: int, keys: int, head_dim: int, itemsize: int) -> int:
    """Bytes: a block of scores and of outputs, wide; in low precision also one head's keys and values, packed to multiples of 32."""
    block_queries, block_keys = _flash_block(queries, keys)
    packed = 2 * keys * -(-head_dim // 32) * 32 * itemsize if itemsize == 2 else 0
    return block_queries * (block_keys + head_dim + 2) * max(4, itemsize) + packed


def flash_cpu_backward_scratch(queries: int, keys: int, itemsize: int) -> int:
    """Bytes: two blocks of scores, wide; in low precision narrow copies of both, and oneDNN's packed operands."""
    block_queries, block_keys = _flash_block(queries, keys)
    narrow = 2 * block_queries * block_keys * itemsize + 3 * MKLDNN_PER_THREAD if itemsize == 2 else 0
    return 2 * block_queries * block_keys * max(4, itemsize) + narrow


def _flash_block(queries: int, keys: int) -> tuple[int, int]:
    """(queries, keys) of a block of scores."""
    return next(block for least, block in _FLASH_QUERY_BLOCKS if queries >= least), min(_FLASH_KEY_BLOCK, keys)
