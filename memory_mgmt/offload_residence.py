"""Which stored bytes are in host memory and which on disk, within the budget.

The oldest tensors go to disk: the backward pass needs them last. They are written ahead of need, by the disk tier's thread, once host
memory is three quarters full. What comes back from disk passes through a host block and keeps its place on disk. Fake tensors follow
the same rules without a disk. Used by the store only, under its lock.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from memory_mgmt.host_memory import HostBlock, HostMemory, rounded
from memory_mgmt.offload_disk import QUEUE_LENGTH, DiskTier
from memory_mgmt.offload_entries import Entry, Remains
from models.errors import UserError

SPILL_SHARE = 0.75


class Residence:
    """Host blocks and disk space of all entries. ``inbox`` takes what dead entries leave behind."""

    def __init__(self, memory: HostMemory, directory: Path | None, fake_empty: Callable[[int], Tensor]) -> None:
        self.memory, self.directory, self._fake_empty = memory, directory, fake_empty
        self.inbox: deque[Remains] = deque()
        self.written_bytes = 0
        self.waited_seconds = 0.0
        """Host time spent waiting for the disk, or for copies to free a block."""
        self._disk: DiskTier | None = None
        self._draining: list[Remains] = []
        self._died: list[Remains] = []
        self._entries: dict[int, weakref.ref[Entry]] = {}
        self._writing: list[weakref.ref[Entry]] = []
        self._failure: UserError | None = None

    @property
    def used_bytes(self) -> int:
        """Host memory of living entries."""
        return self.memory.used_bytes - sum(r.block.nbytes for r in self._draining if r.block is not None)

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk now."""
        return 0 if self._disk is None else self._disk.used_bytes

    def collect(self) -> list[Remains]:
        """Reclaim what is free by now; gives the remains of entries that have died since the last call."""
        self._reclaim_all()
        died, self._died = self._died, []
        return died

    def _reclaim_all(self) -> None:
        while self.inbox:
            remains = self.inbox.popleft()
            self._entries.pop(remains.number or 0, None)
            self._draining.append(remains)
            self._died.append(remains)
        self._draining = [remains for remains in self._draining if not self._reclaim(remains)]
        self._writing = [ref for ref in self._writing if not self._settle_write(ref())]

    def _reclaim(self, remains: Remains) -> bool:
        if not remains.done():
            return False
        if remains.block is not None:
            self.memory.give(remains.block)
        if remains.extent and self._disk is not None:
            self._disk.free(remains.extent)
        remains.block = remains.extent = None
        return True

    # --- host memory ----------------------------------------------------------------------------------------------------------

    def place(self, entry: Entry) -> None:
        """Give a new entry its host block. Raises UserError when it does not fit."""
        entry.block = self._take(entry.nbytes, entry.mode)
        self._entries[entry.number] = weakref.ref(entry)

    def _take(self, nbytes: int, mode: Any) -> HostBlock:
        budget = self.memory.budget_bytes
        if budget is not None and rounded(nbytes) > budget:
            raise self._too_little(nbytes, nbytes)
        while True:
            self.check()
            # Waiting for a copy that is under way comes before locking more memory: the steady state locks none.
            if self._draining and not mode and rounded(nbytes) > self.memory.free_bytes:
                with self._waiting():
                    self._draining[0].wait()
                self._reclaim_all()
                continue
            block = self.memory.take_separate(nbytes, self._fake_empty) if mode else self.memory.take(nbytes)
            if block is not None:
                return block
            self._make_room(nbytes)

    def keep(self, sizes: Sequence[int], what: str, mode: Any) -> list[HostBlock]:
        """Blocks in one piece each, for good. Raises UserError when they do not all fit: what is kept never goes to disk."""
        blocks = [self.memory.take_separate(n, self._fake_empty) for n in sizes] if mode else self.memory.take_whole(sizes)
        if blocks is None or None in blocks:
            budget = self.memory.budget_bytes or 0
            setting = "offload_parameters" if what == "the parameters" else "offload_optimizer"
            raise UserError(
                f"memory.host_gib: {what} take {size_text(sum(map(rounded, sizes)))} of host memory, and this rank may take "
                f"{size_text(budget)}\nraise memory.host_gib, shard over more ranks, or set memory.{setting}=none"
            )
        return [block for block in blocks if block is not None]

    def reserve(self, nbytes: int) -> None:
        """Map host memory for ``nbytes`` in all. Raises UserError above the budget."""
        if not self.memory.reserve(nbytes):
            raise self._too_little(nbytes, nbytes)

    def _make_room(self, nbytes: int) -> None:
        """Start writing the oldest entries out, and wait for the first of them."""
        if self.directory is None:
            raise self._too_little(nbytes, self.memory.used_bytes + nbytes)
        self.write_ahead(rounded(nbytes))
        written = next((entry for ref in self._writing if (entry := ref()) is not None), None)
        if written is None and not self._draining:
            raise self._too_little(nbytes, self.memory.used_bytes + nbytes)
        if written is not None and written.job is not None:
            with self._waiting():
                written.job.exception()
                written.copies.finish(written.landed)
        self._reclaim_all()

    def _too_little(self, nbytes: int, total: int) -> UserError:
        budget = self.memory.budget_bytes or 0
        return UserError(
            f"memory.host_gib: offloading {size_text(nbytes)} more makes {size_text(total)} of host memory, and this rank may take "
            f"{size_text(budget)}. Raise memory.host_gib, set memory.offload_dir, or offload less (memory.offload)"
        )

    # --- disk -----------------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise what went wrong in the background."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def write_ahead(self, spare: float | None = None) -> None:
        """Write the oldest entries out until ``spare`` bytes (default: a quarter) of the budget are free, as the queue takes them."""
        if self.directory is None or self.memory.budget_bytes is None:
            return
        spare = (1 - SPILL_SHARE) * self.memory.budget_bytes if spare is None else spare
        going = sum(rounded(entry.nbytes) for ref in self._writing if (entry := ref()) is not None)
        for ref in list(self._entries.values()):
            if self.memory.available_bytes + going >= spare or len(self._writing) >= QUEUE_LENGTH:
                return
            entry = ref()
            if entry is not None and entry.block is not None and entry.job is None and not entry.on_disk:
                self._write(entry)
                going += rounded(entry.nbytes)

    def _write(self, entry: Entry) -> None:
        assert entry.block is not None and self.directory is not None
        if entry.mode:
            entry.extent = []
        else:
            self._disk = self._disk or DiskTier(self.directory)
            # The job must not hold the entry: it may die while it is written.
            entry.extent, entry.job = self._disk.write(entry.block.pieces, partial(entry.copies.finish, entry.arrived))
        self.written_bytes += entry.nbytes
        self._writing.append(weakref.ref(entry))

    def _settle_write(self, entry: Entry | None) -> bool:
        """Has the entry's write been dealt with?"""
        if entry is None:
            return True
        if (entry.job is not None and not entry.job.done()) or not entry.copies.finished(entry.landed):
            return False
        error = entry.job.exception() if entry.job is not None else None
        entry.job = None
        if error is None:
            assert entry.block is not None
            self.memory.give(entry.block)
            entry.block, entry.on_disk = None, True
        else:
            assert self._disk is not None and entry.extent is not None
            self._disk.free(entry.extent)
            entry.extent = None
            self._failure = error if isinstance(error, UserError) else UserError(f"memory.offload_dir: {error}")
        return True

    def start_reading(self, entry: Entry) -> None:
        """Begin to bring an entry from disk into a host block; nothing to do when it has one."""
        if entry.block is not None:
            return
        entry.block = self._take(entry.nbytes, entry.mode)
        if not entry.mode:
            assert self._disk is not None and entry.extent is not None
            entry.job = self._disk.read(entry.extent, entry.block.pieces)

    def finish_reading(self, entry: Entry) -> None:
        """Wait until it is there. Raises UserError when the disk failed."""
        if entry.on_disk and entry.job is not None:
            job, entry.job = entry.job, None
            with self._waiting():
                job.result()

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.waited_seconds += time.perf_counter() - start

    def leave_block(self, entry: Entry) -> None:
        """An entry that lives on disk is back on the device (or on its way there): its host block can go."""
        if entry.on_disk:
            self._draining.append(Remains(entry.block, None, (entry.landed,), entry.copies))
            entry.block = None

    def close(self) -> None:
        """Give back all host memory and disk space; waits for jobs and copies."""
        self._reclaim_all()
        for ref in self._entries.values():
            entry = ref()
            if entry is not None:
                entry.copies.finish(entry.arrived)
                entry.copies.finish(entry.landed)
                entry.block = entry.extent = None
        for remains in self._draining:
            remains.wait()
        if self._disk is not None:
            self._disk.close()
        self._draining, self._entries, self._writing = [], {}, []
        self.memory.close()


def size_text(nbytes: float) -> str:
    """``1.50 GiB``, or KiB and MiB for what is smaller."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"
