"""Parking in eight bits: inexact, only where the plan allows it, off by default.

One scale per row (last dim): its largest magnitude. int8 rounds to 1/254 of the row's range; fp8 (e4m3) to 1/16 of each value.
A row with an infinity or a NaN comes back as NaN.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Quantise = Literal["int8", "fp8"]

_TARGETS: dict[str, tuple[torch.dtype, float]] = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


def quantised(tensor: Tensor, kind: Quantise) -> tuple[Tensor, Tensor]:
    """(values in eight bits, scales [..., 1] in float32, float64 for float64). Raises ValueError for what is not floating point."""
    if kind not in _TARGETS:
        raise ValueError(f"quantise is {kind!r}; it is one of {', '.join(_TARGETS)}")
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        raise ValueError(f"a tensor of {tensor.dtype} cannot be parked in eight bits; floating point of at least 16 bits can")
    dtype, limit = _TARGETS[kind]
    rows = tensor if tensor.ndim else tensor.unsqueeze(0)
    scale = rows.abs().amax(-1, keepdim=True).to(torch.promote_types(tensor.dtype, torch.float32)) / limit
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    values = (rows / scale).clamp_(-limit, limit)
    values = values.round_() if kind == "int8" else values
    # The cast of a NaN to an integer is undefined; the scale carries it.
    return values.nan_to_num_(0.0).to(dtype).view(tensor.shape), scale


def dequantised(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``quantised`` took, up to its rounding; contiguous."""
    rows = values if values.ndim else values.unsqueeze(0)
    return (rows.to(scale.dtype) * scale).to(dtype).view(values.shape)
