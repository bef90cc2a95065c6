"""The way of parked tensors back to the device: prefetch, buffers, and letting go of what has been used.

Tensors of two layers at most are on the device at once: the layer that is differentiated and the one that is prefetched. Used by the
store only, under its lock.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from memory_mgmt.offload_copies import RoundingBuffers, use_count
from memory_mgmt.offload_entries import Entry, Remains, living
from memory_mgmt.offload_residence import Residence

LAYERS_ON_DEVICE = 2


class WayBack:
    """Entries that are on the device again or on their way there. ``copied_bytes`` counts them."""

    def __init__(self, device: torch.device, residence: Residence) -> None:
        self.device, self._residence = device, residence
        self.overlaps = device.type == "cuda"
        """Copies go on beside the computation, so that their device memory must be held and a head start helps."""
        self.buffers = RoundingBuffers()
        self.copied_bytes = 0
        self._coming: list[weakref.ref[Entry]] = []
        self._put_off: list[weakref.ref[Entry]] = []

    def expect(self, entry: Entry) -> None:
        """The entry will need a buffer."""
        entry.awaited = True
        self.buffers.expect(entry.nbytes, 1)

    def start(self, entries: Sequence[Entry]) -> None:
        """Begin the way back of entries of one layer, newest first; put off while two other layers are on the device."""
        for entry in reversed(entries):
            self._start(entry)

    def start_put_off(self) -> None:
        """Begin what had to wait, as far as it may now."""
        waiting, self._put_off = self._put_off, []
        for entry in living(waiting):
            self._start(entry)

    def _start(self, entry: Entry) -> None:
        if entry.source is not None or entry.base is not None:
            return
        others = {id(other.episode) for other in living(self._coming)} - {id(entry.episode)}
        if len(others) >= LAYERS_ON_DEVICE:
            self._put_off.append(weakref.ref(entry))
            return
        self._read(entry)
        if not self.overlaps:
            return  # a copy made earlier would be no faster, only larger
        if entry.on_disk and entry.job is not None and not entry.job.done():
            self._put_off.append(weakref.ref(entry))  # go on when it is in host memory
        else:
            self._restore(entry)

    def _read(self, entry: Entry) -> None:
        if entry.block is None:
            self._residence.start_reading(entry)
            self._coming.append(weakref.ref(entry))

    def _restore(self, entry: Entry) -> None:
        """Start the copy to the device."""
        self._read(entry)
        self._residence.finish_reading(entry)
        assert entry.block is not None
        with entry.mode or contextlib.nullcontext():
            base = self.buffers.take(entry.nbytes, self.device)
            entry.base_owners = use_count(base)
            entry.landed = entry.copies.to_device(entry.block.pieces, base, entry.arrived)
        entry.base, entry.base_version, entry.fetched = base, _version(base), False
        entry.stream = entry.copies.here()
        self.copied_bytes += entry.nbytes
        if entry.awaited:
            entry.awaited = False
            self.buffers.expect(entry.nbytes, -1)
        self._residence.leave_block(entry)
        self._coming.append(weakref.ref(entry))

    def bytes(self, entry: Entry) -> Tensor:
        """The bytes of an entry on the device, for the stream that computes now."""
        if entry.source is not None:
            entry.check_unchanged()
            return entry.source
        if entry.base is not None and _version(entry.base) != entry.base_version:
            entry.base = None  # somebody has written to it: whoever fetches now gets what was parked
        if entry.base is None:
            self._restore(entry)
        assert entry.base is not None
        entry.copies.hold(entry.landed, timed=not entry.fetched)
        entry.fetched = True
        return entry.base

    def collect(self) -> None:
        """Let go of what was fetched and is no longer used."""
        coming: dict[int, weakref.ref[Entry]] = {}
        for entry in living(self._coming):
            if entry.base is not None and entry.fetched and use_count(entry.base) == entry.base_owners:
                self.buffers.give(entry.base)
                entry.base = None
            elif entry.base is not None or entry.job is not None:
                coming[entry.number] = weakref.ref(entry)
        self._coming = list(coming.values())

    def bury(self, remains: Remains) -> None:
        """Take over what a dead entry had on the device."""
        if remains.awaited:
            self.buffers.expect(remains.nbytes, -1)
        if remains.base is not None:
            self.buffers.give(remains.base)
        remains.base = None


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
