"""Rules that update every element from its own gradient and states alone: exact on any part of a tensor, without communication.

A rule reads and writes its states as float32 (float64 for such parameters); how they are stored between steps is the codec's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from optim.methods import StateSpec
from optim.rules import Adam


class Rule(Protocol):
    """Immutable; everything that changes is in the states."""

    def states(self, shape: tuple[int, ...]) -> Mapping[str, StateSpec]:
        """The states of a tensor of ``shape``, all zero at first."""
        ...

    def update(self, gradient: Tensor, states: dict[str, Tensor], step: int) -> Tensor:
        """What learning rate times is subtracted; ``states`` are written in place, ``gradient`` may be overwritten. ``step``: from 1."""
        ...


@dataclass(frozen=True)
class ElementwiseAdam:
    """Adam on every element (decoupled decay, arXiv 1711.05101, is the driver's)."""

    adam: Adam

    def states(self, shape: tuple[int, ...]) -> Mapping[str, StateSpec]:
        """First and second moment."""
        return {"exp_avg": StateSpec(shape, "rows", codec="moment"), "exp_avg_sq": StateSpec(shape, "rows", codec="variance")}

    def update(self, gradient: Tensor, states: dict[str, Tensor], step: int) -> Tensor:
        """The ratio of the moments, without their bias."""
        return self.adam.ratio(gradient, states, step, out=gradient).mul_(self.adam.correction(step))


@dataclass(frozen=True)
class Sgd:
    """Gradient descent, with heavy-ball momentum (u <- mu u + g) where ``momentum`` is above 0."""

    momentum: float = 0.0

    def states(self, shape: tuple[int, ...]) -> Mapping[str, StateSpec]:
        """The momentum, if any."""
        return {"momentum": StateSpec(shape, "rows", codec="moment")} if self.momentum else {}

    def update(self, gradient: Tensor, states: dict[str, Tensor], step: int) -> Tensor:
        """The gradient, or the momentum."""
        return states["momentum"].mul_(self.momentum).add_(gradient) if self.momentum else gradient


Storage = Literal["fp32", "bf16", "int8", "int8_dynamic", "int4"]
"""How states are kept between steps."""
