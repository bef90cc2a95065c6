"""What is done with coordinates R [long side, r], whose rows are dealt to ranks: rules that return N, which a lift takes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from optim.methods import Method, Rows, StateSpec, Steps, Sum
from optim.rules import ADAM, Adam


class CoordinateRule(Protocol):
    """Immutable, as methods are."""

    def states(self, shape: tuple[int, int]) -> Mapping[str, StateSpec]:
        """Of coordinates of ``shape``; ``rows`` are those of the coordinates."""
        ...

    def ratio(self, coordinates: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        """N, dealt as the coordinates are, without the correction of its bias."""
        ...

    def correction(self, step: int) -> float:
        """Of the bias, for the whole update."""
        ...


def moment_specs(shape: tuple[int, int]) -> Mapping[str, StateSpec]:
    """Adam's two moments."""
    return {"exp_avg": StateSpec(shape, "rows", codec="moment"), "exp_avg_sq": StateSpec(shape, "rows", codec="variance")}


@dataclass(frozen=True)
class AdamRule:
    """Adam's ratio of moments (``rules.Adam``)."""

    adam: Adam = ADAM

    def states(self, shape: tuple[int, int]) -> Mapping[str, StateSpec]:
        return moment_specs(shape)

    def ratio(self, coordinates: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        return self.adam.ratio(coordinates, states, step)
        yield  # pyright: ignore[reportUnreachable]  # a generator without requests

    def correction(self, step: int) -> float:
        return self.adam.correction(step)


@dataclass(frozen=True)
class NaturalAdam:
    """Adam of coordinates preconditioned by the inverse of their empirical Fisher matrix (Natural GaLore, arXiv 2410.16029), with
    g = vec(R) and H = [g of the last ``history`` steps, this one included]:

        n = (λ1 + H Hᵀ)⁻¹ g = λ⁻¹g - λ⁻²H (1 + λ⁻¹HᵀH)⁻¹ Hᵀg

    g being a column e of H, that is H (λ1 + HᵀH)⁻¹ e: one small system, in float64, and no difference of large terms. Requests: 1.
    """

    adam: Adam = ADAM
    history: int = 20
    damping: float = 1e-3
    """λ"""

    def __post_init__(self) -> None:
        if self.history < 1 or self.damping <= 0:
            raise ValueError(f"history {self.history} must be at least 1 and damping {self.damping} positive")

    def states(self, shape: tuple[int, int]) -> Mapping[str, StateSpec]:
        return {**moment_specs(shape), "history": StateSpec((shape[0], self.history * shape[1]), "rows")}

    def ratio(self, coordinates: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        past, slot, rank = states["history"], (step - 1) % self.history, coordinates.shape[1]
        past[:, slot * rank : (slot + 1) * rank] = coordinates
        past_lsr = past.view(len(past), self.history, rank)
        flat_s = past_lsr.transpose(0, 1).reshape(self.history, -1).double()
        gram = yield Sum(flat_s @ flat_s.T)
        here = torch.zeros(self.history, dtype=gram.dtype, device=gram.device)
        here[slot] = 1
        weights = torch.linalg.solve(gram + self.damping * torch.eye(self.history, dtype=gram.dtype, device=gram.device), here)
        return self.adam.ratio((weights @ flat_s).reshape(coordinates.shape).float(), states, step)

    def correction(self, step: int) -> float:
        return self.adam.correction(step)


@dataclass(frozen=True)
class LinearRule:
    """Momentum M ← β₁M + (1-β₁)R, N = M; with ``divides`` Subset-Norm (arXiv 2411.07120, algorithm 1) of each channel j of the long side:

        v_j ← β₂v_j + (1-β₂) Σ_i R_ij²   (the sum, not the mean: rates are some ten times Adam's),  N_j = M_j / (√v_j + ε)

    Linear in R within a channel, so it may be added to a part of the gradient outside the subspace that is divided alike; then squares are
    of the whole gradient. Momentum alone is not corrected for its bias.
    """

    adam: Adam = ADAM
    divides: bool = True

    def states(self, shape: tuple[int, int]) -> Mapping[str, StateSpec]:
        momentum = {"exp_avg": StateSpec(shape, "rows", codec="moment")}
        return {**momentum, "exp_avg_sq": StateSpec((shape[0], 1), "rows", codec="variance")} if self.divides else momentum

    def moments(self, coordinates: Tensor, squares: Tensor | None, states: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """M [long, r], and by what each channel is divided [long, 1]; ``squares`` [long, 1]: what v takes up."""
        beta1, beta2 = self.adam.betas
        momentum = states["exp_avg"].mul_(beta1).add_(coordinates, alpha=1 - beta1)
        if squares is None:
            return momentum, None
        square = states["exp_avg_sq"].mul_(beta2).add_(squares, alpha=1 - beta2)
        return momentum, square.sqrt().add_(self.adam.eps)

    def ratio(self, coordinates: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        squares = coordinates.square().sum(dim=1, keepdim=True) if self.divides else None
        momentum, divisor = self.moments(coordinates, squares, states)
        return momentum.clone() if divisor is None else momentum / divisor
        yield  # pyright: ignore[reportUnreachable]  # a generator without requests

    def correction(self, step: int) -> float:
        return self.adam.correction(step) if self.divides else 1.0


@dataclass(frozen=True)
class MethodRule:
    """A method for matrices (Muon, Adafactor) on the coordinates."""

    method: Method

    def states(self, shape: tuple[int, int]) -> Mapping[str, StateSpec]:
        return self.method.states(shape)

    def ratio(self, coordinates: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        return self.method.step(coordinates, states, rows, step, key)

    def correction(self, step: int) -> float:
        return 1.0
