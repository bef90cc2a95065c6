"""The real CPU allocator's log: every allocation and every free behind torch's CPU tensors, in order, with size and thread.

It sees what no dispatch mode sees: workspaces that kernels take and give back, oneDNN's scratch memory, temporaries of the autograd
engine. Sizes are the bytes asked for. Frees of blocks that were made before the first log are not seen.

Try alone: ``python -m memory_mgmt.allocator_log``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from memory_mgmt.arena_native import installed_library


@dataclass(frozen=True, slots=True)
class LoggedBlock:
    """One allocation. ``made`` and ``freed`` are indices of events; ``freed`` None: it lives on."""

    id: int
    size: int
    made: int
    freed: int | None
    thread: int
    freed_by: int | None


class AllocationLog:
    """What was logged so far. Positions are indices of events; ``mark()`` gives the present one."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self._lib: ctypes.CDLL | None = lib
        self._first = lib.lsa_log_size()  # another log may be running
        self._rows_E3 = np.empty((0, 3), dtype=np.int64)
        self.thread: int = lib.lsa_thread()
        """The thread that opened the log, as ``LoggedBlock.thread`` numbers it."""

    @property
    def rows_E3(self) -> NDArray[np.int64]:
        """Every event as (id of the block, bytes allocated or minus the bytes freed, thread), [events, 3]."""
        self._read()
        return self._rows_E3

    def mark(self) -> int:
        """The number of events so far: a position for ``peak_bytes`` and ``live_bytes``."""
        return self._lib.lsa_log_size() - self._first if self._lib is not None else len(self._rows_E3)

    def live_bytes(self, start: int = 0, stop: int | None = None) -> int:
        """Bytes allocated minus bytes freed between two positions."""
        return int(self.rows_E3[start:stop, 1].sum())

    def peak_bytes(self, start: int = 0, stop: int | None = None) -> int:
        """The most that was live at once between two positions, above what was live at the first one; never negative."""
        deltas_E = self.rows_E3[start:stop, 1]
        return max(0, int(np.cumsum(deltas_E).max())) if len(deltas_E) else 0

    def blocks(self, start: int = 0, stop: int | None = None) -> list[LoggedBlock]:
        """The blocks made between two positions, in order; a free after ``stop`` counts as none."""
        rows = self.rows_E3[start:stop].tolist()
        made: dict[int, tuple[int, int, int]] = {}
        freed: dict[int, tuple[int, int]] = {}
        for position, (block, size, thread) in enumerate(rows, start):
            if size > 0:
                made[block] = (size, position, thread)
            else:
                freed[block] = (position, thread)
        ends = {block: freed.get(block, (None, None)) for block in made}
        return [LoggedBlock(block, size, at, ends[block][0], thread, ends[block][1]) for block, (size, at, thread) in made.items()]

    def _read(self) -> None:
        if self._lib is None:
            return
        count = self.mark() - len(self._rows_E3)
        new_E3 = np.empty((count, 3), dtype=np.int64)
        self._lib.lsa_log_read(self._first + len(self._rows_E3), count, new_E3.ctypes.data)
        self._rows_E3 = np.concatenate([self._rows_E3, new_E3])

    def _close(self) -> None:
        self._read()
        self._lib = None


@contextmanager
def record_cpu_allocations() -> Iterator[AllocationLog]:
    """Log every allocation and free of CPU tensors inside the ``with``, on all threads; logs may be nested.

    Enter it before the model is made where frees of its tensors matter, and give positions (``mark``) to look at one step.
    Raises NoCompiler or RuntimeError where the native allocator cannot be built or installed.
    """
    lib = installed_library()
    lib.lsa_log_start()
    log = AllocationLog(lib)
    try:
        yield log
    finally:
        log._close()
        lib.lsa_log_stop()


if __name__ == "__main__":
    with record_cpu_allocations() as recorded:
        x_NN = torch.randn(512, 512, requires_grad=True)
        (x_NN @ x_NN).relu().sum().backward()
    for entry in recorded.blocks():
        print(entry)
    print(f"peak {recorded.peak_bytes():,} bytes, live {recorded.live_bytes():,} bytes")
