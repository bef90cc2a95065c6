"""Host memory for offloaded tensors: a few large slabs that are mapped once and reused in every step.

A slab is page-aligned memory of exactly the size that is missing, at most 4 GiB, registered with CUDA (page-locked) where there is a
GPU. torch's own pinned allocator rounds requests up to powers of two (pytorch#95823: 10 GiB locked for 6 GiB asked), and one
``cudaHostAlloc`` per tensor costs milliseconds in every step (pytorch#186162). A block may be spread over several free ranges, so
slabs grow only when all free ranges together are too small: a step that needs no more than an earlier one maps and locks nothing.

What it does not do: copies (offload.py), the disk tier (offload_disk.py). Not thread-safe: the store holds its lock around it.
Try alone: ``python -c "from memory_mgmt.host_memory import HostMemory; print(HostMemory(1 << 20).take(1000).nbytes)"``.
"""

from __future__ import annotations

import bisect
import math
import mmap
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memory_mgmt.devices import GIB, MIB
from models.errors import UserError

MAX_SLAB_BYTES = 4 * GIB
GROWTH_BYTES = 64 * MIB
"""A slab is at least this large where the budget allows it, so that small tensors share one."""
ALIGNMENT = 64
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every CUDA context of the process


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes [start, stop) of a slab (or of a file)."""

    region: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start


def rounded(nbytes: int) -> int:
    """Bytes that a block of ``nbytes`` takes in a slab."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def in_slabs(sizes: Sequence[int], most: int = MAX_SLAB_BYTES) -> list[list[int]]:
    """Blocks of these sizes, in order, dealt to slabs of at most ``most`` bytes; one that is larger is alone."""
    groups: list[list[int]] = []
    filled = 0
    for nbytes in sizes:
        if not groups or filled + rounded(nbytes) > most:
            groups.append([])
            filled = 0
        groups[-1].append(nbytes)
        filled += rounded(nbytes)
    return groups


class FreeRanges:
    """Free ranges of numbered regions; neighbours are merged."""

    def __init__(self) -> None:
        self._ranges: list[Range] = []
        self.size = 0
        """Free bytes in total."""

    def add(self, free: Range) -> None:
        """Note that a range is free."""
        if not free.size:
            return
        i = bisect.bisect_left(self._ranges, (free.region, free.start), key=lambda r: (r.region, r.start))
        self.size += free.size
        if i < len(self._ranges) and self._touch(free, self._ranges[i]):
            free = Range(free.region, free.start, self._ranges.pop(i).stop)
        if i and self._touch(self._ranges[i - 1], free):
            i -= 1
            free = Range(free.region, self._ranges.pop(i).start, free.stop)
        self._ranges.insert(i, free)

    @staticmethod
    def _touch(left: Range, right: Range) -> bool:
        return left.region == right.region and left.stop == right.start

    def take(self, size: int) -> list[Range]:
        """``size`` bytes: the smallest range that holds them, else as few ranges as possible. Raises ValueError if there are too few."""
        if size > self.size:
            raise ValueError(f"{size} bytes asked of {self.size} free ones")
        fitting = [r for r in self._ranges if r.size >= size]
        if fitting:
            return [self._carve(min(fitting, key=lambda r: r.size), size)]
        taken: list[Range] = []
        for r in sorted(self._ranges, key=lambda r: -r.size):
            taken.append(self._carve(r, min(size, r.size)))
            size -= taken[-1].size
            if not size:
                break
        return taken

    def _carve(self, r: Range, size: int) -> Range:
        i = self._ranges.index(r)
        self._ranges[i : i + 1] = [] if size == r.size else [Range(r.region, r.start + size, r.stop)]
        self.size -= size
        return Range(r.region, r.start, r.start + size)


@dataclass(slots=True)
class HostBlock:
    """Host memory for ``nbytes`` bytes, in one or several pieces (uint8, flat, in order)."""

    nbytes: int
    pieces: list[Tensor]
    ranges: list[Range] | None
    """Where in the slabs; None: memory of its own (fake tensors)."""


