"""Serve the tensors of a training step from one region of memory at planned addresses.

A step asks the allocator for the same sizes in the same order every time. ``Arena`` watches a few steps, plans an address for every
block that dies within the step, and then serves the k-th request at its planned place: the resident set is the height of the plan
instead of what a general-purpose heap makes of it. A step that goes another way stays correct: an address is handed out only where
no block lives, everything else goes to the normal allocator and is counted, and a plan that no longer fits is made anew.

    arena = Arena()
    for batch in batches:
        with arena.step(("train", tuple(batch.shape))):  # one plan per key: give shapes and whatever else changes the step
            loss(batch).backward(); optimizer.step(); optimizer.zero_grad()

The thread that takes the first step owns the arena; requests of other threads are never served from it. The normal allocator also
keeps what outlives the step, and requests below ``smallest_bytes``. A block that is still alive after ``close``, or after the arena is
gone, keeps its memory.

CPU: the normal allocator is told to give freed blocks back (``host_allocator.py``), so that the steps watched first take little more than
what lives in them. CUDA (``arena_cuda.py``): the normal allocator is torch's caching allocator, from which the region comes too; the
backward pass runs on the arena's thread; a place goes from one stream to another only behind an event.

Try alone: ``python -m memory_mgmt.arena``.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch

from memory_mgmt.arena_cpu import CpuBackend
from memory_mgmt.arena_cuda import CudaBackend
from memory_mgmt.arena_native import STATS
from memory_mgmt.arena_recording import StepPlan, StepRecord, plan_step
from memory_mgmt.config import MemoryConfig
from memory_mgmt.native import NoCompiler
from models.errors import UserError

MAX_RECORDED_STEPS = 5
"""Steps of one key watched at most; without two equal ones in a row the last one is planned, and judged by how much it serves."""
DIVERGENT_SHARE = 0.02
"""Share of a step's bytes that may miss their place without the plan being held to be wrong."""
USEFUL_SHARE = 0.5
"""A plan of a step that never repeats itself must serve this share of its bytes."""
DIVERGENT_STEPS = 3
"""Divergent steps in a row after which a key is planned anew."""
MAX_REPLANS = 4
"""Plans made anew for one key before it is left to the normal allocator."""
NOT_NOW = -2
"""What the allocator says of a region whose memory was given back and is not to be had again in this step."""
MAX_KEYS = 16
"""Keys with a plan; the one not used for longest is forgotten first."""


@dataclass
class ArenaStats:
    """Counts over the life of an arena. Only requests of at least ``smallest_bytes`` on the arena's thread are counted."""

    recorded_steps: int = 0
    served_steps: int = 0
    unplanned_steps: int = 0
    """Steps of keys that were given up."""
    divergent_steps: int = 0
    replans: int = 0
    served: int = 0
    served_bytes: int = 0
    passed: int = 0
    """Left to the normal allocator by plan: they outlive the step."""
    passed_bytes: int = 0
    missed: int = 0
    """Not found in the plan, served by the normal allocator."""
    missed_bytes: int = 0
    conflicts: int = 0
    """Found in the plan while another block still lived in its range; served by the normal allocator."""
    conflict_bytes: int = 0
    resyncs: int = 0
    """Times the sequence of requests found back into the plan."""
    waits: int = 0
    """Times a stream was made to wait for another one before it got a place that the other one had."""

    def add(self, counts: dict[str, int]) -> None:
        """Add the counts of one served step."""
        for field in fields(self):
            if field.name in counts:
                setattr(self, field.name, getattr(self, field.name) + counts[field.name])


class Backend(Protocol):
    """What differs between devices: ``CpuBackend``, ``CudaBackend``."""

    lib: ctypes.CDLL
    alignment: int
    smallest_bytes: int

    def recording(self) -> contextlib.AbstractContextManager[Callable[[int], StepRecord]]:
        """Log what is asked for inside."""
        ...

    def new_plan(self, plan: StepPlan) -> int:
        """Handle of a native plan."""
        ...

    def new_region(self, size: int) -> int | None:
        """Handle of a region; None where there is not so much memory."""
        ...

    def trim(self) -> None:
        """Let the normal allocator give back what is free in it."""
        ...

    def around(self) -> contextlib.AbstractContextManager[object]:
        """What a step runs in."""
        ...


class _Region:
    """One region; given back when this object is gone and no block lives in it."""

    def __init__(self, backend: Backend, size: int) -> None:
        self.size = size
        self.handle: int | None = backend.new_region(size)
        if self.handle is None:
            raise MemoryError(f"arena: there are no {size / 2**30:.2f} GiB in one piece for the planned step")
        weakref.finalize(self, backend.lib.lsa_region_close, self.handle)


