"""Which waits make it safe that buffers of different streams share addresses. Imports no torch.

On one stream reuse is ordered by the stream itself: work of the next tenant is issued after that of the last. Across streams it is not:
the next tenant must wait for an event recorded after the last use of the one before. The plan knows every pair, so the waits are
computed once, and those that the program's own synchronisation implies are left out.

Time is the position in the order in which the host issues work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tenant:
    """A buffer at its planned address: live on [lower, upper), at bytes [offset, offset + size)."""

    lower: int
    upper: int
    offset: int
    size: int
    streams: tuple[str, ...]
    """All streams that use it; the first one makes it."""


@dataclass(frozen=True)
class Sync:
    """From ``waited`` on, work on stream ``waiter`` starts after all work issued on stream ``source`` before ``recorded``."""

    recorded: int
    waited: int
    source: str
    waiter: str


@dataclass(frozen=True)
class Wait:
    """Before buffer ``after`` is first used its first stream waits for the last use of buffer ``before`` on ``stream``."""

    after: int
    before: int
    stream: str


def needed_waits(tenants: Sequence[Tenant], syncs: Sequence[Sync] = ()) -> list[Wait]:
    """Every pair of tenants of one place (numbered as given) whose order neither a stream nor the program's own ``syncs`` ensure.

    Raises ValueError if two tenants share bytes while both live: no wait makes that safe.
    """
    return [
        Wait(after, before, stream)
        for after in range(len(tenants))
        for before in _earlier_tenants(tenants, after)
        for stream in tenants[before].streams
        if not _ordered(stream, tenants[before].upper, tenants[after].streams[0], tenants[after].lower, syncs)
    ]


def _earlier_tenants(tenants: Sequence[Tenant], after: int) -> list[int]:
    mine, earlier = tenants[after], []
    for i, other in enumerate(tenants):
        if i == after or other.offset >= mine.offset + mine.size or mine.offset >= other.offset + other.size:
            continue
        if other.lower < mine.upper and mine.lower < other.upper:
            raise ValueError(f"buffers {min(i, after)} and {max(i, after)} share bytes while both are live")
        if other.upper <= mine.lower:
            earlier.append(i)
    return earlier


def _ordered(source: str, end: int, waiting: str, start: int, syncs: Sequence[Sync]) -> bool:
    """True if work issued on ``waiting`` from ``start`` on comes after work issued on ``source`` before ``end``."""
    after = {source: end}  # stream -> position from which its work comes after
    changed = True
    while changed:
        changed = False
        for sync in syncs:
            if sync.recorded >= after.get(sync.source, sync.recorded + 1) and sync.waited < after.get(sync.waiter, sync.waited + 1):
                after[sync.waiter] = sync.waited
                changed = True
    return waiting in after and after[waiting] <= start
