"""``fused.py``'s kernels for CUDA, in triton: see ``fused_adam.cpp``, whose operations these are in the same order.

Division and roots are IEEE 754's (``div_rn``, ``sqrt_rn``), multiply-adds are fused where the C++ path fuses them and nowhere else.
Without a GPU: TRITON_INTERPRET=1 (tests/optim/test_fused_triton.py).
"""

# triton reads these functions' sources and gives its own meaning to their names, so there are no annotations that it does not know.
# pyright: basic

from __future__ import annotations

from typing import Any

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

BLOCK = tl.constexpr(128)
HALF = tl.constexpr(64)
MANY = 8
"""Blocks of a program."""


def launch(tensors: tuple[Tensor, ...], bits: int, numbers: list[float], writes: bool) -> None:
    """``tensors``: weight, gradient, mean codes and scales, square codes and scales. ``numbers``: as ``fused_adam.cpp``'s Settings."""
    weight = tensors[0]
    rows = weight.shape[0]
    columns = weight.numel() // rows
    blocks = rows * triton.cdiv(columns, 128)
    kernel: Any = _step_int8 if bits == 8 else _step_int4
    kernel[(triton.cdiv(blocks, MANY),)](*tensors, blocks, columns, *numbers, writes, MANY, enable_fp_fusion=False)


@triton.jit
def _largest(x):
    """Of magnitudes in each row, as integers: a NaN is above infinity and so is not lost."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def _as_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _at_least(x, least):
    return tl.where(x < least, least, x)  # NaN stays


@triton.jit
def _at_most(x, most):
    return tl.where(x > most, most, x)


@triton.jit
def _nearest(x):
    """The nearest whole number, ties to even, of numbers below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _dithered(steps, value):
    hashed = value.to(tl.int32, bitcast=True) * -1640531535
    return steps + hashed.to(tl.float32) * 2.3283064365386963e-10


@triton.jit
def _reciprocal_root(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), tl.sqrt_rn(x))


@triton.jit
def _adam(gradient, mean, square, beta2, rest1, rest2, eps, correction):
    mean = tl.fma(tl.zeros(mean.shape, tl.float32) + rest1, gradient - mean, mean)
    square = tl.fma(rest2 * gradient, gradient, square * beta2)
    root = tl.div_rn(tl.full(square.shape, 1.0, tl.float32), _reciprocal_root(square))
    return mean, square, tl.div_rn(mean, root + eps) * correction


@triton.jit
def _put(weight, at, inside, update, keep, lr, writes):
    if writes:
        kept = tl.load(weight + at, inside, other=0.0) * keep
        update = tl.fma(update, tl.zeros(update.shape, tl.float32) - lr, kept)
    tl.store(weight + at, update, inside)


