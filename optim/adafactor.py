"""Adafactor: the second moment of a matrix from one number per row and one per column; and AdaLomo's rule, which is a case of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from optim.methods import GatherRows, Rows, StateSpec, Steps, Sum, SumRows, Weight


@dataclass(frozen=True)
class Adafactor:
    """Adafactor (arXiv 1804.04235, algorithm 4 and sections 5 to 8), with β₂ₜ = 1 - t^decay and a mean over rows or columns:

        R ← β₂ₜ R + (1-β₂ₜ) mean_n(G² + ε₁),  C ← β₂ₜ C + (1-β₂ₜ) mean_m(G² + ε₁),  V = R Cᵀ / mean(R)
        U = G / √V,  U / max(1, RMS(U) / clip),  with beta1 a moving average of U,
        update = U · max(ε₂, RMS(weight)) if scale_parameter · min(1e-2, 1/√t) if relative_step (for a learning rate of 1)

    mean(R) is taken as mean(C): both are the same average of all squares. Requests: 3, and the weight with ``scale_parameter``.
    torch.optim.Adafactor differs: it adds no ε₁, and its step min(lr, 1/√t) · max(ε₂, RMS(weight)) is always on.
    """

    decay: float = -0.8
    eps: tuple[float, float] = (1e-30, 1e-3)
    clip: float | None = 1.0
    beta1: float | None = None
    scale_parameter: bool = False
    relative_step: bool = False

    def states(self, shape: tuple[int, int]) -> Mapping[str, StateSpec]:
        momentum = {} if self.beta1 is None else {"exp_avg": StateSpec(shape, "rows", codec="moment")}
        return {"row": StateSpec((shape[0],), "rows"), "column": StateSpec((shape[1],), "chunk"), **momentum}

    def step(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        update = yield from self._normalised(gradient_in, states, rows, step)
        weight = (yield Weight()) if self.scale_parameter else None
        measured = [part.float().square().sum() for part in (update, weight) if part is not None]
        mean_squares = (yield Sum(torch.stack(measured))) / (rows.total * gradient_in.shape[1])
        if self.clip is not None:
            update /= (mean_squares[0].sqrt() / self.clip).clamp(min=1)
        if self.beta1 is not None:
            update = states["exp_avg"].mul_(self.beta1).add_(update, alpha=1 - self.beta1).clone()
        if self.scale_parameter:
            update *= mean_squares[1].sqrt().clamp(min=self.eps[1])
        return update.mul_(min(1e-2, step**-0.5)) if self.relative_step else update

    def _normalised(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int) -> Steps:
        keep = 1 - step**self.decay
        squares = gradient_in.square().add_(self.eps[0])
        row_i = states["row"].mul_(keep).add_(squares.mean(dim=1), alpha=1 - keep)
        column_sums = yield SumRows(squares.sum(dim=0))
        column = states["column"].mul_(keep).add_(column_sums, alpha=(1 - keep) / rows.total)
        column_n = yield GatherRows(column, gradient_in.shape[1])
        return gradient_in * (row_i / column_n.mean()).rsqrt_()[:, None] * column_n.rsqrt()[None, :]


def adalomo() -> Adafactor:
    """AdaLomo's rule (arXiv 2310.10195, algorithm 1 and section 3.2): Adafactor without momentum, clipped to RMS 1 and relative to the
    weight's RMS. That the gradient is consumed in the backward pass is the driver's."""
    return Adafactor(scale_parameter=True)
