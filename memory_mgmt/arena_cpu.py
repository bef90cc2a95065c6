"""The arena on CPU: ``arena_cpu.cpp`` in front of torch's CPU allocator."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator

from memory_mgmt.allocator_log import record_cpu_allocations
from memory_mgmt.arena_native import installed_library, new_plan
from memory_mgmt.arena_recording import ALIGNMENT, SMALLEST_BYTES, StepPlan, StepRecord, step_record
from memory_mgmt.host_allocator import return_freed_memory


class CpuBackend:
    """What ``Arena`` needs of a CPU."""

    alignment = ALIGNMENT["cpu"]
    smallest_bytes = SMALLEST_BYTES["cpu"]

    def __init__(self) -> None:
        """Raises NoCompiler or RuntimeError where the allocator cannot be built or installed."""
        self.lib = installed_library()
        return_freed_memory()  # where there is no such setting (not glibc) only the steps that are watched are larger

    @contextlib.contextmanager
    def recording(self) -> Iterator[Callable[[int], StepRecord]]:
        """Log the requests inside; what is yielded gives the record, of requests of at least so many bytes, afterwards."""
        with record_cpu_allocations() as log:
            yield lambda smallest: step_record(log.rows_E3, log.thread, smallest)

    def new_plan(self, plan: StepPlan) -> int:
        """Handle of a native plan."""
        return new_plan(self.lib, plan.sizes, plan.offsets)

    def new_region(self, size: int) -> int | None:
        """Handle of a region; None where the system gives no such address space."""
        return self.lib.lsa_region_new(size)

    def trim(self) -> None:
        """Give the C library's free heap back: the steps that were recorded left the size of a whole step in it."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)

    def around(self) -> contextlib.AbstractContextManager[object]:
        """Around a step: nothing; without a CUDA device the backward pass runs on the thread that calls it."""
        return contextlib.nullcontext()
