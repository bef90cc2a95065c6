"""From coordinates back to the matrix: what is made of a rule's N in the subspace and of the gradient outside it.

Legend: G this rank's rows of the gradient [i, n], R its coordinates and N what the rule made of them, dealt [long, r]; up(N) is N in the
whole space, U N or N Vᵀ.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from optim.methods import GatherRows, Request, Rows, Steps, Sum, SumRows
from optim.projectors import Side
from optim.rules import TINY, Guard, channel_scale
from optim.updates import Product, Scaled, Update, channel_squares, formed


@dataclass(frozen=True)
class Space:
    """The subspace of one step. ``basis``: V [n, r] or this rank's rows of U [i, r] (``projectors.py``), indices of columns int64 [r], or
    None: everything."""

    basis: Tensor | None
    side: Side
    columns: int

    @property
    def is_columns(self) -> bool:
        """Unit vectors, by their indices."""
        return self.basis is not None and self.basis.dtype == torch.int64

    def long_rows(self, rows: Rows) -> Rows:
        """Which rows of the coordinates this rank has."""
        return rows if self.side == "right" else Rows.chunk(self.columns, rows.rank, rows.ranks)

    def down(self, gradient_in: Tensor, squares: bool = False) -> Generator[Request, Tensor, tuple[Tensor, Tensor | None]]:
        """R and, with ``squares``, the sum of G's squares in each channel [long, 1], dealt alike and in the same message."""
        if self.side == "right":
            own = gradient_in.square().sum(dim=1, keepdim=True) if squares else None
            if self.basis is None:
                return gradient_in, own
            return (gradient_in[:, self.basis] if self.is_columns else gradient_in @ self.basis), own
        assert self.basis is not None
        partial = gradient_in.T @ self.basis
        if not squares:
            return (yield SumRows(partial)), None
        summed = yield SumRows(torch.cat((partial, gradient_in.square().sum(dim=0)[:, None]), dim=1))
        return summed[:, :-1], summed[:, -1:]

    def spread(self, dealt: Tensor) -> Steps:
        """What ``up`` and ``along`` take: all channels where the long side are the columns, else this rank's."""
        return dealt if self.side == "right" else (yield GatherRows(dealt, self.columns))

    def up(self, spread: Tensor) -> Tensor:
        """[i, n]"""
        return formed(self.lifted(spread))

    def lifted(self, spread: Tensor) -> Update:
        """``up``, not multiplied out."""
        if self.basis is None:
            return spread
        if self.is_columns:
            return spread.new_zeros(len(spread), self.columns).index_copy_(1, self.basis, spread)
        return Product(spread, self.basis.T) if self.side == "right" else Product(self.basis, spread.T)

    def along(self, spread: Tensor) -> Tensor:
        """A number for each channel [long], to multiply a matrix [i, n]."""
        return spread[:, None] if self.side == "right" else spread[None, :]


@dataclass(frozen=True)
class Limit:
    """A guard at one step of one matrix."""

    guard: Guard | None
    states: dict[str, Tensor]
    correction: float
    """Of the rule's bias, with which every update ends."""
    elements: int
    """Of the whole matrix."""

    def factor(self, norm: Tensor) -> Tensor:
        """For something of this norm, before the correction."""
        return torch.ones_like(norm) if self.guard is None else self.guard.factor(norm, self.states, self.correction, self.elements)

    def limited(self, part: Tensor) -> Steps:
        """``part`` in place; one request, or none without a guard."""
        if self.guard is None:
            return part
        squares = yield Sum(part.square().sum().reshape(1))
        return part.mul_(self.factor(squares.sqrt()))


class Lift(Protocol):
    """Immutable."""

    def update(self, space: Space, gradient_in: Tensor, coordinates: Tensor, ratio: Tensor, limit: Limit) -> Steps:
        """The ``Update`` [i, n], limited and corrected; ``ratio`` may be overwritten."""
        ...


@dataclass(frozen=True)
class Back:
    """update = scale · up(N): nothing outside the subspace moves (GaLore)."""

    scale: float = 1.0

    def update(self, space: Space, gradient_in: Tensor, coordinates: Tensor, ratio: Tensor, limit: Limit) -> Steps:
        if limit.guard is None:
            return space.lifted((yield from space.spread(ratio.mul_(self.scale * limit.correction))))
        whole = space.up((yield from space.spread(ratio.mul_(self.scale))))
        return (yield from limit.limited(whole)).mul_(limit.correction)


