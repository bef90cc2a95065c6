"""How the states of an offloaded optimizer lie in host memory, and in which buckets they come to the device. Imports no torch.

The parameters of one section (a block, the embedding, the head) lie one after the other in a flat space of elements; every state has one
stretch of host memory of that length. A bucket is a range of the space, so that it travels in one copy per state whatever parameters it
touches, and a large parameter goes in several buckets. No bucket spans two sections: equal layers then have equal buckets.

Try alone: ``python -c "from memory_mgmt.optimizer_buckets import cut; print(cut([1000, 64], 512))"``
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

BUCKET_BYTES = 128 * 2**20
"""Of states, at most. Some milliseconds of a host link, against which starting a copy costs nothing; two buckets are on the device."""
ALIGNMENT = 64
"""Parameters begin, and buckets are cut, at multiples of so many elements."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, stop) of the ``parameter``-th parameter of a section, ``at`` elements into a bucket."""

    parameter: int
    start: int
    stop: int
    at: int
    last: bool
    """No later bucket holds a piece of this parameter."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Elements [start, stop) of a section's space, and what lies there."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]


def section_of(name: str) -> str:
    """``blocks.3.ffn.w_up.weight`` -> ``blocks.3``, ``head.weight`` -> ``head``."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]


def starts(sizes: Sequence[int]) -> list[int]:
    """Where each parameter of so many elements begins in its section's space; one number more: the space's length."""
    return list(accumulate((_up(size) for size in sizes), initial=0))


def bucket_width(total: int, most: int) -> int:
    """Elements of each bucket of a space of ``total`` elements (the last may have fewer): as few buckets as ``most`` elements allow, equal
    ones. Raises ValueError for ``most`` below the alignment."""
    if most < ALIGNMENT:
        raise ValueError(f"a bucket of {most} elements: {ALIGNMENT} are the least")
    return _up(-(-total // max(1, -(-total // (most // ALIGNMENT * ALIGNMENT)))))


def cut(sizes: Sequence[int], most: int) -> list[Bucket]:
    """The buckets of a section with parameters of these sizes, at most ``most`` elements each. A parameter without elements has one
    empty piece. Raises ValueError as ``bucket_width`` does."""
    begins = starts(sizes)
    total = begins[-1]
    width = max(ALIGNMENT, bucket_width(total, most))
    found = []
    for low in range(0, max(1, total), width):
        high, pieces = min(low + width, total), []
        for i, size in enumerate(sizes):
            begin, end = begins[i], begins[i] + size
            start, stop = max(begin, low), min(end, high)
            empty = not size and (low <= begin < high or (begin == total == high))
            if start < stop or empty:
                pieces.append(Piece(i, start - begin, stop - begin, start - low, last=stop == end))
        found.append(Bucket(low, high, tuple(pieces)))
    return found


def _up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
