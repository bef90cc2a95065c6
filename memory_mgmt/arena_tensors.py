"""A few large tensors at planned places of one allocation, on any device; everything else stays with the device's own allocator.

``Arena`` stands behind the CPU allocator and serves every tensor. On CUDA the allocator is left alone (replacing it is for the whole
process and gives up its statistics); there the program itself takes its large buffers (gathered parameters, communication and rounding
buffers, gradients of tiles) from a ``TensorArena`` by name, and ``use_expandable_segments`` keeps the rest from fragmenting.

A place is handed out only if no tensor that was ever handed out from its range is still referenced, by anyone (autograd included); else
the request goes to the device's allocator and is counted. Tensors of different streams share a place only behind the events that
``arena_streams.needed_waits`` prescribes.
"""

from __future__ import annotations

import ctypes
import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from memory_mgmt.address_planning import Lifetime, plan_addresses
from memory_mgmt.arena_streams import Sync, Tenant, Wait, needed_waits

ALIGNMENT = 512
"""Bytes; that of torch's CUDA caching allocator."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that every step takes: from position ``lower`` in the order of the host's work up to, not including, ``upper``."""

    name: str
    lower: int
    upper: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    streams: tuple[str, ...] = ("compute",)
    """All streams that use it; the first one makes it."""

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class Stream(Protocol):
    """What is needed of ``torch.cuda.Stream``."""

    def record_event(self) -> Any:
        """An event after all work issued so far."""

    def wait_event(self, event: Any, /) -> None:
        """Let work issued from now on start after ``event``."""


class TensorArena:
    """See the module. ``fallbacks`` counts the tensors that came from the device's allocator instead."""

    def __init__(
        self,
        tensors: Sequence[PlannedTensor],
        device: torch.device,
        *,
        streams: Mapping[str, Stream] | None = None,
        syncs: Sequence[Sync] = (),
        plan_seconds: float = 2.0,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        """``streams``: the stream of every name in ``tensors``, needed where there is more than one. ``syncs``: synchronisation
        between them that the program does every step anyway. Raises ValueError for names given twice and streams that are missing."""
        self._index = {tensor.name: i for i, tensor in enumerate(tensors)}
        if len(self._index) != len(tensors):
            raise ValueError("two planned tensors have the same name")
        names = {name for tensor in tensors for name in tensor.streams}
        self._streams = dict(streams or {})
        if len(names) > 1 and (missing := names - self._streams.keys()):
            raise ValueError(f"planned tensors use several streams; these are not given: {', '.join(sorted(missing))}")
        self._tensors, self._device, self._warn = tuple(tensors), device, warn
        sizes = [-(-max(tensor.nbytes, 1) // ALIGNMENT) * ALIGNMENT for tensor in tensors]
        lifetimes = [Lifetime(t.name, t.lower, t.upper, size) for t, size in zip(tensors, sizes, strict=True)]
        self.addresses = plan_addresses(lifetimes, time_limit=plan_seconds, alignment=ALIGNMENT)
        planned = zip(tensors, self.addresses.offsets, sizes, strict=True)
        self._tenants = [Tenant(t.lower, t.upper, offset, size, t.streams) for t, offset, size in planned]
        self.waits: list[Wait] = needed_waits(self._tenants, syncs)
        """What each tensor waits for before it is first used, by number, where the other tensor has really been there."""
        self._waited_for = {(wait.before, wait.stream) for wait in self.waits}
        self._events: dict[tuple[int, str], tuple[int, Any]] = {}  # (order of release, event) by (number, stream)
        self._releases = 0
        self._given_out: dict[int, StorageWeakRef] = {}
        self._memory = torch.empty(self.addresses.height, dtype=torch.uint8, device=device)
        self.fallbacks = 0
        weakref.finalize(self, _let_go, self._memory, self._given_out)

    def begin_step(self) -> None:
        """Call before the first ``take`` of every step: every stream waits for all of them, so the step before cannot interfere."""
        events = [stream.record_event() for stream in self._streams.values()]
        for stream in self._streams.values():
            for event in events:
                stream.wait_event(event)
        self._events.clear()
        for number, reference in list(self._given_out.items()):
            if reference.expired():
                del self._given_out[number]

    def take(self, name: str) -> Tensor:
        """The tensor, uninitialised, at its planned place; from the device's allocator if a tensor in that place is still referenced,
        or was not released where its stream has to be waited for. Raises ValueError for a name that was not planned."""
        if name not in self._index:
            raise ValueError(f"no tensor {name!r} was planned")
        number = self._index[name]
        planned, tenant = self._tensors[number], self._tenants[number]
        before = [(wait.before, wait.stream) for wait in self.waits if wait.after == number and wait.before in self._given_out]
        if self._occupied(number) or any(pair not in self._events for pair in before):
            if not self.fallbacks:
                self._warn(f"arena: the place of {name!r} is in use longer than planned; it comes from the normal allocator. Said once")
            self.fallbacks += 1
            return torch.empty(planned.shape, dtype=planned.dtype, device=self._device)
        for stream in {stream for _, stream in before}:  # of several events of one stream the last one covers all
            _, event = max((self._events[pair] for pair in before if pair[1] == stream), key=lambda entry: entry[0])
            self._streams[planned.streams[0]].wait_event(event)
        storage = torch._C._construct_storage_from_data_pointer(self._memory.data_ptr() + tenant.offset, self._device, tenant.size)
        tensor = torch.empty(0, dtype=planned.dtype, device=self._device)
        tensor.set_(storage, 0, planned.shape)  # pyright: ignore[reportCallIssue]  # its stubs know typed storages only
        self._given_out[number] = StorageWeakRef(storage)
        for stream in planned.streams:
            self._events.pop((number, stream), None)
        return tensor

    def release(self, name: str) -> None:
        """Say that the last work that uses the tensor has been issued; its place is reused once nobody references it either.

        Raises ValueError for a name that was not planned.
        """
        if name not in self._index:
            raise ValueError(f"no tensor {name!r} was planned")
        number = self._index[name]
        for stream in self._tensors[number].streams:
            if (number, stream) in self._waited_for:
                self._events[number, stream] = (self._releases, self._streams[stream].record_event())
        self._releases += 1

    def in_use(self) -> list[str]:
        """Names of the tensors in the arena that someone still references."""
        return [self._tensors[number].name for number, reference in self._given_out.items() if not reference.expired()]

    def _occupied(self, number: int) -> bool:
        mine = self._tenants[number]
        for other_number, reference in self._given_out.items():
            other = self._tenants[other_number]
            shares = other.offset < mine.offset + mine.size and mine.offset < other.offset + other.size
            if shares and not reference.expired():
                return True
        return False


def use_expandable_segments(device: torch.device) -> None:
    """Let torch's CUDA caching allocator grow its segments instead of splitting fixed ones, for memory it takes from now on.

    Raises ValueError for a device without that allocator.
    """
    if device.type != "cuda":
        raise ValueError(f"expandable segments are a setting of the CUDA caching allocator; the device is {device.type}")
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def _let_go(memory: Tensor, given_out: dict[int, StorageWeakRef]) -> None:
    """The arena is gone. Its tensors do not own their memory, so it has to stay for good where one of them is still referenced."""
    if any(not reference.expired() for reference in given_out.values()):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))
