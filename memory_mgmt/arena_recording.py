"""What one training step asked the CPU allocator for, as the arena compares and plans it. Imports no torch.

Time is counted in requests: request k is made at time k, and a block lives on [k, until): ``until`` is the number of requests made
when it was freed. So two steps with the same requests can be compared and joined even where frees moved a little.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memory_mgmt.address_planning import AddressPlan, Lifetime, plan_addresses

ALIGNMENT = 64
"""Bytes; that of torch's own CPU allocator."""
LIVES_ON = np.iinfo(np.int64).max


@dataclass(frozen=True)
class StepRecord:
    """The requests of one step on its own thread, in order."""

    sizes_N: NDArray[np.int64]
    """Bytes asked for."""
    until_N: NDArray[np.int64]
    """Requests made when the block was freed; ``LIVES_ON`` if that was after the step or on another thread."""

    def repeats(self, other: StepRecord) -> bool:
        """True if both steps asked for the same sizes in the same order."""
        return np.array_equal(self.sizes_N, other.sizes_N)

    def joined(self, other: StepRecord) -> StepRecord:
        """The same requests, every block living as long as in the step in which it lived longest."""
        return StepRecord(self.sizes_N, np.maximum(self.until_N, other.until_N))


@dataclass(frozen=True)
class StepPlan:
    """Where each request of a step is served; offset -1: by the normal allocator."""

    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    addresses: AddressPlan


def step_record(rows_E3: NDArray[np.int64], thread: int, smallest: int) -> StepRecord:
    """The requests of ``thread`` for at least ``smallest`` bytes, from an allocator log's rows (block, bytes or minus bytes, thread).

    A block that another thread freed lives on: when that thread gets round to it is chance.
    """
    block_E, bytes_E, thread_E = rows_E3[:, 0], rows_E3[:, 1], rows_E3[:, 2]
    request_E = (bytes_E >= smallest) & (thread_E == thread)
    blocks_N = block_E[request_E]  # ascending: ids are given in order
    until_N = np.full(len(blocks_N), LIVES_ON)
    free_E = (bytes_E < 0) & (thread_E == thread) & np.isin(block_E, blocks_N)
    requests_before_E = np.cumsum(request_E)
    until_N[np.searchsorted(blocks_N, block_E[free_E])] = requests_before_E[free_E]
    return StepRecord(bytes_E[request_E].copy(), until_N)


def plan_step(record: StepRecord, seconds: float) -> StepPlan:
    """Addresses for every block that does not outlive the step, found within ``seconds``."""
    sizes, until = record.sizes_N.tolist(), record.until_N.tolist()
    planned = [k for k in range(len(sizes)) if until[k] != LIVES_ON]
    lifetimes = [Lifetime(k, k, until[k], -(-sizes[k] // ALIGNMENT) * ALIGNMENT) for k in planned]
    addresses = plan_addresses(lifetimes, time_limit=seconds, alignment=ALIGNMENT)
    offsets = [-1] * len(sizes)
    for k, offset in zip(planned, addresses.offsets, strict=True):
        offsets[k] = offset
    return StepPlan(tuple(sizes), tuple(offsets), addresses)
