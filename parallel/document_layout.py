"""Which tokens of packed documents each rank holds so that all have equal causal work: every document dealt head to tail.

``zigzag`` balances one document that fills the sequence. Of several, each must be dealt by itself: of a document of L tokens, 2P chunks of
floor(L / 2P), rank r taking chunks r and 2P-1-r as zigzag does. What does not divide, and documents too short to be worth cutting, are
dealt in the order of the sequence, equally many tokens to every rank. So all ranks hold equally many tokens, and what is not balanced
exactly is at most a few tokens of a long document and whole short ones.

Pure integers. Try alone: ``python -c "from parallel.document_layout import *; print(document_ranges((0, 700), 1024, 0, 2))"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from models.attention_plan import Range

SHORTEST_CHUNK = 64
"""Tokens below which a document is not cut: a kernel call for less costs more than it balances."""


def document_ranges(starts: tuple[int, ...], seq_len: int, cp_rank: int, cp_size: int) -> tuple[Range, ...]:
    """Global ranges of ``cp_rank``, rising and not touching; equally many tokens for every rank.

    ``starts``: of the documents, the first is 0. Raises ValueError unless ``cp_size`` divides ``seq_len``.
    """
    if seq_len % cp_size:
        raise ValueError(f"{seq_len} tokens cannot be shared equally by {cp_size} ranks")
    return _dealt(starts, seq_len, cp_size)[cp_rank]


@lru_cache(maxsize=32)
def _dealt(starts: tuple[int, ...], seq_len: int, cp_size: int) -> tuple[tuple[Range, ...], ...]:
    held: list[list[Range]] = [[] for _ in range(cp_size)]
    rest: list[Range] = []
    for start, end in zip(starts, (*starts[1:], seq_len), strict=True):
        chunk = (end - start) // (2 * cp_size)
        if chunk < SHORTEST_CHUNK:
            rest.append((start, end))
            continue
        for i in range(2 * cp_size):
            held[min(i, 2 * cp_size - 1 - i)].append((start + i * chunk, start + (i + 1) * chunk))
        if start + 2 * cp_size * chunk < end:
            rest.append((start + 2 * cp_size * chunk, end))
    _deal_equally(rest, held)
    return tuple(_joined(sorted(ranges)) for ranges in held)


def _deal_equally(rest: Sequence[Range], held: list[list[Range]]) -> None:
    """In the order of the sequence, as many tokens to each rank."""
    quota = sum(end - start for start, end in rest) // len(held)
    rank, room = 0, quota
    for start, end in rest:
        while start < end:
            if not room:
                rank, room = rank + 1, quota
            taken = min(room, end - start)
            held[rank].append((start, start + taken))
            start, room = start + taken, room - taken


def _joined(ranges: Sequence[Range]) -> tuple[Range, ...]:
    found: list[Range] = []
    for start, end in ranges:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return tuple(found)
