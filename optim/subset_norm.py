"""Subset-Norm with Subspace-Momentum: one second moment per channel, momentum in a subspace and none outside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from optim.methods import GatherRows, Rows, StateSpec, Steps, SumRows
from optim.projectors import Projector, coordinates_spec, usable_rank
from optim.rules import ADAM, Adam


@dataclass(frozen=True)
class SubsetNormMomentum:
    """SNSM (arXiv 2411.07120, algorithms 1 and 3), written for a left basis U, j a channel of the long side:

        v_j ← β₂v_j + (1-β₂) Σ_i G_ij²   (the sum, not the mean: rates are some ten times Adam's)
        M ← β₁M + (1-β₁) UᵀG, zeroed when the basis is renewed,  D = U M + (G - U UᵀG)
        update = D_j / (√v_j + ε) · √(1-β₂ᵗ)/(1-β₁ᵗ)

    The correction counts all steps and applies to D as a whole, as in the reference package. That package uses a momentum of the old
    basis once more at a refresh; here the new one starts at once. Requests besides a refresh: none tall, 2 wide.
    """

    projector: Projector
    rule: Adam = ADAM

    def states(self, shape: tuple[int, int]) -> Mapping[str, StateSpec]:
        side, rank = self.projector.side(shape), usable_rank(self.projector.rank, shape)
        return {
            **self.projector.states(shape),
            "exp_avg": coordinates_spec(shape, side, rank, "moment"),
            "exp_avg_sq": coordinates_spec(shape, side, 1, "variance"),
        }

    def step(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        columns = gradient_in.shape[1]
        side = self.projector.side((rows.total, columns))
        basis = yield from self.projector.basis(gradient_in, states, rows, step, key)
        if self.projector.refresh.due(step, key):
            states["exp_avg"].zero_()
        if side == "right":
            change, root = self._moments(gradient_in @ basis, gradient_in.square().sum(dim=1, keepdim=True), states)
            return (gradient_in + change @ basis.T).div_(root).mul_(self.rule.correction(step))
        partial = torch.cat((gradient_in.T @ basis, gradient_in.square().sum(dim=0)[:, None]), dim=1)
        summed = yield SumRows(partial)
        dealt = torch.cat(self._moments(summed[:, :-1], summed[:, -1:], states), dim=1)
        whole_n = yield GatherRows(dealt, columns)
        return (gradient_in + basis @ whole_n[:, :-1].T).div_(whole_n[:, -1]).mul_(self.rule.correction(step))

    def _moments(self, coordinates: Tensor, squares: Tensor, states: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What momentum changes in the coordinates [long, r], and the divisor [long, 1]."""
        beta1, beta2 = self.rule.betas
        momentum = states["exp_avg"].mul_(beta1).add_(coordinates, alpha=1 - beta1)
        square = states["exp_avg_sq"].mul_(beta2).add_(squares, alpha=1 - beta2)
        return momentum - coordinates, square.sqrt().add_(self.rule.eps)
