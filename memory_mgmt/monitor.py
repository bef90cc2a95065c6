"""Measured memory of one rank: the peak since the last reset, comparable with the plan.

CUDA: what torch's caching allocator handed out at most (``max_memory_allocated``) and held at most (``max_memory_reserved``).
CPU: growth of the process's peak resident set above the baseline taken when the monitor is made, so make it before the model.
Linux lets a process reset its own peak (VmHWM) through /proc/self/clear_refs; where that is not permitted the peak is the
one of the whole process life, and the reading says so.

What resident memory includes beyond live tensors on CPU: glibc returns a freed block to the kernel at once only if the block was
mapped on its own (larger than the mmap threshold, which grows with every mapped block that is freed, up to 32 MiB). Smaller
blocks come from the heap, where a hole below a live block stays resident. So with tensors above 32 MiB resident growth follows
live bytes closely, and below it runs up to a few tens of percent higher. MALLOC_MMAP_THRESHOLD_=1048576 in the environment
switches that off (at the price of page faults on every step). Touched code pages of libraries loaded late count too.

Try alone: ``python -m memory_mgmt.monitor``.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CGROUP_LIMITS = (  # (limit, usage): version 2, then version 1
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


@dataclass(frozen=True)
class MemoryReading:
    """One measurement. Bytes; ``reserved_bytes`` is None on CPU. ``source`` names how it was measured."""

    peak_bytes: int
    reserved_bytes: int | None
    source: str
    since_reset: bool
    """False: the peak is the one since the process started (the system does not let it be reset)."""


class MemoryMonitor:
    """Peak memory of this process on ``device`` since the last ``reset``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = device.type == "cuda"
        self._resettable = not self._cuda and _reset_peak_resident()
        self._baseline = 0 if self._cuda else resident_bytes()
        self.reset()

    @property
    def source(self) -> str:
        """How the peak is measured, in words for the console and the result files."""
        if self._cuda:
            return "cuda max_memory_allocated"
        if self._resettable:
            return "growth of peak resident set (VmHWM, reset each time)"
        return f"growth of peak resident set since process start ({'VmHWM' if _STATUS.exists() else 'ru_maxrss'})"

    def reset(self) -> None:
        """Start a new measurement: the next reading is the peak from now on."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self._resettable:
            _reset_peak_resident()

    def read(self) -> MemoryReading:
        """The peak since the last reset (CPU: above the baseline, never negative)."""
        if self._cuda:
            peak, reserved = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
            return MemoryReading(peak, reserved, self.source, since_reset=True)
        peak = _peak_resident_bytes()
        return MemoryReading(max(0, peak - self._baseline), None, self.source, since_reset=self._resettable)

    def peak_bytes(self) -> int:
        """The peak of ``read`` alone."""
        return self.read().peak_bytes

    def available_bytes(self) -> int:
        """Bytes this process could still take on the device: free memory, and on CPU no more than its cgroup allows."""
        if self._cuda:
            free, _ = torch.cuda.mem_get_info(self.device)
            return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return min([psutil.virtual_memory().available, *_cgroup_headroom()])


def resident_bytes() -> int:
    """Resident set of this process now."""
    fields = _status_fields()
    return fields["VmRSS"] if "VmRSS" in fields else psutil.Process().memory_info().rss


def _status_fields() -> dict[str, int]:
    """The kB fields of /proc/self/status in bytes; empty where there is no such file."""
    if not _STATUS.exists():
        return {}
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3 and words[2] == "kB"}


def _reset_peak_resident() -> bool:
    """Set VmHWM to the present resident set; True if the kernel permits it (man 5 proc, clear_refs value 5)."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return "VmHWM" in _status_fields()


def _peak_resident_bytes() -> int:
    """Peak resident set, since the last reset where there is one."""
    fields = _status_fields()
    if "VmHWM" in fields:
        return max(fields["VmHWM"], fields["VmRSS"])
    # Not on Linux if it can be helped: there ru_maxrss starts with the peak of the process that started this one.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def _cgroup_headroom() -> list[int]:
    """Bytes left under the memory limit of this cgroup, where one is set."""
    headroom = []
    for limit_file, usage_file in _CGROUP_LIMITS:
        try:
            limit, usage = limit_file.read_text().strip(), int(usage_file.read_text())
        except (OSError, ValueError):
            continue
        if limit != "max" and int(limit) < 2**60:  # version 1 writes a huge number for "no limit"
            headroom.append(max(0, int(limit) - usage))
    return headroom


if __name__ == "__main__":
    monitor = MemoryMonitor(torch.device("cpu"))
    block = torch.ones(64 * 2**18)
    print(monitor.read(), f"available {monitor.available_bytes() / 2**30:.1f} GiB")
