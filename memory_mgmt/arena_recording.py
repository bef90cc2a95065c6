"""What one training step asked its allocator for, as the arena compares and plans it. Imports no torch.

Time is counted in requests: request k is made at time k, and a block lives on [k, until): ``until`` is the number of requests made
when it was freed. So two steps with the same requests can be compared and joined even where frees moved a little.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memory_mgmt.address_planning import AddressPlan, Lifetime, plan_addresses
from memory_mgmt.arena_streams import Tenant, needed_waits

SMALLEST_BYTES = {"cpu": 4096, "cuda": 1 << 20}
"""Requests below are left to the normal allocator. CUDA's caching allocator keeps those below 1 MiB in segments of their own; there are
many of them, and little in them."""
ALIGNMENT = {"cpu": 64, "cuda": 512}
"""Bytes; that of torch's own allocators."""
LIVES_ON = np.iinfo(np.int64).max


@dataclass(frozen=True)
class StepRecord:
    """The requests of one step on its own thread, in order."""

    sizes_N: NDArray[np.int64]
    """Bytes asked for."""
    until_N: NDArray[np.int64]
    """Requests made when the block was freed; ``LIVES_ON`` if that was after the step or on another thread, or other streams used it."""
    streams_N: NDArray[np.int64]
    """The stream that each request was made on, 0 on CPU."""

    def repeats(self, other: StepRecord) -> bool:
        """True if both steps asked for the same sizes in the same order, on the same streams."""
        return np.array_equal(self.sizes_N, other.sizes_N) and np.array_equal(self.streams_N, other.streams_N)

    def joined(self, other: StepRecord) -> StepRecord:
        """The same requests, every block living as long as in the step in which it lived longest."""
        return StepRecord(self.sizes_N, np.maximum(self.until_N, other.until_N), self.streams_N)


@dataclass(frozen=True)
class StepPlan:
    """Where each request of a step is served; offset -1: by the normal allocator."""

    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    addresses: AddressPlan
    streams: tuple[int, ...]
    marked: frozenset[int]
    """Requests whose end an event marks, because a tenant of their place on another stream has to wait for it."""


def step_record(rows_EC: NDArray[np.int64], thread: int, smallest: int) -> StepRecord:
    """The requests of ``thread`` for at least ``smallest`` bytes, from an allocator log's rows (block, bytes or minus bytes, thread) or
    (block, bytes or minus bytes, thread, stream), where 0 bytes say that the stream uses the block.

    A block that another thread freed lives on: when that thread gets round to it is chance. So does one that other streams were said to
    use: it is free when they have done their work, which the device's allocator finds out and a place in the plan would have to wait for.
    """
    block_E, bytes_E, thread_E = rows_EC[:, 0], rows_EC[:, 1], rows_EC[:, 2]
    request_E = (bytes_E >= smallest) & (thread_E == thread)
    blocks_N = block_E[request_E]  # ascending: ids are given in order
    until_N = np.full(len(blocks_N), LIVES_ON)
    free_E = (bytes_E < 0) & (thread_E == thread) & np.isin(block_E, blocks_N)
    requests_before_E = np.cumsum(request_E)
    until_N[np.searchsorted(blocks_N, block_E[free_E])] = requests_before_E[free_E]
    until_N[np.isin(blocks_N, block_E[bytes_E == 0])] = LIVES_ON
    streams_N = rows_EC[request_E, 3] if rows_EC.shape[1] > 3 else np.zeros(len(blocks_N), dtype=np.int64)
    return StepRecord(bytes_E[request_E].copy(), until_N, streams_N.copy())


def plan_step(record: StepRecord, seconds: float, alignment: int) -> StepPlan:
    """Addresses for every block that does not outlive the step, multiples of ``alignment`` bytes, found within ``seconds``."""
    sizes, until = record.sizes_N.tolist(), record.until_N.tolist()
    planned = [k for k in range(len(sizes)) if until[k] != LIVES_ON]
    lifetimes = [Lifetime(k, k, until[k], -(-sizes[k] // alignment) * alignment) for k in planned]
    addresses = plan_addresses(lifetimes, time_limit=seconds, alignment=alignment)
    offsets = [-1] * len(sizes)
    for k, offset in zip(planned, addresses.offsets, strict=True):
        offsets[k] = offset
    streams = record.streams_N.tolist()
    tenants = [Tenant(k, until[k], offsets[k], life.size, streams[k]) for k, life in zip(planned, lifetimes, strict=True)]
    marked = frozenset(planned[wait.before] for wait in needed_waits(tenants))
    return StepPlan(tuple(sizes), tuple(offsets), addresses, tuple(streams), marked)
