"""How bytes travel between device and host: at once (CPU, fake tensors), or on two CUDA streams of their own.

Rules that keep the CUDA path right without ``record_stream`` (whose delays make peak memory depend on timing):

- Device memory is allocated and freed on the compute stream only. A copy stream waits for the compute stream before it touches a
  buffer, and the compute stream waits for the copy before the buffer's last reference goes.
- Two streams for the life of the store: the allocator keeps memory per stream (vllm#52951: 2 GiB stranded by each new stream).
- A block of host memory is reused only after the events of its copies have happened.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Copies(Protocol):
    """Starts copies; an event is None when nothing needs to be waited for."""

    waited_seconds: float

    def to_host(self, source: Tensor, pieces: Sequence[Tensor]) -> Any:
        """Copy flat bytes to the pieces of a host block; gives the event of its end."""
        ...

    def to_device(self, pieces: Sequence[Tensor], target: Tensor, after: Any) -> Any:
        """Copy back, not before the event ``after``; gives the event of its end."""
        ...

    def here(self) -> Any:
        """The stream that computes now."""
        ...

    def hold(self, event: Any, stream: Any = None, timed: bool = False) -> None:
        """What ``stream`` (None: the one that computes now) does next waits for the event; the host does not."""
        ...

    def finish(self, event: Any) -> None:
        """The host waits for the event."""
        ...

    def finished(self, event: Any) -> bool:
        """Has it happened?"""
        ...

    def settle_times(self) -> None:
        """Wait for the device, and make ``waited_seconds`` complete."""
        ...


def pairs(flat: Tensor, pieces: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(part of ``flat``, piece) for each piece."""
    start, result = 0, []
    for piece in pieces:
        result.append((flat.narrow(0, start, piece.numel()), piece))
        start += piece.numel()
    return result


class PlainCopies:
    """Copies that are done when the call returns; their time counts as waiting."""

    def __init__(self) -> None:
        self.waited_seconds = 0.0

    def to_host(self, source: Tensor, pieces: Sequence[Tensor]) -> None:
        start = time.perf_counter()
        for part, piece in pairs(source, pieces):
            piece.copy_(part)
        self.waited_seconds += time.perf_counter() - start

    def to_device(self, pieces: Sequence[Tensor], target: Tensor, after: None) -> None:
        start = time.perf_counter()
        for part, piece in pairs(target, pieces):
            part.copy_(piece)
        self.waited_seconds += time.perf_counter() - start

    def here(self) -> None:
        return None

    def hold(self, event: None, stream: None = None, timed: bool = False) -> None:
        return None

    def finish(self, event: None) -> None:
        return None

    def finished(self, event: None) -> bool:
        return True

    def settle_times(self) -> None:
        return None


class CudaCopies:
    """Copies on two streams of their own, ordered by events."""

    def __init__(self, device: torch.device) -> None:
        # With its index: threads of the backward pass may have another current device.
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._out, self._in = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        self._waits: list[tuple[Any, Any]] = []
        self.waited_seconds = 0.0

    def to_host(self, source: Tensor, pieces: Sequence[Tensor]) -> Any:
        self._out.wait_stream(self.here())  # the kernels that write the source
        with torch.cuda.stream(self._out):
            for part, piece in pairs(source, pieces):
                piece.copy_(part, non_blocking=True)
            return self._out.record_event()

    def to_device(self, pieces: Sequence[Tensor], target: Tensor, after: Any) -> Any:
        self._in.wait_stream(self.here())  # kernels that still use the memory which the target was made from
        if after is not None:
            self._in.wait_event(after)
        with torch.cuda.stream(self._in):
            for part, piece in pairs(target, pieces):
                part.copy_(piece, non_blocking=True)
            return self._in.record_event()

    def here(self) -> Any:
        return torch.cuda.current_stream(self.device)

    def hold(self, event: Any, stream: Any = None, timed: bool = False) -> None:
        if event is None:
            return
        stream = stream or self.here()
        if not timed or event.query():
            stream.wait_event(event)
            return
        # What passes between the two is time in which the stream did nothing but wait.
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        stream.wait_event(event)
        end.record(stream)
        self._waits.append((begin, end))
        if len(self._waits) > 256:
            self._add_up()

    def finish(self, event: Any) -> None:
        if event is not None:
            event.synchronize()

    def finished(self, event: Any) -> bool:
        return event is None or event.query()

    def settle_times(self) -> None:
        for _, end in self._waits[-1:]:
            end.synchronize()
        self._add_up()

    def _add_up(self) -> None:
        done = [end.query() for _, end in self._waits]
        self.waited_seconds += sum(b.elapsed_time(e) for (b, e), past in zip(self._waits, done, strict=True) if past) / 1000
        self._waits = [pair for pair, past in zip(self._waits, done, strict=True) if not past]


class RoundingBuffers:
    """Device buffers of layers that come back, reused in turn by layers further down.

    With two layers on the way at most, buffers of a size that repeats alternate between even and odd layers (MEMO's two rounding
    buffers); a size that nothing waits for any more is freed at once. Bytes are handed out as flat uint8 tensors.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}
        self.waiting: dict[int, int] = {}
        """Tensors on the host that will need a buffer, by size."""

    def take(self, nbytes: int, device: torch.device) -> Tensor:
        """A buffer, its content undefined; work queued on the compute stream may still read its old content."""
        free = self._free.get(nbytes)
        return free.pop() if free else torch.empty(nbytes, dtype=torch.uint8, device=device)

    def expect(self, nbytes: int, change: int) -> None:
        """One more (or less) tensor of this size waits on the host."""
        left = self.waiting.get(nbytes, 0) + change
        self.waiting[nbytes] = left
        if left <= 0:
            del self.waiting[nbytes]
            self._free.pop(nbytes, None)

    def wants(self, nbytes: int) -> bool:
        """Something of this size waits that has no buffer yet."""
        return len(self._free.get(nbytes, ())) < self.waiting.get(nbytes, 0)

    def give(self, buffer: Tensor) -> None:
        """Take a buffer that nobody else uses; it is freed unless something of its size waits."""
        nbytes = buffer.numel()
        if self.wants(nbytes):
            self._free.setdefault(nbytes, []).append(buffer)

    def clear(self) -> None:
        """Free all of them."""
        self._free.clear()


def use_count(tensor: Tensor) -> int:
    """How many tensors (and other owners) share the tensor's storage, plus a constant."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # pyright: ignore[reportAttributeAccessIssue]
