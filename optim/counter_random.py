"""Random numbers that are a function of (key, epoch, row, column) alone: any rank makes any rows, without a generator's state, and
gets the same bits on every mesh.

Splitmix64 (Steele, Lea, Flood 2014) of a counter, then Box-Muller in float64. Rounding to float32 last hides the last-bit
differences of logarithm and cosine between vector and scalar code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def gaussian_rows(key: int, epoch: int, first: int, count: int, columns: int, device: torch.device) -> Tensor:
    """Rows ``first`` to ``first + count`` of a matrix of independent N(0, 1), float32 [count, columns]."""
    pairs = -(-columns // 2)
    counter = torch.arange(first * pairs, (first + count) * pairs, device=device)
    bits = _mix(counter * _signed(_GAMMA) + _signed(_stream(key, epoch)))
    radius = torch.sqrt(-2 * torch.log(_uniform(_shift(bits, 32))))
    angle = _uniform(bits & 0xFFFFFFFF) * (2 * math.pi)
    normal = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return normal.reshape(count, 2 * pairs)[:, :columns].float().contiguous()


def _uniform(bits_32: Tensor) -> Tensor:
    """In (0, 1), never 0: the logarithm stays finite."""
    return (bits_32.double() + 0.5) * 2.0**-32


def _mix(x: Tensor) -> Tensor:
    for shift, factor in _MIX:
        x = (x ^ _shift(x, shift)) * _signed(factor)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Right, filling with zeros: int64 fills with the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _stream(key: int, epoch: int) -> int:
    """A start of the counter for each (key, epoch); the same mixing in Python's integers."""
    seed = 0
    for part in (key, epoch):
        seed = (seed + part + _GAMMA) % 2**64
        for shift, factor in _MIX:
            seed = (seed ^ (seed >> shift)) * factor % 2**64
        seed ^= seed >> 31
    return seed


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
