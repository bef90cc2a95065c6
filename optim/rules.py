"""Pieces that several methods share: Adam's ratio of moments and the limit to a norm's growth. Pure functions of tensors and states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from optim.methods import StateSpec

TINY = 1e-8
"""Added to norms that divide (APOLLO and Fira)."""


@dataclass(frozen=True)
class Adam:
    """m ← β₁m + (1-β₁)g, v ← β₂v + (1-β₂)g², ratio m / (√v + ε), times √(1-β₂ᵗ) / (1-β₁ᵗ).

    ``form="hf"``: ε is added to the uncorrected root, as in the reference packages of GaLore, APOLLO and Fira; ``"torch"``: to the
    corrected one, as in torch.optim.AdamW and in Adam's paper (arXiv 1412.6980, algorithm 1).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    form: Literal["hf", "torch"] = "hf"

    def ratio(self, values: Tensor, states: dict[str, Tensor], step: int, out: Tensor | None = None) -> Tensor:
        """Of the moments ``exp_avg`` and ``exp_avg_sq``, which take ``values`` up; without the bias correction. ``out`` may be
        ``values``."""
        beta1, beta2 = self.betas
        mean, square = states["exp_avg"], states["exp_avg_sq"]
        mean.lerp_(values, 1 - beta1)
        square.mul_(beta2).addcmul_(values, values, value=1 - beta2)
        eps = self.eps if self.form == "hf" else self.eps * (1 - beta2**step) ** 0.5
        root = square_root(square, out).add_(eps)
        return torch.div(mean, root, out=root)

    def correction(self, step: int) -> float:
        """Of the bias, for the whole update."""
        beta1, beta2 = self.betas
        return (1 - beta2**step) ** 0.5 / (1 - beta1**step)


ADAM = Adam()
"""As the reference packages of GaLore, APOLLO and Fira have it."""

TORCH_ADAM = Adam(eps=1e-8, form="torch")
"""As torch.optim.AdamW has it."""


class Guard(Protocol):
    """Limits an update by its norm. Immutable."""

    def states(self) -> Mapping[str, StateSpec]: ...

    def factor(self, norm: Tensor, states: dict[str, Tensor], correction: float, elements: int) -> Tensor:
        """By which to multiply what has ``norm`` (a scalar or [1]) before it is multiplied by ``correction``; ``elements``: it has."""
        ...


@dataclass(frozen=True)
class NormGrowth:
    """Fira's norm-growth limiter (arXiv 2410.01623, section 4.3): a norm may grow by ``limit`` per step at most, counted from the
    limited norm of the step before.

    After a step of norm zero nothing is limited. The reference packages divide by that zero plus 1e-8 and so hold all later updates
    near zero.
    """

    limit: float = 1.01

    def states(self) -> Mapping[str, StateSpec]:
        return {"norm": StateSpec((1,), "whole")}

    def factor(self, norm: Tensor, states: dict[str, Tensor], correction: float, elements: int) -> Tensor:
        """See ``Guard``; compares norms before the correction and remembers the limited one."""
        previous = states["norm"]
        factor = torch.where(previous > 0, ((previous + TINY) * self.limit / norm).clamp_(max=1), 1.0)
        states["norm"].copy_(norm * factor)
        return factor


GROWTH = NormGrowth()
"""As in Fira and APOLLO."""


@dataclass(frozen=True)
class RmsClip:
    """Adafactor's clipping (arXiv 1804.04235, section 6): the root of an update's mean square is at most ``limit``."""

    limit: float = 1.0

    def states(self) -> Mapping[str, StateSpec]:
        return {}

    def factor(self, norm: Tensor, states: dict[str, Tensor], correction: float, elements: int) -> Tensor:
        """See ``Guard``; of the corrected update."""
        return 1 / (norm * (correction * elements**-0.5 / self.limit)).clamp(min=1)


def square_root(values: Tensor, out: Tensor | None = None) -> Tensor:
    """Of numbers not below 0. On CPUs by way of the reciprocal, whose operations IEEE 754 rounds one way, within 1.2e-7 of the root:
    torch's own there is off by a bit in a sixth of all numbers (its vector library's), and slow where there are zeros."""
    if values.device.type != "cpu":
        return torch.sqrt(values, out=out)
    return torch.rsqrt(values, out=out).reciprocal_()


def channel_scale(ratio: Tensor, coordinates: Tensor) -> Tensor:
    """‖ratio‖ / ‖coordinates‖ for each channel of the long side: [..., long, r] twice -> [..., long]."""
    return torch.linalg.vector_norm(ratio, dim=-1) / (torch.linalg.vector_norm(coordinates, dim=-1) + TINY)