class _Plan:
    """A plan in the form that the allocator reads."""

    def __init__(self, backend: Backend, plan: StepPlan) -> None:
        self.addresses = plan.addresses
        self.handle: int = backend.new_plan(plan)
        weakref.finalize(self, backend.lib.lsa_plan_delete, self.handle)


@dataclass
class _Key:
    """What is known of the steps under one key."""

    last: StepRecord | None = None
    recorded: int = 0
    plan: _Plan | None = None
    repeats: bool = True
    divergent_in_a_row: int = 0
    replans: int = 0
    given_up: bool = False


class Arena:
    """See the module. ``warn`` gets one message when a step first leaves its plan and one when a key is given up."""

    def __init__(
        self,
        *,
        smallest_bytes: int | None = None,
        plan_seconds: float = 2.0,
        backend: Backend | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        """``smallest_bytes`` None: the backend's. ``plan_seconds``: time for planning one step, once per plan. ``backend`` None: the CPU's,
        which makes the C library give freed blocks back to the system from now on, for the whole process: what the arena does not serve
        gets slower and smaller.

        Raises NoCompiler or RuntimeError where the allocator cannot be built or installed, ValueError for ``smallest_bytes`` below 1.
        """
        if smallest_bytes is not None and smallest_bytes < 1:
            raise ValueError(f"smallest_bytes is {smallest_bytes}; it must be at least 1")
        self.stats = ArenaStats()
        self.last_step: dict[str, int] = {}
        """Counts of the last served step, as in ``ArenaStats``."""
        self._backend = CpuBackend() if backend is None else backend
        self._lib = self._backend.lib
        self._smallest_bytes, self._plan_seconds, self._warn = smallest_bytes or self._backend.smallest_bytes, plan_seconds, warn
        self._region: _Region | None = None
        self._keys: OrderedDict[Hashable, _Key] = OrderedDict()
        self._thread: int | None = None
        self._in_step = self._closed = self._has_warned = False

    @contextlib.contextmanager
    def step(self, key: Hashable = "train") -> Iterator[None]:
        """Around one step: everything from its first request to the last free of what it does not keep.

        Steps under one key are expected to repeat. Raises ValueError inside another step, on another thread than the first step's,
        or after ``close``.
        """
        self._check_step()
        entry = self._keys.setdefault(key, _Key())
        self._keys.move_to_end(key)
        if len(self._keys) > MAX_KEYS:
            self._keys.popitem(last=False)
        self._in_step = True
        self.last_step = {}
        try:
            with self._backend.around():
                if entry.plan is not None and self._region is not None:
                    with self._serving(key, entry, entry.plan, self._region):
                        yield
                elif entry.given_up:
                    self.stats.unplanned_steps += 1
                    self.give_back()
                    yield
                else:
                    with self._recording(entry):
                        yield
        finally:
            self._in_step = False

    def height_bytes(self, key: Hashable = "train") -> tuple[int, int] | None:
        """(height of the plan, lower bound) for the steps under ``key``; None while there is no plan."""
        entry = self._keys.get(key)
        return None if entry is None or entry.plan is None else (entry.plan.addresses.height, entry.plan.addresses.lower_bound)

    def give_back(self) -> int:
        """Give the region's free pages back to the system until the next served step; returns their bytes of address space."""
        return self._lib.lsa_region_give_back(self._region.handle) if self._region is not None else 0

    def measurements(self) -> dict[str, float]:
        """What the last step came to, for a run's records: bytes served and left to the normal allocator by plan, requests that were not
        found in the plan or whose place was taken, waits between streams. A step that is watched, or not planned, served nothing."""
        names = ("served_bytes", "passed_bytes", "missed", "conflicts", "waits")
        return {f"arena_{name}": self.last_step.get(name, 0) for name in names}

    def live_blocks(self) -> int:
        """Blocks that live in the present region."""
        return self._lib.lsa_region_blocks(self._region.handle) if self._region is not None else 0

    def close(self) -> None:
        """Forget all plans and give the memory back; blocks that still live keep theirs until they are freed."""
        if self._in_step:
            raise ValueError("an arena cannot be closed inside a step")
        self._closed = True
        self._keys.clear()
        if self._region is not None:
            self.give_back()
        self._region = None

    def _check_step(self) -> None:
        if self._closed:
            raise ValueError("the arena is closed")
        if self._in_step:
            raise ValueError("arena steps cannot be nested")
        if self._thread is None:
            self._thread = threading.get_ident()
        if self._thread != threading.get_ident():
            raise ValueError("all steps of an arena must be taken on the thread that took its first one")

    @contextlib.contextmanager
    def _recording(self, entry: _Key) -> Iterator[None]:
        self.give_back()  # the normal allocator needs the memory during this step
        with self._backend.recording() as record:
            yield  # a step that raises teaches nothing
        self.stats.recorded_steps += 1
        self._learn(entry, record(self._smallest_bytes))

    def _learn(self, entry: _Key, record: StepRecord) -> None:
        entry.recorded += 1
        entry.repeats = entry.last is not None and entry.last.repeats(record)
        if entry.last is not None and entry.repeats:
            record = entry.last.joined(record)
        elif entry.recorded < MAX_RECORDED_STEPS:
            entry.last = record
            return
        plan = plan_step(record, self._plan_seconds, self._backend.alignment)
        entry.last, entry.recorded = None, 0
        height = plan.addresses.height
        if height == 0:
            entry.given_up = True
            return
        if self._region is None or self._region.size < height:
            self._region = None  # given back before its successor is made, unless a block lives in it
            self._backend.trim()
            try:
                self._region = _Region(self._backend, height)
            except MemoryError as error:
                entry.given_up = True
                self._warn(f"{error}; the normal allocator serves steps under the present key")
                return
        entry.plan = _Plan(self._backend, plan)
        self._backend.trim()

    @contextlib.contextmanager
    def _serving(self, key: Hashable, entry: _Key, plan: _Plan, region: _Region) -> Iterator[None]:
        begun = self._lib.lsa_begin(plan.handle, region.handle, self._smallest_bytes)
        if begun == NOT_NOW:
            self.stats.unplanned_steps += 1
            yield
            return
        if begun != 1:
            raise ValueError("another arena is inside a step; one at a time can be served")
        counts = np.zeros(len(STATS), dtype=np.int64)
        try:
            yield
        finally:
            self._lib.lsa_end(counts.ctypes.data)
        self.last_step = dict(zip(STATS, counts.tolist(), strict=True))
        self.stats.served_steps += 1
        self.stats.add(self.last_step)
        self._judge(key, entry)

    def _judge(self, key: Hashable, entry: _Key) -> None:
        count = self.last_step
        astray = count["missed_bytes"] + count["conflict_bytes"]
        asked = astray + count["served_bytes"] + count["passed_bytes"]
        allowed = DIVERGENT_SHARE if entry.repeats else 1 - USEFUL_SHARE
        if astray <= allowed * asked:
            entry.divergent_in_a_row = 0
            return
        self.stats.divergent_steps += 1
        entry.divergent_in_a_row += 1
        if not self._has_warned:
            self._has_warned = True
            self._warn(
                f"arena: a step under key {key!r} left its plan: {count['missed'] + count['conflicts']} requests "
                f"({astray / 2**20:.1f} of {asked / 2**20:.1f} MiB) went to the normal allocator. This is said once; Arena.stats counts on"
            )
        if entry.divergent_in_a_row < DIVERGENT_STEPS:
            return
        entry.plan, entry.divergent_in_a_row = None, 0
        if not entry.repeats or entry.replans == MAX_REPLANS:
            entry.given_up = True
            self._warn(f"arena: steps under key {key!r} do not repeat themselves; the normal allocator serves them from now on")
            return
        entry.replans += 1
        self.stats.replans += 1


def build_arena(config: MemoryConfig, device: torch.device, warn: Callable[[str], None] = warnings.warn) -> Arena | None:
    """The arena that ``memory.arena`` asks for; None where it does not. Raises UserError where there can be none."""
    if not config.arena:
        return None
    try:
        return Arena(warn=warn, backend=CudaBackend() if device.type == "cuda" else CpuBackend())
    except (NoCompiler, RuntimeError) as error:
        raise UserError(f"memory.arena: {error}. Remedy: memory.arena=false") from None


def arena_step(arena: Arena | None, *key: Hashable) -> contextlib.AbstractContextManager[None]:
    """``arena.step(key)``, or nothing where there is no arena."""
    return contextlib.nullcontext() if arena is None else arena.step(key)


def _demonstrate() -> None:
    weight_CC = torch.randn(512, 512, requires_grad=True)
    arena = Arena()
    for _ in range(6):
        with arena.step():
            x_BC = torch.ones(2048, 512)
            for _ in range(4):
                x_BC = torch.tanh(x_BC @ weight_CC)
            x_BC.sum().backward()
            weight_CC.grad = None
            del x_BC
    print(arena.stats, arena.height_bytes())


if __name__ == "__main__":
    _demonstrate()
