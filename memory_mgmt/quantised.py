"""Tensors in eight bits: inexact, only where the user allows it (``memory.quantise``), off by default.

One scale per group of 128 neighbouring elements of a row (last dim): the group's largest magnitude over what eight bits reach. int8
comes back within 1/254 of the group's largest magnitude; fp8 (e4m3) within 1/16 of each value, or of the smallest that it tells from
0. On top of that comes the rounding of the tensor's own dtype. Of a group with an infinity or a NaN nothing finite comes back. The same
input gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from memory_mgmt.quantised_costs import CHUNK, GROUP
from models.repeat import turns

Quantise = Literal["int8", "fp8"]

_TARGETS: dict[str, tuple[torch.dtype, float]] = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


class Quantised(NamedTuple):
    """A tensor in eight bits: ``values`` of its shape, ``scales`` [..., groups of a row], and the dtype that it had."""

    values: Tensor
    scales: Tensor
    dtype: torch.dtype

    def restored(self) -> Tensor:
        """What was taken, up to its rounding; contiguous."""
        return dequantised(self.values, self.scales, self.dtype)


def quantised(tensor: Tensor, kind: Quantise = "int8") -> Quantised:
    """``tensor`` in eight bits, contiguous. Raises ValueError for what is not floating point of at least 16 bits."""
    if kind not in _TARGETS:
        raise ValueError(f"quantise is {kind!r}; it is one of {', '.join(_TARGETS)}")
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        raise ValueError(f"a tensor of {tensor.dtype} cannot be held in eight bits; floating point of at least 16 bits can")
    dtype, limit = _TARGETS[kind]
    *outer, width = tensor.shape or (1,)
    rows = tensor.detach().reshape(math.prod(outer), width)
    # A scale in bf16 is as good as a wide one, because what is divided by is the rounded scale; float16 would lose small scales.
    scale_dtype = torch.float32 if tensor.dtype == torch.float16 else tensor.dtype
    values = rows.new_empty(rows.shape, dtype=dtype)
    scales = rows.new_empty((len(rows), -(-width // GROUP)), dtype=scale_dtype)
    for piece, taken, scale in _pieces(rows, values, scales):
        _quantise(piece, taken, scale, limit)
    return Quantised(values.view(tensor.shape), scales.view(*outer, -(-width // GROUP)), tensor.dtype)


def dequantised(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``quantised`` took, up to its rounding; contiguous."""
    *outer, width = values.shape or (1,)
    rows = values.reshape(math.prod(outer), width)
    restored = rows.new_empty(rows.shape, dtype=dtype)
    for piece, out, scale in _pieces(rows, restored, scales.reshape(len(rows), -(-width // GROUP))):
        if scale.dtype == dtype:
            out.copy_(piece).mul_(scale)
        else:
            out.copy_(piece.to(scale.dtype).mul_(scale))
    return restored.view(values.shape)


def _quantise(piece: Tensor, values: Tensor, scale: Tensor, limit: float) -> None:
    """Groups [r, g, n] into ``values`` of that shape and ``scale`` [r, g, 1]."""
    wide = torch.promote_types(piece.dtype, torch.float32)
    if piece.is_cuda:  # promotes inside its kernels
        found = torch.linalg.vector_norm(piece, math.inf, dim=-1, keepdim=True, dtype=wide)
    else:  # a norm would take ten times as long, and mixed dtypes would be copied unseen
        piece = piece.to(wide)
        found = torch.maximum(piece.amax(-1, keepdim=True), piece.amin(-1, keepdim=True).neg_())
    # Below the normal numbers a scale has no inverse.
    scale.copy_(found.div_(limit).clamp_min_(torch.finfo(wide).tiny))
    scaled = piece * torch.reciprocal(scale.to(wide))
    # What the cast makes of a NaN does not matter: the scale is infinite or NaN too.
    values.copy_(scaled.round_() if values.dtype == torch.int8 else scaled)


def _pieces(rows: Tensor, others: Tensor, scales: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """``rows`` and ``others`` [R, W] as groups [r, g, n], with their ``scales`` [r, g, 1], a chunk of rows at a time."""
    n_rows, width = rows.shape
    if not rows.numel():
        return
    step = max(1, CHUNK["cuda" if rows.is_cuda else "cpu"] // width)
    spans = [(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]
    whole = width // GROUP * GROUP
    for a, b in turns(spans, rows, lambda span: span[1] - span[0]):
        for first, end, n in ((0, whole, GROUP), (whole, width, width - whole)):
            if end > first:
                piece, other = (x[a:b, first:end].unflatten(1, (-1, n)) for x in (rows, others))
                yield piece, other, scales[a:b, first // GROUP : -(-end // GROUP), None]