class HostMemory:
    """Slabs and the blocks cut from them.

    ``budget_bytes``: limit on all slabs together; None: none. ``cuda_device``: register slabs with CUDA and touch them first on the
    CPUs of that GPU's NUMA node. ``pageable``, with ``pageable_reason``: registration failed, copies are slower and block.
    """

    def __init__(self, budget_bytes: int | None = None, *, cuda_device: torch.device | None = None) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = self.peak_bytes = self.reserved_bytes = self._held_bytes = 0
        self.pageable_reason = "" if cuda_device else "there is no GPU to lock it for"
        self._cuda_device = cuda_device
        self._slabs: list[Tensor] = []
        self._locked: list[Tensor] = []
        self._free = FreeRanges()

    @property
    def pageable(self) -> bool:
        """True when (some of) the memory is not page-locked."""
        return bool(self.pageable_reason)

    @property
    def free_bytes(self) -> int:
        """Mapped and not in use."""
        return self._free.size

    @property
    def available_bytes(self) -> float:
        """What the budget leaves, mapped or not."""
        return math.inf if self.budget_bytes is None else self.budget_bytes - self._held_bytes

    @property
    def n_slabs(self) -> int:
        """Slabs mapped so far; constant in the steady state."""
        return len(self._slabs)

    def take(self, nbytes: int) -> HostBlock | None:
        """A block, or None when the budget does not allow it. Raises UserError when the machine has no memory left."""
        size = rounded(nbytes)
        if size > self._free.size and not self.reserve(self.reserved_bytes - self._free.size + size):
            return None
        ranges = self._free.take(size)
        left, pieces = nbytes, []
        for r in ranges:
            pieces.append(self._slabs[r.region][r.start : min(r.stop, r.start + left)])
            left -= r.size
        return self._taken(HostBlock(nbytes, pieces, ranges))

    def take_whole(self, sizes: Sequence[int]) -> list[HostBlock] | None:
        """Blocks in one piece each, in slabs of their own that waste nothing: for what stays. A block larger than a slab makes its slab
        as large as itself. None, and nothing done, when the budget does not allow all of them."""
        if self.budget_bytes is not None and self.reserved_bytes + sum(map(rounded, sizes)) > self.budget_bytes:
            return None
        blocks: list[HostBlock] = []
        for group in in_slabs(sizes):
            region, start = self._add_slab(max(ALIGNMENT, sum(map(rounded, group)))), 0
            for nbytes in group:
                where = Range(region, start, start + rounded(nbytes))
                blocks.append(self._taken(HostBlock(nbytes, [self._slabs[region][start : start + nbytes]], [where])))
                start = where.stop
        return blocks

    def take_separate(self, nbytes: int, empty: Callable[[int], Tensor]) -> HostBlock | None:
        """A block in memory of its own, made by ``empty(nbytes)``: for fake tensors. None when the budget does not allow it."""
        if rounded(nbytes) > self.available_bytes:
            return None
        return self._taken(HostBlock(nbytes, [empty(nbytes)], None))

    def _taken(self, block: HostBlock) -> HostBlock:
        self.used_bytes += block.nbytes
        self._held_bytes += rounded(block.nbytes)
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return block

    def give(self, block: HostBlock) -> None:
        """Take a block back for reuse; nobody may read or write its pieces any more."""
        self.used_bytes -= block.nbytes
        self._held_bytes -= rounded(block.nbytes)
        for r in block.ranges or ():
            self._free.add(r)
        block.pieces, block.ranges = [], None

    def reserve(self, total_bytes: int) -> bool:
        """Map slabs until they hold ``total_bytes``; False, and nothing done, when that is above the budget."""
        if self.budget_bytes is not None and total_bytes > self.budget_bytes:
            return False
        while self.reserved_bytes < total_bytes:
            size = max(total_bytes - self.reserved_bytes, GROWTH_BYTES)
            if self.budget_bytes is not None:
                size = min(size, self.budget_bytes - self.reserved_bytes)
            self._grow(min(size, MAX_SLAB_BYTES))
        return True

    def _grow(self, size: int) -> None:
        self._free.add(Range(self._add_slab(size), 0, size))

    def _add_slab(self, size: int) -> int:
        """Map a slab; its number."""
        slab = self._map(size)
        if self._cuda_device is not None and not self.pageable_reason:
            self._lock(slab)
        self._slabs.append(slab)
        self.reserved_bytes += size
        return len(self._slabs) - 1

    def _map(self, size: int) -> Tensor:
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            memory = mmap.mmap(-1, pages, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise UserError(
                f"memory.host_gib: the machine gives no {size / GIB:.2f} GiB more of host memory ({error.strerror}); "
                f"{self.reserved_bytes / GIB:.2f} GiB are in use for offload. Lower memory.host_gib or set memory.offload_dir"
            ) from None
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):  # a forked data worker must not copy or pin these pages
            try:
                memory.madvise(getattr(mmap, advice))
            except (AttributeError, OSError):  # not Linux, or a kernel without huge pages: slower, not wrong
                continue
        return torch.frombuffer(memory, dtype=torch.uint8)

    def _lock(self, slab: Tensor) -> None:
        assert self._cuda_device is not None
        touch_first(slab, numa_cpus(self._cuda_device))
        error = int(_cudart().cudaHostRegister(slab.data_ptr(), slab.numel(), _PORTABLE))
        if not error:
            self._locked.append(slab)
            return
        self.pageable_reason = f"cudaHostRegister of {slab.numel() / GIB:.2f} GiB failed with CUDA error {error}"
        _forget_cuda_error(self._cuda_device)
        warnings.warn(
            f"host memory for offload is not page-locked, copies will be slower: {self.pageable_reason} "
            f"after {sum(s.numel() for s in self._locked) / GIB:.2f} GiB. Lower memory.host_gib, or raise the limit of locked memory",
            RuntimeWarning,
            stacklevel=2,
        )

    def close(self) -> None:
        """Unlock and unmap all slabs. No copy may be under way."""
        for slab in self._locked:
            _cudart().cudaHostUnregister(slab.data_ptr())
        self._locked, self._slabs, self._free = [], [], FreeRanges()
        self.reserved_bytes = self.used_bytes = self._held_bytes = 0

    def __del__(self) -> None:
        # Pages must not be unmapped while CUDA has them registered.
        if getattr(self, "_locked", None) and not sys.is_finalizing():
            self.close()


