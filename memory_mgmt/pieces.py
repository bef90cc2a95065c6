"""A tensor between forward and backward, by token ranges: the first tokens in host memory, the next kept, the rest to be made again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from models.repeat import turns


class Parked(Protocol):
    """Handle of one tensor in host memory (memory_mgmt/offload.py); losing it frees that memory."""

    def fetch(self) -> Tensor:
        """The tensor on its device again: same values, shape and dtype."""
        ...

    def prefetch(self) -> None:
        """Start the copy back without waiting."""
        ...


class Store(Protocol):
    """What execution needs of memory_mgmt/offload.py's HostStore."""

    def park(self, tensor: Tensor, slot: Hashable) -> Parked:
        """Start the copy of ``tensor`` to host memory; the caller may drop it at once. The first item of ``slot`` names the layer."""
        ...

    def begin_layer(self, slot: Hashable) -> None:
        """The forward pass enters a layer."""
        ...


class Parking:
    """Where one pass of one layer parks its tensors, and where they are brought back from together."""

    def __init__(self, store: Store | None, layer: Hashable) -> None:
        self._store, self._layer = store, layer
        self._parked: list[weakref.ref[Parked]] = []
        if store is not None:
            store.begin_layer((layer, ""))

    def park(self, tensor: Tensor, name: Hashable) -> Parked:
        """Hand ``tensor`` to the store under ``name``."""
        assert self._store is not None
        parked = self._store.park(tensor, (self._layer, name))
        self._parked.append(weakref.ref(parked))
        return parked

    def prefetch(self) -> None:
        """Start to bring back what is still parked, in the order in which backward needs it."""
        for reference in reversed(self._parked):
            parked = reference()
            if parked is not None:
                parked.prefetch()


class Held:
    """One tensor of a layer: ``swapped`` tokens of ``dim`` are parked at once, the next ``kept`` stay after ``trim``."""

    def __init__(self, tensor: Tensor, dim: int, swapped: int, kept: int, parking: Parking, name: Hashable) -> None:
        tensor = tensor.detach()
        self._tensor: Tensor | None = tensor
        self._first = 0  # token of the whole tensor at which ``_tensor`` begins
        self._dim, self._swapped, self._end, self._n = dim, swapped, swapped + kept, tensor.shape[dim]
        self._empty, self._shape, self._order = tensor.new_empty(0), tensor.shape, memory_order(tensor)
        self._fetched: Tensor | None = None
        self._trimmed = False
        self._parked = parking.park(tensor.narrow(dim, 0, swapped), name) if swapped else None

    def trim(self) -> None:
        """Let go of what is not kept. A part is copied, because a view would hold the memory of the whole tensor."""
        if self._trimmed or self._end - self._swapped == self._n:
            return
        assert self._tensor is not None
        self._trimmed = True
        kept = self._tensor.narrow(self._dim, self._swapped, self._end - self._swapped)
        self._tensor = kept.clone() if self._end > self._swapped else None
        self._first = self._swapped

    def part(self, start: int, end: int) -> Tensor:
        """Tokens [start, end), all of them swapped or all kept. Fetched ones stay on the device as long as this object."""
        if end <= self._swapped:
            return self._fetch().narrow(self._dim, start, end - start)
        assert self._tensor is not None and self._first <= start <= end <= self._end
        return self._tensor.narrow(self._dim, start - self._first, end - start)

    def whole(self) -> Tensor:
        """All tokens; those that are neither swapped nor kept, from ``missing_from`` on, are uninitialised."""
        if self._swapped == self._n:
            return self._fetch()
        if self._end - self._swapped == self._n:
            assert self._tensor is not None
            return self._tensor
        whole = empty_in_order(self._empty, self._shape, self._order)
        if self._swapped:
            whole.narrow(self._dim, 0, self._swapped).copy_(self._fetch())
            self._fetched = None
        if self._end > self._swapped:
            whole.narrow(self._dim, self._swapped, self._end - self._swapped).copy_(self.part(self._swapped, self._end))
        return whole

    @property
    def missing_from(self) -> int:
        """First token that has to be made again; the number of tokens if there is none."""
        return self._end

    def _fetch(self) -> Tensor:
        if self._fetched is None:
            assert self._parked is not None
            self._fetched, self._parked = self._parked.fetch(), None
        return self._fetched


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """The dims of ``tensor`` from the slowest in memory to the fastest."""
    return tuple(sorted(range(tensor.ndim), key=lambda dim: (-tensor.stride(dim), dim)))


def empty_in_order(like: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """An uninitialised tensor of ``like``'s dtype and device, dense, with its dims in memory in ``order``."""
    return like.new_empty([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(len(order))])


def spans(n_tokens: int, tile_tokens: int, cuts: Iterable[int] = ()) -> list[tuple[int, int]]:
    """Token ranges of at most ``tile_tokens`` (0: any length) that do not cross a cut; at multiples of the tile where possible."""
    step = tile_tokens or max(n_tokens, 1)
    marks = sorted({0, n_tokens, *range(0, n_tokens, step), *(cut for cut in cuts if 0 < cut < n_tokens)})
    return list(pairwise(marks))


def assemble(
    ranges: Sequence[tuple[int, int]],
    make: Callable[[int, int], Sequence[Tensor]],
    dims: Sequence[int],
    like: Tensor,
    lasting: Callable[[int, int], bool] = lambda start, end: False,
) -> list[Tensor]:
    """Tensors made range by range, each joined along its dim of tokens; those of a single range are taken as they are.

    ``like``: any tensor of the pass. ``lasting(start, end)``: making this range changes what is held beside the result.
    """
    if len(ranges) == 1:
        return list(make(*ranges[0]))
    first, n = ranges[0][0], ranges[-1][1] - ranges[0][0]
    joined: list[Tensor] = []
    for start, end in turns(ranges, like, alike(lasting)):
        parts = make(start, end)
        if not joined:
            joined = [_longer(part, dim, n) for part, dim in zip(parts, dims, strict=True)]
        for whole, part, dim in zip(joined, parts, dims, strict=True):
            whole.narrow(dim, start - first, end - start).copy_(part)
        del parts
    return joined


def alike(lasting: Callable[[int, int], bool]) -> Callable[[tuple[int, int]], Hashable]:
    """Which token ranges do the same to memory: those of one length, unless something of them lasts."""
    return lambda span: span if lasting(*span) else span[1] - span[0]


def _longer(part: Tensor, dim: int, length: int) -> Tensor:
    shape = [length if d == dim else size for d, size in enumerate(part.shape)]
    return empty_in_order(part, shape, memory_order(part))
