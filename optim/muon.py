"""Muon: momentum, made orthogonal by Newton-Schulz iterations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from optim.methods import Dealt, Job, OnOwner, Rows, StateSpec, Steps

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of X ← aX + b(XXᵀ)X + c(XXᵀ)²X: chosen by Muon's author for steep growth at 0; the result's singular values lie near 1."""


@dataclass(frozen=True)
class Muon:
    """Muon (Jordan et al. 2024; arXiv 2502.16982, section 2.1), B the momentum:

        B ← βB + (1-β)G,  M = (1-β)G + βB if nesterov else B,  update = factor · NewtonSchulz(M / ‖M‖)

    ``adjust="original"``: factor = √max(1, m/n); ``"match_rms_adamw"``: 0.2 √max(m, n) (arXiv 2502.16982, section 2.2).
    The momentum goes to the matrix's owner, is orthogonalised there and comes back: one request. ``precision`` None: bfloat16 on
    accelerators, float32 on CPU, where bfloat16 is slower.
    """

    momentum: float = 0.95
    nesterov: bool = True
    iterations: int = 5
    adjust: Literal["original", "match_rms_adamw"] = "original"
    precision: torch.dtype | None = None

    def states(self, shape: tuple[int, int]) -> Mapping[str, StateSpec]:
        return {"momentum": StateSpec(shape, "rows", codec="moment")}

    def step(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        average = states["momentum"].lerp_(gradient_in, 1 - self.momentum)
        direction = gradient_in.lerp(average, self.momentum) if self.nesterov else average
        lie = Dealt(rows.counts(), (gradient_in.shape[1],))
        work = Orthogonal(self.iterations, self.precision or (torch.float32 if gradient_in.device.type == "cpu" else torch.bfloat16))
        smaller, larger = sorted(lie.shape)
        job = Job(work, (direction,), (lie,), (lie,), cost=float(smaller * smaller * (2 * larger + smaller)))
        ((orthogonal,),) = yield OnOwner((job,))
        return orthogonal * self._factor(*lie.shape)

    def _factor(self, m: int, n: int) -> float:
        return max(1.0, m / n) ** 0.5 if self.adjust == "original" else 0.2 * max(m, n) ** 0.5


@dataclass(frozen=True)
class Orthogonal:
    """The owner's work on matrices [batch, m, n]."""

    iterations: int
    precision: torch.dtype

    def __call__(self, matrix_Bmn: Tensor) -> Sequence[Tensor]:
        return (newton_schulz(matrix_Bmn.to(self.precision), self.iterations).float(),)


def newton_schulz(matrix_Bmn: Tensor, iterations: int) -> Tensor:
    """Nearly the orthogonal factor of each matrix [B, m, n], in its dtype; products are taken on the smaller side."""
    a, b, c = COEFFICIENTS
    tall = matrix_Bmn.shape[-2] > matrix_Bmn.shape[-1]
    x = matrix_Bmn.mT if tall else matrix_Bmn
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
