"""Natural GaLore: GaLore whose coordinates are first preconditioned by the inverse of their empirical Fisher matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from optim.low_rank import moment_specs
from optim.methods import Rows, StateSpec, Steps, Sum
from optim.projectors import Projector, coordinates_spec, lift, project, usable_rank
from optim.rules import ADAM, Adam


@dataclass(frozen=True)
class NaturalGaLore:
    """Natural GaLore (arXiv 2410.16029), on coordinates g = vec(R) and H = [g of the last ``history`` steps, this one included]:

        n = (λ1 + H Hᵀ)⁻¹ g = λ⁻¹g - λ⁻²H (1 + λ⁻¹HᵀH)⁻¹ Hᵀg,  then GaLore with n in the place of R

    g being a column e of H, that is H (λ1 + HᵀH)⁻¹ e: one small system, in float64, and no difference of large terms. One side is
    projected, as in the paper (its package projects both). The history, like the moments, is kept when the basis is renewed.
    Requests besides a refresh: 1 tall, 3 wide. States: GaLore's and ``history`` times its coordinates.
    """

    projector: Projector
    rule: Adam = ADAM
    scale: float = 0.25
    history: int = 20
    damping: float = 1e-3
    """λ"""

    def __post_init__(self) -> None:
        if self.history < 1 or self.damping <= 0:
            raise ValueError(f"history {self.history} must be at least 1 and damping {self.damping} positive")

    def states(self, shape: tuple[int, int]) -> Mapping[str, StateSpec]:
        side, rank = self.projector.side(shape), usable_rank(self.projector.rank, shape)
        past = coordinates_spec(shape, side, self.history * rank, "exact")
        return {**self.projector.states(shape), **moment_specs(shape, side, rank), "history": past}

    def step(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        columns = gradient_in.shape[1]
        side = self.projector.side((rows.total, columns))
        basis = yield from self.projector.basis(gradient_in, states, rows, step, key)
        coordinates = yield from project(gradient_in, basis, side)
        natural = yield from self._natural(coordinates, states["history"], (step - 1) % self.history)
        ratio = self.rule.ratio(natural, states, step).mul_(self.scale * self.rule.correction(step))
        return (yield from lift(ratio, basis, side, columns))

    def _natural(self, coordinates: Tensor, past: Tensor, slot: int) -> Steps:
        """n, dealt as ``coordinates`` [long, r] are, which take ``slot`` of ``past`` [long, history · r]."""
        rank = coordinates.shape[1]
        past[:, slot * rank : (slot + 1) * rank] = coordinates
        past_lsr = past.view(len(past), self.history, rank)
        flat_s = past_lsr.transpose(0, 1).reshape(self.history, -1).double()
        gram = yield Sum(flat_s @ flat_s.T)
        here = torch.zeros(self.history, dtype=gram.dtype, device=gram.device)
        here[slot] = 1
        weights = torch.linalg.solve(gram + self.damping * torch.eye(self.history, dtype=gram.dtype, device=gram.device), here)
        return (weights @ flat_s).reshape(coordinates.shape).float()