@dataclass(frozen=True)
class ScaledGradient:
    """update = √scale · s · G: the gradient itself, made longer or shorter as the rule did its coordinates (APOLLO, arXiv 2412.05270):

    channel: s_j = ‖N_j‖ / ‖R_j‖ for each channel j of the long side (section 4.1);  tensor: s = ‖N‖ / ‖R‖ (section 4.3)
    """

    by: Literal["channel", "tensor"] = "channel"
    scale: float = 1.0

    def update(self, space: Space, gradient_in: Tensor, coordinates: Tensor, ratio: Tensor, limit: Limit) -> Steps:
        if self.by == "tensor":
            squares = yield Sum(torch.stack([channel_squares(part, dim=-1).sum() for part in (ratio, coordinates, gradient_in)]))
            of_ratio, of_coordinates, of_gradient = squares.sqrt().unbind()
            scale = self.scale**0.5 * of_ratio / (of_coordinates + TINY)
            return Scaled(gradient_in, scale * limit.factor(scale * of_gradient) * limit.correction)
        scale = channel_scale(ratio, coordinates).mul_(self.scale**0.5)
        scale = yield from space.spread(scale)
        if limit.guard is not None:
            # Of the scaled gradient's own norm: channel by channel, so that it need not be made.
            own = channel_squares(gradient_in, dim=1 if space.side == "right" else 0)
            squares = yield Sum((scale.square() * own).sum().reshape(1))
            scale = scale * limit.factor(squares.sqrt())
        return Scaled(gradient_in, space.along(scale * limit.correction))


@dataclass(frozen=True)
class ScaledResidual:
    """update = scale · up(N) + S: outside the subspace as the rule scaled inside, channel by channel (Fira, arXiv 2410.01623):

    φⱼ = ‖N_j‖ / ‖R_j‖,  S = φ ⊙ (G - inside · up(R)),  and it is S that a guard limits
    """

    scale: float = 0.25
    inside: float = 1.0

    def update(self, space: Space, gradient_in: Tensor, coordinates: Tensor, ratio: Tensor, limit: Limit) -> Steps:
        both = yield from space.spread(torch.cat((ratio, coordinates), dim=1))
        ratio, coordinates = both.chunk(2, dim=1)
        residual = gradient_in - self.inside * space.up(coordinates)
        residual *= space.along(channel_scale(ratio, coordinates))
        update = space.up(ratio).mul_(self.scale)
        return update.add_((yield from limit.limited(residual))).mul_(limit.correction)


@dataclass(frozen=True)
class SignResidual:
    """update = up(N) · correction + scale · sign(G - up(R)): outside the subspace signs (FRUGAL, arXiv 2411.07837)."""

    scale: float = 1.0

    def update(self, space: Space, gradient_in: Tensor, coordinates: Tensor, ratio: Tensor, limit: Limit) -> Steps:
        both = yield from space.spread(torch.cat((ratio.mul_(limit.correction), coordinates), dim=1))
        ratio, coordinates = both.chunk(2, dim=1)
        update = (gradient_in - space.up(coordinates)).sign_().mul_(self.scale).add_(space.up(ratio))
        return (yield from Limit(limit.guard, limit.states, 1.0, limit.elements).limited(update))


@dataclass(frozen=True)
class Residual:
    """update = D / d, D = up(M) + (G - up(R)): outside the subspace the gradient as it is, all divided by the rule's divisor d of each
    channel, if it has one (SNSM, arXiv 2411.07120, algorithm 3). For rules that are linear within a channel."""

    def added(self, space: Space, gradient_in: Tensor, change: Tensor, divisor: Tensor | None, limit: Limit) -> Steps:
        """``change``: M - R dealt [long, r]; ``divisor``: d dealt [long, 1]."""
        if divisor is None:
            update = gradient_in + space.up((yield from space.spread(change)))
        else:
            whole = yield from space.spread(torch.cat((change, divisor), dim=1))
            update = (gradient_in + space.up(whole[:, :-1])).div_(space.along(whole[:, -1]))
        return (yield from limit.limited(update)).mul_(limit.correction)
