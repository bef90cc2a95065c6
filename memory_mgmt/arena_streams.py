"""Which waits make it safe that blocks of different streams share addresses. Imports no torch.

On one stream reuse is ordered by the stream itself: work of the next tenant is issued after that of the last. Across streams it is not:
the next tenant must wait for an event recorded when the one before was freed. The plan knows every pair, so it says which frees are
marked by an event; the allocator (``arena_cuda.cpp``) serves an address only behind the events that it needs.

Time is the position in the order in which the host asks for memory.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tenant:
    """A block at its planned address: live on [lower, upper), at bytes [offset, offset + size), made and freed on ``stream``."""

    lower: int
    upper: int
    offset: int
    size: int
    stream: int


@dataclass(frozen=True, order=True)
class Wait:
    """Before tenant ``after`` is used its stream waits for the event that marks the end of tenant ``before``."""

    after: int
    before: int


def needed_waits(tenants: Sequence[Tenant]) -> list[Wait]:
    """Every pair of tenants (numbered as given) of different streams where the second one has bytes that the first one was the last to
    have. Earlier tenants of the same bytes come before that one already.

    Raises ValueError if two tenants share bytes while both live: no wait makes that safe.
    """
    if len({tenant.stream for tenant in tenants}) <= 1:
        return []
    moments = [(tenant.upper, 0, number) for number, tenant in enumerate(tenants)]
    moments += [(tenant.lower, 1, number) for number, tenant in enumerate(tenants)]
    live, past, waits = _Ranges(), _Ranges(), set[Wait]()
    for _, begins, number in sorted(moments):  # a tenant that ends at k is gone when one begins at k
        tenant = tenants[number]
        start, end = tenant.offset, tenant.offset + tenant.size
        if not begins:
            live.cut(start, end)
            past.put(start, end, number)
            continue
        if others := live.over(start, end):
            raise ValueError(f"blocks {min(*others, number)} and {max(*others, number)} share bytes while both are live")
        live.put(start, end, number)
        waits |= {Wait(number, before) for before in past.over(start, end) if tenants[before].stream != tenant.stream}
    return sorted(waits)


class _Ranges:
    """Disjoint ranges of bytes, each with a number."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._entries: list[tuple[int, int, int]] = []  # (start, end, number), by start

    def over(self, start: int, end: int) -> list[int]:
        """Numbers of the ranges that share bytes with [start, end)."""
        first, last = self._span(start, end)
        return [number for _, _, number in self._entries[first:last]]

    def put(self, start: int, end: int, number: int) -> None:
        """[start, end) is of ``number`` from now on, of whatever it was before."""
        self.cut(start, end)
        at = bisect.bisect_left(self._starts, start)
        self._starts.insert(at, start)
        self._entries.insert(at, (start, end, number))

    def cut(self, start: int, end: int) -> None:
        """Take [start, end) out."""
        first, last = self._span(start, end)
        rest = []
        for a, b, number in self._entries[first:last]:
            rest += [(a, start, number)] if a < start else []
            rest += [(end, b, number)] if b > end else []
        self._entries[first:last] = rest
        self._starts[first:last] = [a for a, _, _ in rest]

    def _span(self, start: int, end: int) -> tuple[int, int]:
        first = bisect.bisect_right(self._starts, start) - 1
        if first < 0 or self._entries[first][1] <= start:
            first += 1
        return first, max(first, bisect.bisect_left(self._starts, end))
