"""What eight-bit copies of activations take: bytes, and the time to make and to read them. Imports no torch.

The passes are those of ``quantised.py``, over one chunk at a time; tests/memory_mgmt/test_quantised.py compares them with what its
operations really move.
"""

from __future__ import annotations

from memory_mgmt.cost_rates import Rates

GROUP = 128
"""Neighbouring elements of a row that share one scale; the last group of a row may be smaller."""
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 25}
"""Elements that are worked on at once, rounded to whole rows: bounds scratch memory, and on a CPU stays in the cache between passes."""

_ON_SCALES = 6
"""Operations on a chunk's scales while they are made: their bytes do not count, their launches do."""


def packed_bytes(rows: int, width: int, itemsize: int) -> int:
    """Bytes of the values and scales of ``rows`` x ``width`` elements of ``itemsize`` bytes."""
    return rows * (width + -(-width // GROUP) * itemsize)


def quantise_seconds(elements: int, itemsize: int, rates: Rates, cuda: bool) -> float:
    """Time to make an eight-bit copy on one rank alone."""
    wide = max(4, itemsize)
    widened = 0 if itemsize == wide else itemsize + wide
    # Largest magnitude; (widening and) scaling; rounding; narrowing.
    passes = (itemsize, itemsize + wide) if cuda else (widened, wide, wide, 2 * wide)
    return _seconds((*passes, 2 * wide, wide + 1), elements, rates, cuda, _ON_SCALES)


def dequantise_seconds(elements: int, itemsize: int, rates: Rates, cuda: bool) -> float:
    """Time to make tensors of ``itemsize`` bytes per element from an eight-bit copy on one rank alone."""
    return _seconds((1 + itemsize, 2 * itemsize), elements, rates, cuda)


def _seconds(bytes_per_element: tuple[int, ...], elements: int, rates: Rates, cuda: bool, small: int = 0) -> float:
    chunk = min(elements, CHUNK["cuda" if cuda else "cpu"])
    if not chunk:
        return 0.0
    once = sum(rates.elementwise.seconds(n * chunk) + rates.launch_seconds for n in bytes_per_element if n)
    once += small * rates.launch_seconds
    return once * elements / chunk
