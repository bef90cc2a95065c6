"""Methods that keep Adam's moments in a low-rank subspace of the gradient and lift the ratio back: GaLore, and Fira, which adds what
the subspace leaves out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from optim.composed import Composed, LinearPoint, Point
from optim.coordinate_rules import AdamRule
from optim.lifts import Back, ScaledResidual
from optim.projectors import Projector
from optim.rules import ADAM, GROWTH, Adam, NormGrowth


@dataclass(frozen=True)
class GaLore(LinearPoint):
    """GaLore (arXiv 2403.03507, algorithm 2), for a left basis U and coordinates R = Uᵀ G (right: R = G V):

        m ← β₁m + (1-β₁)R,  v ← β₂v + (1-β₂)R²,  N = m / (√v + ε) · √(1-β₂ᵗ)/(1-β₁ᵗ),  update = scale · U N  (N Vᵀ)

    Moments are kept as they are when the basis is renewed, as in the paper. Reference package: Adam's form and ε as in ``Adam``'s
    defaults, all bases renewed in the same step (``Refresh(stagger=False)``), decay after the update (the driver's).
    Requests besides a refresh: none for tall matrices, two for wide ones.
    """

    projector: Projector
    rule: Adam = ADAM
    scale: float = 0.25

    @cached_property
    def composed(self) -> Composed:
        return Composed(self.projector, AdamRule(self.rule), Back(self.scale))


@dataclass(frozen=True)
class Fira(Point):
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

    @cached_property
    def composed(self) -> Composed:
        inside = self.scale if self.scaled_residual else 1.0
        return Composed(self.projector, AdamRule(self.rule), ScaledResidual(self.scale, inside), self.growth)
