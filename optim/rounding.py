"""Rounding float32 to fewer bits without a bias, and 24-bit weights. Random bits here are hashes, not draws: the same on replicas, after
resharding and on every device, with no generator to save in a checkpoint.

``stochastic_bf16_``: float32 -> bfloat16, up with the probability that leaves the expectation alone; the bits are a function of seed,
parameter key, step and global element index. ``add_dither_``: the same idea for codecs of averages, from the number's own bits.
``split_24bit_`` and ``join_24bit``: a weight as bfloat16 (what the model computes with) and an int8 that corrects it to 24 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from optim.pieces import piece_elements, row_chunks

_GOLDEN = -1640531535
"""2^32 over the golden ratio, odd, as int32: its multiples spread evenly over 32 bits."""
_TILE = 4096
"""Elements that share one pair of keys; fixed, since it says which bits an element gets."""
_MASK64 = (1 << 64) - 1
_NAN_BITS = 0x7FC0


def add_dither_(steps: Tensor, value: Tensor, scratch: Tensor) -> Tensor:
    """Add to ``steps`` (float32, in units of the rounding step) what makes rounding to nearest unbiased on average: a number in
    [-1/2, 1/2] from a hash of the bits of ``value`` (float32). ``scratch``: int32 of the same shape. Returns ``steps``.

    For averages, whose last bits are as good as random; a zero gets 0.
    """
    torch.mul(value.view(torch.int32), _GOLDEN, out=scratch)
    return steps.add_(scratch, alpha=2.0**-32)


def bf16_by_own_bits_(value: Tensor, out: Tensor) -> None:
    """Write ``value`` (float32) into ``out`` (bfloat16) rounded up in magnitude by a chance that is a hash of its own bits."""
    for rows in _pieces(value):
        bits = value[rows].view(torch.int32)
        _keep_high((bits * _GOLDEN >> 16).bitwise_and_(0xFFFF).add_(bits), 16, bits, out[rows])


def stochastic_bf16_(value: Tensor, out: Tensor, *, seed: int, key: int, step: int, first: int = 0) -> None:
    """Write ``value`` (float32, contiguous) into ``out`` (bfloat16, contiguous, same shape), rounded up in magnitude with probability
    equal to the distance from the lower neighbour.

    ``first``: index of the first element in the global parameter, flattened: a rank that holds rows from ``r`` passes r times the
    elements of a row. ``key``: the parameter's own number. Infinities and NaN stay what they are; a number between the largest
    bfloat16 and infinity may become infinite, as in rounding to nearest.
    """
    bits, rounded = value.view(-1).view(torch.int32), out.view(-1)
    for here in row_chunks(bits.numel(), 1, piece_elements(value.device), value):
        chance = random_bits(first + here.start, here.stop - here.start, seed=seed, key=key, step=step, device=value.device)
        _keep_high(chance.int().bitwise_and_(0xFFFF).add_(bits[here]), 16, bits[here], rounded[here])


def random_bits(first: int, count: int, *, seed: int, key: int, step: int, device: torch.device) -> Tensor:
    """16 random bits (int16) for each element ``first`` .. ``first + count`` of the parameter ``key`` at ``step``.

    An element's bits are half of a 32-bit hash of its place in its tile, mixed twice with the tile's 64-bit key; that is a 64-bit hash
    of the seed, the parameter, the step and the tile's number.
    """
    tile = first // _TILE
    tiles = -(-(first + count) // _TILE) - tile
    keys = _mix64(torch.arange(tile, tile + tiles, device=device) + _stream(seed, key, step)).unsqueeze(1)
    bits = torch.arange(_TILE // 2, dtype=torch.int32, device=device) + keys.int()
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * 0x7FEB352D ^ (keys >> 32).int()
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    bits ^= (bits >> 16) & 0xFFFF
    return bits.view(torch.int16).view(-1)[first - tile * _TILE :][:count]


def split_24bit_(value: Tensor, high: Tensor, low: Tensor) -> None:
    """Store ``value`` (float32) as ``high`` (bfloat16, the nearest) and ``low`` (int8), of the same shape: float32 without its last
    8 bits, rounded to nearest, so ``join_24bit`` gives ``value`` within 2^-16 of itself, and exactly what was joined before."""
    for rows in _pieces(value):
        # high * 2^8 + low is the number rounded to 24 bits; each rounding adds half of what its shift drops.
        bits = value[rows].view(torch.int32)
        short = (bits + 0x80) >> 8
        low[rows] = short - ((short + 0x80) >> 8 << 8)
        _keep_high(short + 0x80, 8, bits, high[rows])


def join_24bit(high: Tensor, low: Tensor, out: Tensor | None = None) -> Tensor:
    """The float32 that ``split_24bit_`` stored, in ``out`` where given."""
    if out is None:
        out = torch.empty(high.shape, dtype=torch.float32, device=high.device)
    for rows in _pieces(high):
        out[rows].view(torch.int32).copy_((high[rows].view(torch.int16).int() << 16) + (low[rows].int() << 8))
    return out


def _pieces(tensor: Tensor) -> Iterator[slice]:
    return row_chunks(tensor.shape[0], tensor[:1].numel(), piece_elements(tensor.device), tensor)


def _keep_high(rounded: Tensor, shift: int, bits: Tensor, out: Tensor) -> None:
    """Write ``rounded >> shift`` as bfloat16; where ``bits``, those of the float32 itself, are NaN, NaN: a carry may have made anything
    of it. (In integers, since comparing floats takes longer than all the rest.)"""
    pattern = rounded >> shift
    beyond_infinity = (bits & 0x7FFFFFFF).neg_().add_(0x7F800000).bitwise_right_shift_(31)  # -1 where NaN, else 0
    out.view(torch.int16).copy_(pattern.bitwise_or_(beyond_infinity.bitwise_and_(_NAN_BITS)))


def _stream(seed: int, key: int, step: int) -> int:
    """64 bits, as a signed number, of the three."""
    state = 0
    for number in (seed, key, step):
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK64
        state ^= state >> 31
    return state - (state >> 63 << 64)


def _mix64(numbers: Tensor) -> Tensor:
    """A 64-bit hash of each int64 (the finaliser of SplitMix64)."""
    numbers = (numbers ^ ((numbers >> 30) & (1 << 34) - 1)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    numbers = (numbers ^ ((numbers >> 27) & (1 << 37) - 1)) * (0x94D049BB133111EB - (1 << 64))
    return numbers ^ ((numbers >> 31) & (1 << 33) - 1)
