"""The store of tensors that wait in host memory between forward and backward.

``park`` starts a tensor's way to host memory and gives a handle; ``fetch`` of the handle gives a tensor with the same values, shape,
strides and aliasing; the host memory is free again when the last handle of it is gone, however it goes (backward, an exception, a
forward pass that nobody differentiates). On CUDA both ways run on streams of their own; on CPU "host memory" is a second place in
RAM, so that values and accounting are tested there (copying in the background would only take cores from the computation).
Fake tensors move to fake memory, so that a traced step sees what a real one does.

What it does not do: decide what is parked (apply.py, execution.py); catch what autograd saves (offload_hooks.py).
Try alone: ``python -c "import torch; from memory_mgmt.offload import HostStore; print(HostStore('cpu').park(torch.ones(2), 0).fetch())"``
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from memory_mgmt.host_memory import HostMemory
from memory_mgmt.offload_copies import Copies, CudaCopies, PlainCopies
from memory_mgmt.offload_entries import Entry, Episode, living
from memory_mgmt.offload_layout import Layout, fake_mode_of, flat_bytes, from_parameter, layout_of, restored, why_not
from memory_mgmt.offload_residence import Residence
from memory_mgmt.offload_return import WayBack
from memory_mgmt.offload_statistics import Copied, OffloadStatistics
from memory_mgmt.quantised import Quantise, dequantised, quantised


class Parked:
    """Handle of a parked tensor."""

    def __init__(self, store: HostStore, layout: Layout, mode: Any, compact: bool, held: Entry | tuple[Parked, Parked] | None) -> None:
        self._store, self._layout, self._mode, self._compact = store, layout, mode, compact
        self._held = held
        """The bytes; (values, scales) when quantised; None for a tensor without elements."""
        self._dropped = False

    def _entries(self) -> list[Entry]:
        if isinstance(self._held, tuple):
            return [entry for part in self._held for entry in part._entries()]
        return [] if self._held is None else [self._held]

    @property
    def nbytes(self) -> int:
        """Bytes of host memory or disk; handles of views of one storage share them."""
        return sum(entry.nbytes for entry in self._entries())

    def fetch(self) -> Tensor:
        """The tensor, on the device. May be called again. Raises RuntimeError after ``drop`` or when the store is closed, UserError
        when the disk fails."""
        if self._dropped:
            raise RuntimeError("this tensor was dropped from the offload store")
        return self._store._fetch(self)

    def prefetch(self) -> None:
        """Start the way back without waiting; put off while two other layers are on the device."""
        self._store._prefetch(self._entries())

    def drop(self) -> None:
        """Give the host memory back; a fetched tensor stays valid. Losing the handle does the same."""
        self._dropped, self._held = True, None


class HostStore:
    """Host memory for one rank's parked tensors. Thread-safe.

    ``device``: ``cpu`` or ``cuda``. ``budget_bytes``: host memory this rank may take; None: no limit. ``directory``: where what does
    not fit is written, oldest (needed last) first; None: a UserError that names ``memory.host_gib``. ``fake_empty(nbytes)`` makes
    host memory for fake tensors. A slot is any hashable; of a tuple, the first item says which layer: what one layer parks in one
    forward pass is prefetched together.
    """

    def __init__(
        self,
        device: torch.device | str,
        budget_bytes: int | None = None,
        directory: Path | None = None,
        *,
        fake_empty: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"offload works on cpu and cuda, not on {self.device.type}")
        memory = HostMemory(budget_bytes, cuda_device=self.device if self.device.type == "cuda" else None)
        self._residence = Residence(memory, directory, fake_empty or partial(torch.empty, dtype=torch.uint8, device="cpu"))
        self._plain = PlainCopies()
        self._cuda: CudaCopies | None = None
        self._return = WayBack(self.device, self._residence)
        self._lock = threading.RLock()
        self._by_storage: dict[int, list[weakref.ref[Entry]]] = {}
        self._leaving: list[weakref.ref[Entry]] = []
        self._recent: list[Episode] = []
        self._episodes: list[weakref.ref[Episode]] = []
        self._protected: dict[int, StorageWeakRef] = {}
        self._count = self._to_host = self._written_before = 0
        self._waited_before = 0.0
        self._closed = False

    # --- out ------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def park(self, tensor: Tensor, slot: Hashable, *, compact: bool = False, quantise: Quantise | None = None) -> Parked:
        """Start the copy to host memory; the caller may drop the tensor at once, and must not write to it.

        ``compact``: a tensor with holes (a slice) comes back contiguous instead of with its old strides. ``quantise``: eight bits
        per element, inexact (quantised.py). Raises ValueError for a parameter, another device or a tensor that is no plain
        strided one, UserError when the host budget is exceeded, RuntimeError when the store is closed.
        """
        if reason := self.why_not(tensor):
            raise ValueError(f"the tensor for slot {slot!r} cannot be parked: {reason}")
        layout, mode = layout_of(tensor), fake_mode_of(tensor)
        if quantise and layout.overlaps:
            raise ValueError(f"the tensor for slot {slot!r} cannot be parked in eight bits: its elements overlap in memory")
        with self._lock, mode or contextlib.nullcontext():
            self._begin()
            tensor = tensor.detach()
            if quantise is None:
                return Parked(self, layout, mode, compact, self._stored(tensor, layout, slot, mode))
            parts = []
            for part in quantised(tensor.as_strided(layout.packed_size, layout.stride, tensor.storage_offset()), quantise)[:2]:
                own = layout_of(part)
                parts.append(Parked(self, own, mode, False, self._stored(part, own, slot, mode)))
            return Parked(self, layout, mode, compact, (parts[0], parts[1]))

    def why_not(self, tensor: Tensor) -> str:
        """Why ``park`` refuses this tensor; empty if it does not."""
        if from_parameter(tensor):
            return "it is a parameter, or a view or cast copy of one"
        if reason := why_not(tensor):
            return reason
        if tensor.device.type != self.device.type or self.device.index not in (None, tensor.device.index):
            return f"it is on {tensor.device}, the store serves {self.device}"
        return "its storage is protected" if tensor.untyped_storage()._cdata in self._protected else ""

    def protect(self, parameters: Iterable[Tensor]) -> None:
        """Refuse these tensors, and all views of their storages, from now on."""
        for parameter in parameters:
            local = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
            reference = StorageWeakRef(local.untyped_storage())
            self._protected[reference.cdata] = reference

    def begin_layer(self, slot: Hashable) -> None:
        """The forward pass enters a layer: device memory of all but the layer before is let go, as when this layer parks something.
        Call it for layers that park nothing, so that memory does not depend on whether a later layer does."""
        with self._lock:
            self._episode_of(slot)

    def settle(self) -> None:
        """Let go of all device memory whose copies are under way: what the computation does next waits for them (the host does
        not). On CUDA, what the last two layers parked stays on the device until it is fetched unless this is called."""
        with self._lock:
            self._let_go(())

    def _stored(self, tensor: Tensor, layout: Layout, slot: Hashable, mode: Any) -> Entry | None:
        if not layout.stored_bytes:
            return None
        entry = self._shared(tensor, layout)
        if entry is not None:
            return entry
        episode = self._episode_of(slot)
        self._count += 1
        entry = Entry(self._count, layout.stored_bytes, episode, self.copies_for(mode), mode, self._return.buffers, self._residence.inbox)
        self._residence.place(entry)
        assert entry.block is not None
        entry.low, entry.high, entry.packed = layout.low, layout.high, layout.packed
        source = flat_bytes(tensor, layout)
        entry.arrived, entry.stream = entry.copies.to_host(source, entry.block.pieces), entry.copies.here()
        self._to_host += entry.nbytes
        self._return.expect(entry)
        episode.entries.append(weakref.ref(entry))
        self._remember(entry, tensor, layout)
        if self._return.overlaps:
            entry.source, entry.source_version = source, None if source.is_inference() else source._version
            self._leaving.append(weakref.ref(entry))
        self._residence.write_ahead()
        return entry

    def _remember(self, entry: Entry, tensor: Tensor, layout: Layout) -> None:
        if layout.packed or tensor.is_inference():
            return
        entry.storage = StorageWeakRef(tensor.untyped_storage())
        entry.version = tensor._version
        self._by_storage.setdefault(entry.storage.cdata, []).append(weakref.ref(entry))

    def _shared(self, tensor: Tensor, layout: Layout) -> Entry | None:
        """An entry that holds these bytes already."""
        if tensor.is_inference():
            return None
        for reference in self._by_storage.get(tensor.untyped_storage()._cdata, ()):
            entry = reference()
            # The entry's weak reference keeps the identity of a freed storage from being given to another one.
            if entry is None or entry.version != tensor._version:
                continue
            aligned = (layout.low - entry.low) % layout.dtype.itemsize == 0
            if aligned and entry.low <= layout.low and layout.high <= entry.high:
                return entry
        return None

    def _episode_of(self, slot: Hashable) -> Episode:
        key = layer_of(slot)
        if not self._recent or self._recent[-1].key != key:
            self._recent = [*self._recent[-1:], Episode(key)]
            self._episodes = [reference for reference in self._episodes if reference() is not None]
            self._episodes.append(weakref.ref(self._recent[-1]))
            self._let_go(self._recent[:-1])
        return self._recent[-1]

    def _let_go(self, keep: Sequence[Episode]) -> None:
        staying = []
        for reference in self._leaving:
            entry = reference()
            if entry is None or entry.source is None:
                continue
            if entry.episode in keep:
                staying.append(reference)
                continue
            entry.check_unchanged()
            entry.copies.hold(entry.arrived, timed=True)
            entry.source = None
        self._leaving = staying

    # --- back -----------------------------------------------------------------------------------------------------------------

    def prefetch(self, slot: Hashable) -> None:
        """Start the way back of everything that the slot's layer parked last, newest first, without waiting."""
        key = layer_of(slot)
        with self._lock:
            episodes = [episode for reference in self._episodes if (episode := reference()) is not None and episode.key == key]
            if episodes:
                self._prefetch(living(episodes[-1].entries))

    def prefetch_before(self, parked: Parked) -> None:
        """Start the way back of the layer that parked just before this one did: what the backward pass needs next."""
        with self._lock:
            own = {id(entry.episode) for entry in parked._entries()}
            before: list[Entry] = []
            for reference in self._episodes:
                episode = reference()
                if id(episode) in own:
                    self._prefetch(before)
                    return
                before = (living(episode.entries) if episode is not None else []) or before

    @torch.no_grad()
    def _prefetch(self, entries: Sequence[Entry]) -> None:
        with self._lock:
            self._begin()
            self._return.start(entries)

    @torch.no_grad()
    def _fetch(self, parked: Parked) -> Tensor:
        layout, held = parked._layout, parked._held
        with self._lock, parked._mode or contextlib.nullcontext():
            self._begin()
            if held is None:
                return torch.empty_strided(layout.size, layout.stride, dtype=layout.dtype, device=self.device)
            if isinstance(held, Entry):
                # A slice with holes may be part of a whole stretch that was stored for another view.
                return restored(self._return.bytes(held), replace(layout, packed=held.packed), held.low, parked._compact)
            values = dequantised(self._fetch(held[0]), self._fetch(held[1]), layout.dtype).contiguous()
            return restored(flat_bytes(values, layout_of(values)), replace(layout, packed=True), 0, parked._compact)

    # --- housekeeping -----------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """At the start of every operation: reclaim what the dead left, and start what was put off."""
        if self._closed:
            raise RuntimeError("the offload store is closed")
        self._collect()
        self._return.start_put_off()

    def _collect(self) -> None:
        for remains in self._residence.collect():
            if remains.storage_key is not None:
                family = [ref for ref in self._by_storage.pop(remains.storage_key, ()) if ref() is not None]
                if family:
                    self._by_storage[remains.storage_key] = family
            self._return.bury(remains)
        self._return.collect()

    # --- for what stays in host memory --------------------------------------------------------------------------------------------

    def keep(self, sizes: Sequence[int], what: str, mode: Any = None) -> list[Tensor]:
        """Host memory of these many bytes, each in one piece (uint8, flat, content undefined), within the same budget and for the life
        of the store. ``what`` names it in the UserError when it does not fit; ``mode``: of fake tensors."""
        with self._lock, mode or contextlib.nullcontext():
            return [block.pieces[0] for block in self._residence.keep(sizes, what, mode)]

    def count(self, to_host: int, to_device: int) -> None:
        """Add bytes that somebody else copied to and from what is kept to this store's figures."""
        with self._lock:
            self._to_host += to_host
            self._return.copied_bytes += to_device

    def copies_for(self, mode: Any) -> Copies:
        """What copies: at once for fake tensors (``mode``) and on CPU, else on the store's two streams."""
        if mode or self.device.type == "cpu":
            return self._plain
        self._cuda = self._cuda or CudaCopies(self.device)
        return self._cuda

    # --- accounting -------------------------------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """Host memory that parked tensors take now."""
        with self._lock:
            self._collect()
            return self._residence.used_bytes

    @property
    def disk_bytes(self) -> int:
        """Disk space that parked tensors take now."""
        with self._lock:
            self._collect()
            return self._residence.disk_bytes

    @property
    def reserved_bytes(self) -> int:
        """Host memory mapped (and page-locked) for parked tensors; it stays for the next step."""
        return self._residence.memory.reserved_bytes

    @property
    def peak_bytes(self) -> int:
        """Most host memory in use at once since the last reset."""
        return self._residence.memory.peak_bytes

    @property
    def copied_bytes(self) -> Copied:
        """Bytes copied since the last reset."""
        return Copied(self._to_host, self._return.copied_bytes)

    @property
    def waited_seconds(self) -> float:
        """Time the computation stood still for copies since the last reset; on CUDA without waits that are not over yet."""
        parts = (self._plain, self._residence, self._cuda)
        return sum(part.waited_seconds for part in parts if part is not None) - self._waited_before

    @property
    def pageable(self) -> bool:
        """True when host memory is not page-locked; ``statistics().pageable_reason`` says why."""
        return self._residence.memory.pageable

    def statistics(self, reset: bool = False) -> OffloadStatistics:
        """Figures since the last reset (a step's, when called after every step). On CUDA waits for the copies."""
        with self._lock:
            if self._cuda is not None:
                self._cuda.settle_times()
            self._collect()
            memory, written = self._residence.memory, self._residence.written_bytes - self._written_before
            figures = OffloadStatistics(memory.peak_bytes, self.copied_bytes, self.waited_seconds, written, memory.pageable_reason)
            if reset:
                self._to_host = self._return.copied_bytes = 0
                self._waited_before += self.waited_seconds
                self._written_before = self._residence.written_bytes
                memory.peak_bytes = memory.used_bytes
            return figures

    def reserve(self, nbytes: int) -> None:
        """Map (and page-lock) host memory for ``nbytes`` now instead of during the first step. Raises UserError above the budget."""
        with self._lock:
            self._residence.reserve(nbytes)

    def close(self) -> None:
        """Give back all host memory and disk space. Handles cannot be fetched any more; fetched tensors stay valid."""
        with self._lock:
            if self._closed:
                return
            self._let_go(())
            self._collect()
            self._closed = True
            self._residence.close()
            self._return.buffers.clear()

    def __enter__(self) -> HostStore:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


def layer_of(slot: Hashable) -> Hashable:
    """The part of a slot that says which layer (and pass) it belongs to."""
    return slot[0] if isinstance(slot, tuple) and slot else slot