def _cudart() -> Any:
    """The CUDA runtime that torch uses."""
    return torch.cuda.cudart()


def _forget_cuda_error(device: torch.device) -> None:
    """A failed runtime call stays behind as CUDA's last error, and the next kernel launch would report it as its own."""
    try:
        torch.zeros(1, device=device)
    except RuntimeError:
        return


def touch_first(slab: Tensor, cpus: Iterable[int] | None) -> None:
    """Write every page from a thread that runs on ``cpus`` (None: where this thread may run), so that Linux takes the pages from
    their NUMA node."""

    def work() -> None:
        if cpus is not None:
            os.sched_setaffinity(0, cpus)  # 0: this thread only; the threads that zero_ starts inherit it
        slab.zero_()

    thread = threading.Thread(target=work, name="touch host slab")
    thread.start()
    thread.join()


def numa_cpus(device: torch.device, sysfs: Path = Path("/sys")) -> set[int] | None:
    """CPUs this process may use on the NUMA node of a GPU; None when Linux does not say or there are none."""
    card = torch.cuda.get_device_properties(device)
    bus = tuple(getattr(card, name, None) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id"))
    if None in bus:
        return None
    try:
        node = int((sysfs / "bus/pci/devices" / "{:04x}:{:02x}:{:02x}.0".format(*bus) / "numa_node").read_text())
        listed = (sysfs / f"devices/system/node/node{node}/cpulist").read_text()
    except (OSError, ValueError):
        return None
    return (parse_cpulist(listed) & os.sched_getaffinity(0)) or None


def parse_cpulist(text: str) -> set[int]:
    """``0-3,8`` -> {0, 1, 2, 3, 8}, as Linux writes sets of CPUs."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus
