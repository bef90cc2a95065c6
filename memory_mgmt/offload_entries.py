"""Stored bytes of the offload store, and what is left of them when nobody can ask for them any more.

Python's reference counts say when that is: only handles hold an entry strongly. So a dropped handle, a freed graph, an exception and
an abandoned forward pass all end alike, and nothing has to be told.
"""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from memory_mgmt.host_memory import HostBlock, Range
from memory_mgmt.offload_copies import Copies, RoundingBuffers, use_count


class Episode:
    """Consecutive parks of one layer in one forward pass."""

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.entries: list[weakref.ref[Entry]] = []


@dataclass(slots=True)
class Remains:
    """Host memory (and disk space) that can be reused once copies and jobs are done with it."""

    block: HostBlock | None
    extent: list[Range] | None
    events: tuple[Any, ...]
    copies: Copies
    job: Future[None] | None = None
    nbytes: int = 0
    number: int | None = None
    """The entry that died; None for a block that an entry no longer needs."""
    storage_key: int | None = None
    awaited: bool = False
    base: Tensor | None = None
    """A device buffer that nobody else has."""

    def done(self) -> bool:
        """Nothing reads or writes it any more."""
        return (self.job is None or self.job.done()) and all(self.copies.finished(event) for event in self.events)

    def wait(self) -> None:
        """Until ``done``."""
        if self.job is not None:
            self.job.exception()
        for event in self.events:
            self.copies.finish(event)


class Entry:
    """Bytes on their way to the host, there, on disk, or on their way back."""

    def __init__(
        self, number: int, nbytes: int, episode: Episode, copies: Copies, mode: Any, buffers: RoundingBuffers, inbox: deque[Remains]
    ) -> None:
        self.number, self.nbytes, self.episode = number, nbytes, episode
        self.copies, self.mode, self._buffers, self._inbox = copies, mode, buffers, inbox
        self.block: HostBlock | None = None
        self.extent: list[Range] | None = None
        """Its place on disk; where it lives once ``on_disk``."""
        self.on_disk = False
        self.job: Future[None] | None = None
        """Writing, or reading once ``on_disk``."""
        self.source: Tensor | None = None
        """Its bytes on the device, held until the compute stream has waited for their copy."""
        self.source_version: int | None = None
        self.stream: Any = None
        self.arrived: Any = None
        """Event: copied to the host."""
        self.base: Tensor | None = None
        """Its bytes back on the device."""
        self.base_version = self.base_owners = 0
        self.landed: Any = None
        """Event: copied back."""
        self.fetched = False
        self.awaited = False
        """It counts among those that will need a device buffer."""
        self.storage: StorageWeakRef | None = None
        """What it is a copy of, with the version then and the byte range, to be found by other views of the same storage."""
        self.version = self.low = self.high = 0
        self.packed = False

    def check_unchanged(self) -> None:
        """Raise RuntimeError when somebody wrote to the source while it was copied."""
        if self.source is not None and self.source_version is not None and self.source._version != self.source_version:
            raise RuntimeError(f"a tensor parked by layer {self.episode.key!r} was written to while it was copied to host memory")

    def __del__(self) -> None:
        # In any thread at any time, within a locked stretch of the store too: nothing but an atomic append and waits of the stream.
        if sys.is_finalizing():
            return
        for tensor, event in ((self.source, self.arrived), (self.base, self.landed)):
            if tensor is not None:
                self.copies.hold(event, self.stream)
        key = None if self.storage is None else self.storage.cdata
        events = (self.arrived, self.landed)
        remains = Remains(self.block, self.extent, events, self.copies, self.job, self.nbytes, self.number, key, self.awaited)
        if self.base is not None and self._buffers.wants(self.nbytes) and use_count(self.base) == self.base_owners:
            remains.base = self.base  # else it is freed now, or with the last tensor that was fetched from it
        self._inbox.append(remains)


def living(references: Iterable[weakref.ref[Entry]]) -> list[Entry]:
    """The entries that somebody can still ask for."""
    return [entry for reference in references if (entry := reference()) is not None]
