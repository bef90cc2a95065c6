"""Park what autograd saves for the backward pass.

``with offloading(store, slot): ...`` sends the tensors that operations inside save through a ``HostStore``; what
``torch.utils.checkpoint`` saves at its entrance counts, what is recomputed inside it does not. Parameters, views and autocast copies of
them, small tensors and kinds that cannot be stored stay where they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from memory_mgmt.offload import HostStore, Parked

MIN_BYTES = 64 * 1024
"""Smaller tensors cost more to move than they free."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """A saved tensor that stays. Detached: a node that holds its own output in Python would never be freed."""

    tensor: Tensor
    version: int

    def unpack(self) -> Tensor:
        # Autograd leaves this check to the hooks.
        if not self.tensor.is_inference() and self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the backward pass needs was modified by an in-place operation: "
                f"it is at version {self.tensor._version}, expected {self.version}"
            )
        return self.tensor


@contextlib.contextmanager
def offloading(
    store: HostStore,
    slot: Hashable,
    *,
    min_bytes: int = MIN_BYTES,
    keep: Callable[[Tensor], bool] | None = None,
    parameters: Iterable[Tensor] = (),
) -> Iterator[None]:
    """Inside, what autograd saves is parked under ``slot``, and fetched when the backward pass asks for it.

    The first fetch of a layer starts the way back of the layer that parked before it. ``keep(tensor)``: True for what shall stay on
    the device. ``parameters``: tensors that must stay, besides what the store protects (``nn.Parameter`` stays anyway). Gradients are
    those of the plain model, bit for bit. Raises what ``HostStore.park`` raises.
    """
    staying = {parameter.untyped_storage()._cdata for parameter in parameters}

    def stays(tensor: Tensor) -> bool:
        if tensor.numel() * tensor.element_size() < min_bytes or store.why_not(tensor):
            return True
        return tensor.untyped_storage()._cdata in staying or (keep is not None and keep(tensor))

    def pack(tensor: Tensor) -> Parked | _Kept:
        if stays(tensor):
            return _Kept(tensor.detach(), 0 if tensor.is_inference() else tensor._version)
        return store.park(tensor, slot)

    def unpack(packed: Parked | _Kept) -> Tensor:
        if isinstance(packed, _Kept):
            return packed.unpack()
        tensor = packed.fetch()
        store.prefetch_before(packed)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
