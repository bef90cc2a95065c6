"""APOLLO and APOLLO-Mini: the whole gradient, scaled as Adam scales a random projection of it. Written from the paper's equations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from optim.composed import Composed, Point
from optim.coordinate_rules import AdamRule
from optim.lifts import ScaledGradient
from optim.projectors import GaussianProjector, Projector
from optim.rules import ADAM, GROWTH, Adam, NormGrowth


@dataclass(frozen=True)
class Apollo(Point):
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

    @cached_property
    def composed(self) -> Composed:
        return Composed(self.projector, AdamRule(self.rule), ScaledGradient(self.scaling, self.scale), self.growth)


def apollo_mini(scale: float = 128.0, rule: Adam = ADAM) -> Apollo:
    """APOLLO-Mini (section 4.3): rank 1, one factor for the whole matrix."""
    return Apollo(GaussianProjector(rank=1), "tensor", rule, scale)
