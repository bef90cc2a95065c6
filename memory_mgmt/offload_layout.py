"""Which bytes of a tensor go to host memory, and how the tensor is made again from them.

A tensor whose elements fill their stretch of storage (any permutation, expanded or not) is stored as that stretch, so that other views of
it can share the copy. One with holes, such as a slice of columns, is packed: only its own elements are stored. Strides are restored
exactly in both cases; identity is storage, version and byte range, never an address alone (ms-swift#10157: two views with one
address, one transposed, silently exchanged).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_SAME_VALUES = {
    f"{name}Backward0"
    for name in (
        *("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Alias", "AsStrided", "Expand", "Slice", "Select"),
        *("Squeeze", "Unsqueeze", "Narrow", "ToCopy", "Split", "SplitWithSizes", "Unbind", "MT", "Clone"),
    )
}
"""Autograd nodes that view, copy or cast."""


_NO_DISPATCH = torch._C._disabled_torch_dispatch_impl


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor as a view of stored bytes."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    low: int
    """First byte of the tensor in its storage."""
    high: int
    """One after its last byte."""
    packed: bool
    """Only its elements are stored, in row-major order of ``packed_size``, not the stretch [low, high)."""
    overlaps: bool
    """Two indices may share an element (expanded dims aside)."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of host memory."""
        if not self.packed:
            return self.high - self.low
        numel = 1
        for size in self.packed_size:
            numel *= size
        return numel * self.dtype.itemsize

    @property
    def packed_size(self) -> tuple[int, ...]:
        """Shape of the elements that are stored: expanded dims count once."""
        return tuple(1 if not stride else size for size, stride in zip(self.size, self.stride, strict=True))


def layout_of(tensor: Tensor) -> Layout:
    """How ``tensor`` is to be stored."""
    size, stride, item = tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype.itemsize
    low = int(tensor.storage_offset()) * item
    if 0 in size:
        return Layout(size, stride, tensor.dtype, low, low, packed=False, overlaps=False)
    extent = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    dims = sorted((s, n) for n, s in zip(size, stride, strict=True) if n > 1 and s)
    filled, distinct = 1, True  # elements up to here if there are no holes; no two indices share an element
    reach = 1
    for s, n in dims:
        distinct &= s >= reach
        reach = s * (n - 1) + reach
        filled *= n
    return Layout(size, stride, tensor.dtype, low, low + extent * item, distinct and filled < extent, not distinct)


def flat_bytes(tensor: Tensor, layout: Layout) -> Tensor:
    """The bytes to store, as a flat uint8 tensor on the tensor's device: a view, or a new one when packed."""
    if layout.packed:
        narrowed = tensor.as_strided(layout.packed_size, layout.stride, tensor.storage_offset())
        return narrowed.contiguous().flatten().view(torch.uint8)
    extent = (layout.high - layout.low) // layout.dtype.itemsize
    return tensor.as_strided((extent,), (1,), tensor.storage_offset()).view(torch.uint8)


def restored(stored: Tensor, layout: Layout, low: int, compact: bool) -> Tensor:
    """The tensor that ``layout`` describes, from stored bytes that begin at byte ``low`` of its storage: a view of ``stored``, or,
    packed, a new tensor with the old strides (a view again when those are contiguous or ``compact`` asks for it)."""
    if layout.packed:
        elements = stored.view(layout.dtype).view(layout.packed_size)
        if compact or elements.stride() == layout.stride:
            return elements.expand(layout.size)
        extent = (layout.high - layout.low) // layout.dtype.itemsize
        memory = torch.empty(extent, dtype=layout.dtype, device=stored.device)
        memory.as_strided(layout.packed_size, layout.stride).copy_(elements)
        return memory.as_strided(layout.size, layout.stride)
    part = stored[layout.low - low : layout.high - low].view(layout.dtype)
    view = part.as_strided(layout.size, layout.stride, part.storage_offset())
    return view.contiguous() if compact else view


def fake_mode_of(tensor: Tensor) -> Any:
    """The FakeTensorMode that a fake tensor belongs to, None for a real one."""
    return tensor.fake_mode if isinstance(tensor, FakeTensor) else None


def why_not(tensor: Tensor) -> str:
    """Why a tensor cannot be stored, whatever its values; empty if it can."""
    plain = isinstance(tensor, FakeTensor) or getattr(type(tensor), "__torch_dispatch__", None) is _NO_DISPATCH
    if not plain or isinstance(tensor, nn.Parameter):
        return f"it is a {type(tensor).__name__}"
    if tensor.layout is not torch.strided:
        return f"its layout is {tensor.layout}"
    if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return "it is quantized, or a lazy conjugate or negative"
    return ""


def from_parameter(tensor: Tensor) -> bool:
    """True for a parameter, a view of one, and a cast copy of one (as autocast makes them)."""
    if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
        return True
    node = tensor.grad_fn
    while node is not None and node.name() in _SAME_VALUES:
        if len(node.next_functions) != 1:
            return False
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), nn.Parameter)
