"""What a process holds that no trace of its tensors shows, term by term. Imports no torch.

CPU: libraries that load late, the interpreter, and the holes of the C library's heap. CUDA: the context, cuBLAS's workspace, NCCL's
buffers, and what the caching allocator reserves above what is active.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate

from memory_mgmt.devices import GIB, MIB, Device
from memory_mgmt.plan import Kind, Term
from memory_mgmt.trace import TracedBuffer

# Measured on Linux x86-64, torch 2.13, glibc 2.36.
CPU_LIBRARIES = 26 * MIB
"""Growth of a CPU rank in its first step that no tensor explains: kernels and libraries loaded late, scratch of oneDNN and MKL."""
ONEDNN_KERNEL = 3 * MIB // 4
"""A kernel that oneDNN writes for one shape (``op_kernels.py``): 0.52 MiB that stay in use; they lie between tensors in the C library's
heap, where 0.6 to 0.8 MiB were measured to become resident for each."""
ONEDNN_KERNELS = 1024
"""oneDNN keeps so many and forgets the one not used for longest (ONEDNN_PRIMITIVE_CACHE_CAPACITY)."""
ONEDNN_LIBRARY = 9 * MIB // 2
"""Pages of oneDNN's own code that writing kernels loads."""
CPU_RANK = 8 * MIB
"""The same for being one of several ranks: FSDP, gloo threads and their buffers."""
CPU_PROCESS = 400 * MIB
"""A process that imported torch and the trainer, before it builds anything."""
CUBLAS_WORKSPACE = 32 * MIB
"""One handle on compute capability 9 (Megatron-LM issue 6936); smaller before."""
NCCL_BUFFERS = GIB // 2
MALLOC_SLACK = 64 + 32
"""glibc 2.36 serves an aligned request from a free block only if it could be aligned anywhere in it: a hole that the same request left
behind is too small for it."""
SEGMENT = 2 * MIB
"""Unit in which the caching allocator maps memory with expandable segments."""


def fixed_terms(device: Device, ranks: int, onednn_kernels: int = 0) -> list[Term]:
    """What is there at any moment of the step; ``onednn_kernels``: how many its low-precision products have on CPU."""

    def term(name: str, kind: Kind, size: int, text: str) -> Term:
        return Term(name, kind, size, size, text)

    if device.is_cuda:
        terms = [
            term("cuBLAS workspace", "overhead", CUBLAS_WORKSPACE, "32 MiB per handle"),
            term("CUDA context", "outside", device.context_bytes, "context and library handles"),
        ]
        return terms + ([term("NCCL buffers", "outside", NCCL_BUFFERS, "channels of the process groups")] if ranks > 1 else [])
    libraries = CPU_LIBRARIES + (CPU_RANK if ranks > 1 else 0)
    terms = [
        term("libraries", "overhead", libraries, "measured, not derived: code and scratch of kernels loaded in the first step"),
        term("process", "outside", CPU_PROCESS, "interpreter, torch and the trainer before anything is built"),
    ]
    if onednn_kernels:
        kernels = min(onednn_kernels, ONEDNN_KERNELS)
        text = f"written for the shapes of {kernels} low-precision products and kept: {ONEDNN_KERNEL / MIB:g} MiB each, measured"
        terms.append(term("oneDNN kernels", "overhead", ONEDNN_LIBRARY + kernels * ONEDNN_KERNEL, text))
    return terms


def reserved_peak(buffers: Iterable[TracedBuffer], unit: int = SEGMENT, slack: int = 0) -> int:
    """Bytes that a growing best-fit heap takes for ``buffers``, rounded up to ``unit``: what CUDA's caching allocator holds with
    expandable segments, and what the C library's heap holds for blocks below its mmap threshold.

    A request takes the smallest free range that it fits in, else the end of the heap grows; neighbouring free ranges join; nothing is
    given back. ``slack``: a free range must be so much larger than the request.
    """
    events = sorted((time, begins, buffer.id, buffer.size) for buffer in buffers for time, begins in ((buffer.lower, 1), (buffer.upper, 0)))
    heap = _Heap(slack)
    places: dict[int, int] = {}
    for _, begins, buffer_id, size in events:
        if begins:
            places[buffer_id] = heap.take(size)
        else:
            heap.give(places.pop(buffer_id), size)
    return -(-heap.top // unit) * unit


def reserved_by_streams(buffers: Iterable[TracedBuffer]) -> int:
    """Bytes that CUDA's caching allocator holds for ``buffers``: every stream has a pool of its own, and none takes what another freed."""
    pools: dict[str, list[TracedBuffer]] = {}
    for buffer in buffers:
        pools.setdefault(buffer.stream, []).append(buffer)
    return sum(reserved_peak(pool) for pool in pools.values())


def resident_peak(buffers: Sequence[TracedBuffer], mmap_threshold: int) -> int:
    """Bytes a CPU process holds for ``buffers``: those from ``mmap_threshold`` up are mapped and given back one by one, the others come
    from the heap, which does not shrink."""
    mapped = [buffer for buffer in buffers if buffer.size >= mmap_threshold]
    heap = reserved_peak((buffer for buffer in buffers if buffer.size < mmap_threshold), unit=1, slack=MALLOC_SLACK)
    return heap + live_peak(mapped)


def live_peak(buffers: Iterable[TracedBuffer]) -> int:
    """The most bytes of ``buffers`` that are live at once."""
    changes: Counter[int] = Counter()
    for buffer in buffers:
        changes[buffer.lower] += buffer.size
        changes[buffer.upper] -= buffer.size
    return max(accumulate(changes[time] for time in sorted(changes)), default=0)


class _Heap:
    """Free ranges of a heap by size and by their ends."""

    def __init__(self, slack: int) -> None:
        self.top = 0
        self._slack = slack
        self._by_size: list[tuple[int, int]] = []  # (size, start), sorted
        self._size_at: dict[int, int] = {}  # start -> size
        self._start_before: dict[int, int] = {}  # end -> start

    def take(self, size: int) -> int:
        """The start of a range of ``size`` bytes that is used from now on."""
        index = bisect_left(self._by_size, (size + self._slack, -1))
        if index < len(self._by_size):
            start = self._by_size[index][1]
            left = self._remove(start) - size
            if left:
                self._add(start + size, left)
            return start
        start = self._start_before.get(self.top, self.top)  # the last free range grows with the heap
        if start < self.top:
            self._remove(start)
        self.top = start + size
        return start

    def give(self, start: int, size: int) -> None:
        """The range is free again."""
        if start + size in self._size_at:
            size += self._remove(start + size)
        before = self._start_before.get(start)
        if before is not None:
            size += self._remove(before)
            start = before
        self._add(start, size)

    def _add(self, start: int, size: int) -> None:
        self._size_at[start] = size
        self._start_before[start + size] = start
        insort(self._by_size, (size, start))

    def _remove(self, start: int) -> int:
        size = self._size_at.pop(start)
        del self._start_before[start + size]
        del self._by_size[bisect_left(self._by_size, (size, start))]
        return size
