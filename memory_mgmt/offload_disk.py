"""The disk tier: tensors that do not fit in host memory, in one file per store.

The file is unlinked as soon as it is open, so that nothing stays behind when a run is killed; its space is reused in every step and
given back by ``close``. One thread does the reading and writing; at most ``QUEUE_LENGTH`` jobs wait, more block the caller.
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from memory_mgmt.devices import GIB
from memory_mgmt.host_memory import FreeRanges, Range
from models.errors import UserError

QUEUE_LENGTH = 4
_CHUNK = 256 * 2**20


class DiskTier:
    """A file that holds tensors. ``write`` and ``free`` are for one thread at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix="longstride-offload-", dir=directory)
            Path(name).unlink()
        except OSError as error:
            raise UserError(
                f"memory.offload_dir: cannot write to {directory} ({error.strerror}); name a directory on a local disk"
            ) from None
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        self.used_bytes = self._end = 0
        self._free = FreeRanges()
        self._thread = ThreadPoolExecutor(1, "offload disk")
        self._slots = threading.BoundedSemaphore(QUEUE_LENGTH)

    def write(self, pieces: Sequence[Tensor], ready: Callable[[], None]) -> tuple[list[Range], Future[None]]:
        """Start writing the pieces, after ``ready()`` returns; gives where, and the job. They must not change until it is done."""
        nbytes = sum(piece.numel() for piece in pieces)
        if nbytes > self._free.size:
            missing = nbytes - self._free.size
            self._free.add(Range(0, self._end, self._end + missing))
            self._end += missing
        ranges = self._free.take(nbytes)
        self.used_bytes += nbytes

        def work() -> None:
            ready()
            self._move(os.pwrite, pieces, ranges)

        return ranges, self._submit(work)

    def read(self, ranges: Sequence[Range], pieces: Sequence[Tensor]) -> Future[None]:
        """Start reading what was written into ``pieces`` of the same size in total."""
        return self._submit(lambda: self._move(lambda fd, part, at: os.preadv(fd, [part], at), pieces, ranges))

    def free(self, ranges: Sequence[Range]) -> None:
        """The ranges may be written anew; no job on them is under way."""
        for r in ranges:
            self._free.add(r)
            self.used_bytes -= r.size

    def _submit(self, work: Callable[[], None]) -> Future[None]:
        self._slots.acquire()
        job = self._thread.submit(work)
        job.add_done_callback(lambda _: self._slots.release())
        return job

    def _move(self, call: Callable[[int, memoryview, int], int], pieces: Sequence[Tensor], ranges: Sequence[Range]) -> None:
        places = [(r.start, r.size) for r in ranges]
        for piece in pieces:
            data = memoryview(cast(Any, piece.numpy()))
            while data:
                start, size = places.pop(0)
                try:
                    moved = call(self._file.fileno(), data[: min(size, _CHUNK)], start)
                except OSError as error:
                    raise self._error(error) from None
                if not moved:
                    raise self._error(OSError(errno.EIO, "the file is shorter than what was written"))
                if moved < size:
                    places.insert(0, (start + moved, size - moved))
                data = data[moved:]

    def _error(self, error: OSError) -> UserError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            held = f"the disk of {self.directory} is full; offload has {self.used_bytes / GIB:.2f} GiB there"
            return UserError(f"memory.offload_dir: {held}. Free space, or raise memory.host_gib")
        return UserError(f"memory.offload_dir: {self.directory}: {error.strerror}")

    def close(self) -> None:
        """Wait for the jobs and give the space back."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._file.close()
