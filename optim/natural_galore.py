"""Natural GaLore: GaLore whose coordinates are first preconditioned by the inverse of their empirical Fisher matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from optim.composed import Composed, LinearPoint
from optim.coordinate_rules import NaturalAdam
from optim.lifts import Back
from optim.projectors import Projector
from optim.rules import ADAM, Adam


@dataclass(frozen=True)
class NaturalGaLore(LinearPoint):
    """Natural GaLore (arXiv 2410.16029): GaLore with the natural gradient of ``history`` steps (``NaturalAdam``) in the place of R.

    One side is projected, as in the paper (its package projects both). The history, like the moments, is kept when the basis is renewed.
    Requests besides a refresh: 1 tall, 3 wide. States: GaLore's and ``history`` times its coordinates.
    """

    projector: Projector
    rule: Adam = ADAM
    scale: float = 0.25
    history: int = 20
    damping: float = 1e-3
    """λ"""

    def __post_init__(self) -> None:
        NaturalAdam(self.rule, self.history, self.damping)  # refuses what cannot be

    @cached_property
    def composed(self) -> Composed:
        return Composed(self.projector, NaturalAdam(self.rule, self.history, self.damping), Back(self.scale))
