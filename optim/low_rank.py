"""Methods that keep Adam's moments in a low-rank subspace of the gradient and lift the ratio back: GaLore, and Fira, which adds what
the subspace leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from optim.methods import GatherRows, Rows, StateSpec, Steps, Sum
from optim.projectors import Projector, Side, coordinates_spec, lift, project, usable_rank
from optim.rules import ADAM, GROWTH, Adam, NormGrowth, channel_scale


def moment_specs(shape: tuple[int, int], side: Side, columns: int) -> Mapping[str, StateSpec]:
    """Adam's two moments of coordinates [long side, columns]."""
    return {
        "exp_avg": coordinates_spec(shape, side, columns, "moment"),
        "exp_avg_sq": coordinates_spec(shape, side, columns, "variance"),
    }


@dataclass(frozen=True)
class GaLore:
    """GaLore (arXiv 2403.03507, algorithm 2), for a left basis U and coordinates R = Uᵀ G (right: R = G V):

        m ← β₁m + (1-β₁)R,  v ← β₂v + (1-β₂)R²,  N = m / (√v + ε) · √(1-β₂ᵗ)/(1-β₁ᵗ),  update = scale · U N  (N Vᵀ)

    Moments are kept as they are when the basis is renewed, as in the paper. Reference package: Adam's form and ε as in ``Adam``'s
    defaults, all bases renewed in the same step (``Refresh(stagger=False)``), decay after the update (the driver's).
    Requests besides a refresh: none for tall matrices, two for wide ones.
    """

    projector: Projector
    rule: Adam = ADAM
    scale: float = 0.25

    def states(self, shape: tuple[int, int]) -> Mapping[str, StateSpec]:
        side = self.projector.side(shape)
        return {**self.projector.states(shape), **moment_specs(shape, side, usable_rank(self.projector.rank, shape))}

    def step(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        columns = gradient_in.shape[1]
        side = self.projector.side((rows.total, columns))
        basis = yield from self.projector.basis(gradient_in, states, rows, step, key)
        coordinates = yield from project(gradient_in, basis, side)
        ratio = self.rule.ratio(coordinates, states, step).mul_(self.scale * self.rule.correction(step))
        return (yield from lift(ratio, basis, side, columns))


@dataclass(frozen=True)
class Fira:
    """Fira (arXiv 2410.01623, algorithm 1): GaLore, plus the residual scaled channel by channel as Adam scales the coordinates:

        φⱼ = ‖N_j‖ / ‖R_j‖,  S = φ ⊙ (G - U R),  S limited in the growth of its norm,  update = (scale · U N + S) · √(1-β₂ᵗ)/(1-β₁ᵗ)

    with N before bias correction and j along the long side. ``scaled_residual`` takes S = φ ⊙ (G - scale · U R), as the reference
    package does, where the projection back includes the scale. Requests besides a refresh: 1 tall, 3 wide.
    """

    projector: Projector
    rule: Adam = ADAM
    scale: float = 0.25
    growth: NormGrowth = GROWTH
    scaled_residual: bool = False

    def states(self, shape: tuple[int, int]) -> Mapping[str, StateSpec]:
        return {**GaLore(self.projector).states(shape), **self.growth.states()}

    def step(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        columns = gradient_in.shape[1]
        side = self.projector.side((rows.total, columns))
        basis = yield from self.projector.basis(gradient_in, states, rows, step, key)
        coordinates = yield from project(gradient_in, basis, side)
        ratio = self.rule.ratio(coordinates, states, step)
        inside = self.scale if self.scaled_residual else 1.0
        if side == "right":
            residual = gradient_in - inside * (coordinates @ basis.T)
            residual *= channel_scale(ratio, coordinates)[:, None]
            update = (ratio @ basis.T).mul_(self.scale)
        else:
            both_nr = yield GatherRows(torch.cat((ratio, coordinates), dim=1), columns)
            ratio, coordinates = both_nr.chunk(2, dim=1)
            residual = gradient_in - inside * (basis @ coordinates.T)
            residual *= channel_scale(ratio, coordinates)[None, :]
            update = (basis @ ratio.T).mul_(self.scale)
        squares = yield Sum(residual.square().sum().reshape(1))
        return update.add_(residual.mul_(self.growth.factor(squares.sqrt(), states))).mul_(self.rule.correction(step))
