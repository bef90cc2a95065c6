"""Into how many blocks of columns a state is cut that goes from rank to rank (`parallel/state_ring.py`). Imports no torch."""

from __future__ import annotations

import math

BLOCK_BYTES = 512 * 1024
"""What a link carries in the time that a message takes to begin: some 10 us at 50 GB/s."""


def column_blocks(state_bytes: int, columns: int, hops: int) -> int:
    """Into how many blocks of columns a state of ``state_bytes`` is cut that makes ``hops`` hops between ranks.

    k blocks take (hops + k - 1) (a + state_bytes / (k b)) with latency a and bandwidth b, least at k^2 = (hops - 1) state_bytes / (a b),
    where a b is ``BLOCK_BYTES``."""
    best = math.sqrt(max(0, hops - 1) * state_bytes / BLOCK_BYTES)
    return max(1, min(columns, round(best)))
