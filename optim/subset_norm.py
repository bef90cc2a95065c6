"""Subset-Norm with Subspace-Momentum: one second moment per channel, momentum in a subspace and none outside it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from optim.composed import Composed, Point
from optim.coordinate_rules import LinearRule
from optim.lifts import Residual
from optim.projectors import Projector
from optim.rules import ADAM, Adam


@dataclass(frozen=True)
class SubsetNormMomentum(Point):
    """SNSM (arXiv 2411.07120, algorithms 1 and 3), written for a left basis U, j a channel of the long side:

        v_j ← β₂v_j + (1-β₂) Σ_i G_ij²   (the sum, not the mean: rates are some ten times Adam's)
        M ← β₁M + (1-β₁) UᵀG, zeroed when the basis is renewed,  D = U M + (G - U UᵀG)
        update = D_j / (√v_j + ε) · √(1-β₂ᵗ)/(1-β₁ᵗ)

    The correction counts all steps and applies to D as a whole, as in the reference package. That package uses a momentum of the old
    basis once more at a refresh; here the new one starts at once. Requests besides a refresh: none tall, 2 wide.
    """

    projector: Projector
    rule: Adam = ADAM

    @cached_property
    def composed(self) -> Composed:
        return Composed(self.projector, LinearRule(self.rule), Residual())
