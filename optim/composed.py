"""A method for matrices put together from four parts, each a file: where it works (a projector), what it does there (a rule), what becomes
of the rest of the gradient (a lift), and how far it may go (a guard). ``composition.py`` says which go together; GaLore, Fira, APOLLO and
others are points of this grid.

Coordinates are a matrix [long side, r] whose rows are dealt to the ranks, whichever side is projected; without a projector they are the
gradient. So a rule is what a method is: it sees a matrix dealt by rows.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from optim.coordinate_rules import CoordinateRule, LinearRule
from optim.frugal import Frugal
from optim.lifts import Lift, Limit, Residual, Space
from optim.methods import Request, Rows, StateSpec, Steps
from optim.projectors import REFRESH, Projector, Refresh, Side, usable_rank
from optim.rules import Guard


@dataclass(frozen=True)
class Columns:
    """The subspace of some columns of a matrix, drawn anew at each refresh as FRUGAL draws them; its basis are their indices."""

    density: float = 0.25
    refresh: Refresh = REFRESH

    def chosen(self, columns: int, step: int, key: int, device: torch.device) -> Tensor:
        """Indices, int64 [r]."""
        return Frugal(self.density, self.refresh).drawn(columns, step, key, device)

    def width(self, columns: int) -> int:
        """r"""
        return Frugal(self.density, self.refresh).active(columns)


@dataclass(frozen=True)
class Composed:
    """R = the gradient in the projector's subspace, N = rule(R), update = guard(lift(G, R, N)) · correction of the rule's bias.

    At a refresh moments stay as they are, as in GaLore. Two exceptions: of columns, nothing of others is of use, so the rule starts
    anew; and with ``Residual`` momentum is zeroed, as in SNSM. ``projector`` None: the whole matrix, by its rows.
    """

    projector: Projector | Columns | None
    rule: CoordinateRule
    lift: Lift | Residual
    guard: Guard | None = None

    @property
    def gap(self) -> int:
        """See ``Method``."""
        return 1 if self.projector is None else self.projector.refresh.gap

    def states(self, shape: tuple[int, int]) -> Mapping[str, StateSpec]:
        side = self.side(shape)
        coordinates = (shape[0] if side == "right" else shape[1], self.width(shape))
        of_rule = {name: _lying(spec, side) for name, spec in self.rule.states(coordinates).items()}
        of_projector = {} if self.projector is None or isinstance(self.projector, Columns) else self.projector.states(shape)
        return {**of_projector, **of_rule, **({} if self.guard is None else self.guard.states())}

    def step(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        space = yield from self.space(gradient_in, states, rows, step, key)
        if isinstance(self.lift, Residual):
            limit = self._limit(states, rows.total * gradient_in.shape[1], step)
            return (yield from self._with_residual(gradient_in, states, space, limit, step, key))
        coordinates, _ = yield from space.down(gradient_in)
        return (yield from self.from_coordinates(space, gradient_in, coordinates, states, rows, step, key))

    def space(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Generator[Request, Tensor, Space]:
        """The subspace of this step, renewed if due."""
        columns = gradient_in.shape[1]
        if isinstance(self.projector, Columns):
            return Space(self.projector.chosen(columns, step, key, gradient_in.device), "right", columns)
        basis = None if self.projector is None else (yield from self.projector.basis(gradient_in, states, rows, step, key))
        return Space(basis, self.side((rows.total, columns)), columns)

    def from_coordinates(
        self, space: Space, gradient_in: Tensor, coordinates: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int
    ) -> Steps:
        """The rest of a step. ``gradient_in``: its elements are read by lifts other than ``Back`` only."""
        assert not isinstance(self.lift, Residual)
        since = self._restarted(states, step, key)
        ratio = yield from self.rule.ratio(coordinates, states, space.long_rows(rows), since, key)
        limit = self._limit(states, rows.total * space.columns, since)
        return (yield from self.lift.update(space, gradient_in, coordinates, ratio, limit))

    def _limit(self, states: dict[str, Tensor], elements: int, step: int) -> Limit:
        return Limit(self.guard, states, self.rule.correction(step), elements)

    def _with_residual(self, gradient_in: Tensor, states: dict[str, Tensor], space: Space, limit: Limit, step: int, key: int) -> Steps:
        assert isinstance(self.rule, LinearRule) and isinstance(self.lift, Residual) and self.projector is not None
        coordinates, squares = yield from space.down(gradient_in, self.rule.divides)
        if self.projector.refresh.due(step, key):
            states["exp_avg"].zero_()
        momentum, divisor = self.rule.moments(coordinates, squares, states)
        return (yield from self.lift.added(space, gradient_in, momentum - coordinates, divisor, limit))

    def _restarted(self, states: dict[str, Tensor], step: int, key: int) -> int:
        """The rule's own step: that of training, or since other columns were drawn."""
        if not isinstance(self.projector, Columns):
            return step
        since = self.projector.refresh.since(step, key)
        if since == 1:
            for name in self.rule.states((1, 1)):
                states[name].zero_()
        return since

    def side(self, shape: tuple[int, int]) -> Side:
        """See ``projectors.py``."""
        return "right" if self.projector is None or isinstance(self.projector, Columns) else self.projector.side(shape)

    def width(self, shape: tuple[int, int]) -> int:
        """Columns of the coordinates."""
        if self.projector is None:
            return shape[1]
        return self.projector.width(shape[1]) if isinstance(self.projector, Columns) else usable_rank(self.projector.rank, shape)


def _lying(spec: StateSpec, side: Side) -> StateSpec:
    """Of a state whose rows are those of the coordinates: of a left subspace they are the matrix's columns, dealt by chunks."""
    return replace(spec, placement="chunk") if side == "left" and spec.placement == "rows" else spec


class Point:
    """A method that is a point of the grid under its own name and with its own settings."""

    @cached_property
    def composed(self) -> Composed:
        raise NotImplementedError

    @property
    def gap(self) -> int:
        """See ``Method``."""
        return self.composed.gap

    def states(self, shape: tuple[int, int]) -> Mapping[str, StateSpec]:
        return self.composed.states(shape)

    def step(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        return self.composed.step(gradient_in, states, rows, step, key)


class LinearPoint(Point):
    """A point whose lift is ``Back``: it reads the gradient only through coordinates, which are linear in it while the basis stays. So
    gradients of several micro-batches can be summed there, in [long side, r] instead of [m, n]."""

    def renews(self, step: int, key: int) -> bool:
        """Whether step ``step`` may find a new basis, for which it needs the whole gradient."""
        assert self.composed.projector is not None
        return self.composed.projector.refresh.due(step, key)

    def coordinates(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        """This rank's part of the coordinates, a tensor of its own; writes no state. Only for a step that does not renew."""
        space = yield from self.composed.space(gradient_in, states, rows, step, key)
        return (yield from space.down(gradient_in))[0]

    def lifted(self, coordinates: Tensor, states: dict[str, Tensor], rows: Rows, columns: int, step: int, key: int) -> Steps:
        """``step`` from summed coordinates instead of the gradient. Only for a step that does not renew."""
        shaped_in = coordinates.new_empty((1, 1)).expand(rows.count, columns)  # of the gradient a stored basis needs the shape alone
        space = yield from self.composed.space(shaped_in, states, rows, step, key)
        return (yield from self.composed.from_coordinates(space, shaped_in, coordinates, states, rows, step, key))
