"""APOLLO and APOLLO-Mini: the whole gradient, scaled as Adam scales a random projection of it. Written from the paper's equations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from optim.low_rank import moment_specs
from optim.methods import GatherRows, Rows, StateSpec, Steps, Sum
from optim.projectors import GaussianProjector, Projector, project, usable_rank
from optim.rules import ADAM, GROWTH, TINY, Adam, NormGrowth, channel_scale


@dataclass(frozen=True)
class Apollo:
    """APOLLO (arXiv 2412.05270, algorithm 1), with coordinates R = Pᵀ G (G P of tall matrices) in a random subspace and N = m / (√v + ε)
    the ratio of Adam's moments of R:

        channel: sⱼ = ‖N_j‖ / ‖R_j‖ for each channel j of the long side (section 4.1);  tensor: s = ‖N‖ / ‖R‖ (section 4.3)
        U = √scale · G · diag(s), limited in the growth of its norm (section 4.2),  update = U · √(1-β₂ᵗ)/(1-β₁ᵗ)

    The reference package can scale before or after the limiter; the limiter compares norms with norms, so both give the same.
    Moments are kept when the basis is renewed. Requests: tall 1; wide 3 by channel, 2 by tensor.
    """

    projector: Projector
    scaling: Literal["channel", "tensor"] = "channel"
    rule: Adam = ADAM
    scale: float = 1.0
    growth: NormGrowth | None = GROWTH

    def states(self, shape: tuple[int, int]) -> Mapping[str, StateSpec]:
        side, rank = self.projector.side(shape), usable_rank(self.projector.rank, shape)
        growth = {} if self.growth is None else self.growth.states()
        return {**self.projector.states(shape), **moment_specs(shape, side, rank), **growth}

    def step(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        side = self.projector.side((rows.total, gradient_in.shape[1]))
        basis = yield from self.projector.basis(gradient_in, states, rows, step, key)
        coordinates = yield from project(gradient_in, basis, side)
        ratio = self.rule.ratio(coordinates, states, step)
        if self.scaling == "tensor":
            squares = yield Sum(torch.stack([part.square().sum() for part in (ratio, coordinates, gradient_in)]))
            of_ratio, of_coordinates, of_gradient = squares.sqrt().unbind()
            scale = self.scale**0.5 * of_ratio / (of_coordinates + TINY)
            return gradient_in * (scale * self._limited(scale * of_gradient, states) * self.rule.correction(step))
        scale = channel_scale(ratio, coordinates).mul_(self.scale**0.5)
        update = gradient_in * (scale[:, None] if side == "right" else (yield GatherRows(scale, gradient_in.shape[1]))[None, :])
        if self.growth is None:
            return update.mul_(self.rule.correction(step))
        squares = yield Sum(update.square().sum().reshape(1))
        return update.mul_(self._limited(squares.sqrt(), states) * self.rule.correction(step))

    def _limited(self, norm: Tensor, states: dict[str, Tensor]) -> Tensor:
        return torch.ones_like(norm) if self.growth is None else self.growth.factor(norm, states)


def apollo_mini(scale: float = 128.0, rule: Adam = ADAM) -> Apollo:
    """APOLLO-Mini (section 4.3): rank 1, one factor for the whole matrix."""
    return Apollo(GaussianProjector(rank=1), "tensor", rule, scale)
