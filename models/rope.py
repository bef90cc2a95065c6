"""Rotary position embedding at explicit positions, with the usual ways to stretch a model past its original length.

Pair (i, i + D/2) of a head is rotated by ``position * frequency_i`` (Su et al. 2021, arXiv 2104.09864; the half-split
pairing of Llama). Angles are computed in float64: at position 10^6 float32 would be off by 0.06 rad. Positions come from the
batch (they count from the start of a document), never from the local index.

Try alone: ``python -c "from models.rope import *; print(frequencies(RopeConfig(scaling='yarn', factor=8.0), 64))"``.

Legend: B batch row, H heads, T tokens, D head size, K = D / 2 rotated pairs.
"""

from __future__ import annotations

import math

import torch

from models.config import RopeConfig

_TOKENS_PER_PASS = 1 << 16
"""Positions whose float64 angles exist at a time."""


def frequencies(config: RopeConfig, head_dim: int) -> list[float]:
    """Rotation per position of each of the D/2 pairs, in radians, after scaling.

    linear: positions shrink by ``factor`` (Chen et al. 2023, arXiv 2306.15595). ntk: the base grows to
    ``theta * factor^(D/(D-2))``, so the slowest pair is interpolated by ``factor`` and the fastest not at all.
    yarn: a ramp between the two by the number of turns within ``original_max_positions`` (Peng et al. 2023, arXiv 2309.00071, 3.2).
    llama3: the same with another ramp, straight in the number of turns itself (Llama 3.1's reference code).
    """
    exponents = [2 * i / head_dim for i in range(head_dim // 2)]
    theta = config.theta
    if config.scaling == "ntk" and head_dim > 2:
        theta *= config.factor ** (head_dim / (head_dim - 2))
    plain = [theta**-e for e in exponents]
    if config.scaling == "linear":
        return [f / config.factor for f in plain]
    if config.scaling == "yarn":
        return [f * (keep + (1 - keep) / config.factor) for f, keep in zip(plain, _yarn_kept(config, head_dim), strict=True)]
    if config.scaling == "llama3":
        return [f * (keep + (1 - keep) / config.factor) for f, keep in zip(plain, _llama3_kept(config, plain), strict=True)]
    return plain


def attention_temperature(config: RopeConfig) -> float:
    """Factor on the rotated q and k: YaRN's ``0.1 ln(factor) + 1`` (equation 22; scores grow by the square) or the one given, else 1."""
    if config.scaling != "yarn":
        return 1.0
    return 0.1 * math.log(config.factor) + 1.0 if config.attention_factor is None else config.attention_factor


def _llama3_kept(config: RopeConfig, plain: list[float]) -> list[float]:
    """Share of the original frequency that each pair keeps: 1 for fast pairs, 0 for slow ones, linear in the number of turns between."""
    turns = [config.original_max_positions * frequency / (2 * math.pi) for frequency in plain]
    low, high = config.low_freq_factor, config.high_freq_factor
    return [min(max((n - low) / (high - low), 0.0), 1.0) for n in turns]


def _yarn_kept(config: RopeConfig, head_dim: int) -> list[float]:
    """Share of the original frequency that each pair keeps: 1 for fast pairs, 0 for slow ones, linear in the pair's index between."""

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(config.original_max_positions / (times * 2 * math.pi)) / (2 * math.log(config.theta))

    low = max(math.floor(pair_that_turns(config.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(config.beta_slow)), head_dim - 1)
    width = max(high - low, 1e-3)
    return [1.0 - min(max((i - low) / width, 0.0), 1.0) for i in range(head_dim // 2)]


class Rope:
    """Rotates queries and keys; holds no parameters, and no buffers that a move between devices could round."""

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        self.frequencies = frequencies(config, head_dim)
        self.temperature = attention_temperature(config)

    def __call__(self, x_BHTD: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
        """``x`` rotated to its positions; same shape and dtype. Differentiable."""
        return rotate(x_BHTD, *self.table(positions_BT, x_BHTD.dtype))

    def table(self, positions_BT: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each [B, 1, T, K], for q and k of ``dtype``: float64 for float64, else float32."""
        table_dtype = torch.promote_types(dtype, torch.float32)
        frequency_K = torch.tensor(self.frequencies, dtype=torch.float64, device=positions_BT.device)
        batch, length = positions_BT.shape
        cos_B1TK = torch.empty(batch, 1, length, len(self.frequencies), dtype=table_dtype, device=positions_BT.device)
        sin_B1TK = torch.empty_like(cos_B1TK)
        for start in range(0, length, _TOKENS_PER_PASS):
            part = slice(start, start + _TOKENS_PER_PASS)
            angle_B1TK = positions_BT[:, None, part, None].double() * frequency_K
            cos_B1TK[:, :, part] = angle_B1TK.cos().mul_(self.temperature)
            sin_B1TK[:, :, part] = angle_B1TK.sin_().mul_(self.temperature)
        return cos_B1TK, sin_B1TK


def rotate(x_BHTD: torch.Tensor, cos_B1TK: torch.Tensor, sin_B1TK: torch.Tensor) -> torch.Tensor:
    """``x`` rotated by the angles of ``Rope.table``; products in the table's dtype, result in x's. Differentiable in x."""
    return _Rotate.apply(x_BHTD, cos_B1TK, sin_B1TK)  # pyright: ignore[reportReturnType]


class _Rotate(torch.autograd.Function):
    """Saves only the table, which all layers share; the backward turns the other way."""

    @staticmethod
    def forward(ctx, x_BHTD, cos_B1TK, sin_B1TK):
        ctx.save_for_backward(cos_B1TK, sin_B1TK)
        return turn(x_BHTD, cos_B1TK, sin_B1TK, 1.0)

    @staticmethod
    def backward(ctx, dy_BHTD):  # pyright: ignore[reportIncompatibleMethodOverride]
        cos_B1TK, sin_B1TK = ctx.saved_tensors
        return turn(dy_BHTD, cos_B1TK, sin_B1TK, -1.0), None, None


def turn(
    x_BHTD: torch.Tensor, cos_B1TK: torch.Tensor, sin_B1TK: torch.Tensor, direction: float, out_BHTD: torch.Tensor | None = None
) -> torch.Tensor:
    """`rotate` (direction 1) or its transpose (-1), not differentiable, into ``out`` if given (which is not ``x``)."""
    first, second = x_BHTD.chunk(2, dim=-1)
    if out_BHTD is None:
        out_BHTD = torch.empty_like(x_BHTD)
    out_first, out_second = out_BHTD.chunk(2, dim=-1)
    out_first.copy_((first * cos_B1TK).addcmul_(second, sin_B1TK, value=-direction))
    out_second.copy_((second * cos_B1TK).addcmul_(first, sin_B1TK, value=direction))
    return out_BHTD