@triton.jit
def _step_int8(
    weight, gradient, mean_codes, mean_scales, square_codes, square_scales, blocks, columns,
    beta2, rest1, rest2, eps, correction, keep, lr, writes: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * MANY + tl.arange(0, MANY)
    exists = block < blocks
    of_row = (columns + BLOCK - 1) // BLOCK
    column = (block % of_row)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = exists[:, None] & (column < columns)
    at = (block // of_row)[:, None] * columns + column

    code = tl.load(mean_codes + at, inside, other=0).to(tl.float32)
    mean = code * tl.abs(code) * tl.load(mean_scales + block, exists, other=0.0)[:, None]
    code = tl.load(square_codes + at, inside, other=0).to(tl.float32)
    code = code * code
    square = code * code * tl.load(square_scales + block, exists, other=0.0)[:, None]
    given = tl.load(gradient + at, inside, other=0.0)
    mean, square, update = _adam(given, mean, square, beta2, rest1, rest2, eps, correction)
    _put(weight, at, inside, update, keep, lr, writes)

    scale = _as_float(_largest(tl.where(inside, mean, 0.0))) * (1.0 / 16129.0)
    tl.store(mean_scales + block, scale, exists)
    scaled = tl.div_rn(mean, tl.broadcast_to(_at_least(scale, 1.1754943508222875e-38)[:, None], mean.shape))
    code = _nearest(scaled * _reciprocal_root(_at_least(tl.abs(scaled), 1e-3)))
    tl.store(mean_codes + at, code.to(tl.int32).to(tl.int8), inside)

    scale = _as_float(_largest(tl.where(inside, square, 0.0))) * (1.0 / 4228250625.0)
    tl.store(square_scales + block, scale, exists)
    scaled = tl.div_rn(square, tl.broadcast_to(_at_least(scale, 1.1754943508222875e-38)[:, None], square.shape))
    code = _nearest(_dithered(_reciprocal_root(_reciprocal_root(scaled)), square))
    tl.store(square_codes + at, _at_most(_at_least(code, 1.0), 255.0).to(tl.int32).to(tl.uint8), inside)


@triton.jit
def _moments_int4(mean_code, square_code, mean_scale, square_scale):
    mean = mean_code.to(tl.float32) - 8.0
    square = square_code.to(tl.float32) + 1.0
    return mean * tl.abs(mean) * mean_scale[:, None], square * square * square_scale[:, None]


@triton.jit
def _mean_code_int4(mean, divisor):
    root = tl.div_rn(tl.abs(mean), tl.broadcast_to(divisor[:, None], mean.shape)) - 0.25
    sign = tl.where(mean > 0.0, 1.0, tl.where(mean < 0.0, -1.0, 0.0))
    return (_nearest(tl.sqrt_rn(_at_least(root, 1e-3))) * sign + 8.0).to(tl.int32)


@triton.jit
def _square_code_int4(square, divisor):
    scaled = tl.div_rn(square, tl.broadcast_to(divisor[:, None], square.shape))
    root = tl.div_rn(tl.full(scaled.shape, 1.0, tl.float32), _reciprocal_root(scaled))
    return _at_most(_at_least(_nearest(_dithered(root, square)), 1.0), 16.0).to(tl.int32) - 1


@triton.jit
def _step_int4(
    weight, gradient, mean_codes, mean_scales, square_codes, square_scales, blocks, columns,
    beta2, rest1, rest2, eps, correction, keep, lr, writes: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * MANY + tl.arange(0, MANY)
    exists = block < blocks
    of_row = (columns + BLOCK - 1) // BLOCK
    row, first = block // of_row, (block % of_row) * BLOCK
    count = tl.minimum(columns - first, 128)
    half = (count + 1) // 2
    # Of a block the second half lies behind the first: in a byte, the low four bits are one, the high four the other.
    place = tl.arange(0, HALF)[None, :]
    is_low = exists[:, None] & (place < half[:, None])
    is_high = exists[:, None] & (place + half[:, None] < count[:, None])
    low = (row * columns + first)[:, None] + place
    high = low + half[:, None]
    byte = (row * ((columns + 1) // 2) + first // 2)[:, None] + place

    mean_scale = tl.load(mean_scales + block, exists, other=0.0)
    square_scale = tl.load(square_scales + block, exists, other=0.0)
    mean_byte = tl.load(mean_codes + byte, is_low, other=0).to(tl.int32)
    square_byte = tl.load(square_codes + byte, is_low, other=0).to(tl.int32)
    mean_low, square_low = _moments_int4(mean_byte & 15, square_byte & 15, mean_scale, square_scale)
    mean_high, square_high = _moments_int4(mean_byte >> 4, square_byte >> 4, mean_scale, square_scale)
    given_low = tl.load(gradient + low, is_low, other=0.0)
    given_high = tl.load(gradient + high, is_high, other=0.0)
    mean_low, square_low, update_low = _adam(given_low, mean_low, square_low, beta2, rest1, rest2, eps, correction)
    mean_high, square_high, update_high = _adam(given_high, mean_high, square_high, beta2, rest1, rest2, eps, correction)
    _put(weight, low, is_low, update_low, keep, lr, writes)
    _put(weight, high, is_high, update_high, keep, lr, writes)

    most = tl.maximum(_largest(tl.where(is_low, mean_low, 0.0)), _largest(tl.where(is_high, mean_high, 0.0)))
    scale = _as_float(most) * (1.0 / 49.0)
    tl.store(mean_scales + block, scale, exists)
    divisor = _at_least(scale, 1.1754943508222875e-38)
    above = tl.where(is_high, _mean_code_int4(mean_high, divisor), 0)
    tl.store(mean_codes + byte, (_mean_code_int4(mean_low, divisor) + 16 * above).to(tl.uint8), is_low)

    most = tl.maximum(_largest(tl.where(is_low, square_low, 0.0)), _largest(tl.where(is_high, square_high, 0.0)))
    scale = _as_float(most) * (1.0 / 256.0)
    tl.store(square_scales + block, scale, exists)
    divisor = _at_least(scale, 1.1754943508222875e-38)
    above = tl.where(is_high, _square_code_int4(square_high, divisor), 0)
    tl.store(square_codes + byte, (_square_code_int4(square_low, divisor) + 16 * above).to(tl.uint8), is_low)
