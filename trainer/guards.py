"""What is wrong with a step: a loss or gradient that is not finite, or one far above those before it. Imports no torch.

Everything here is a pure function of numbers that are the same on all ranks (sums over the mesh) and of a history that is saved with the
checkpoint, so ranks decide alike without asking one another, and a resumed run decides as an uninterrupted one would.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from trainer.config import GuardsSection

LEAST_DEVIATION = 0.01
"""Share of the mean that counts as one standard deviation at least: a loss that hardly moves has no spikes of a thousandth."""


@dataclass(frozen=True)
class Trouble:
    """One step that is not as it should be."""

    kind: Literal["not_finite", "spike"]
    text: str

    def action(self, settings: GuardsSection) -> Literal["report", "stop", "skip_step", "rollback"]:
        """What the settings want done about it."""
        return settings.on_not_finite if self.kind == "not_finite" else settings.on_spike


@dataclass
class History:
    """Loss and gradient norm of the last ``guards.spike_steps`` steps that were taken, oldest first."""

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)

    def add(self, loss: float, grad_norm: float, keep: int) -> None:
        """Remember a step; one whose loss is not a number (it had no token to predict) teaches nothing."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.loss = [*self.loss, loss][-keep:]
            self.grad_norm = [*self.grad_norm, grad_norm][-keep:]

    @staticmethod
    def from_json(value: Mapping[str, list[float]]) -> History:
        """What a checkpoint holds; empty for one that was written before there was a history."""
        return History(list(value.get("loss", [])), list(value.get("grad_norm", [])))


def trouble_of(loss: float, valid_tokens: int, grad_norm: float, history: History, settings: GuardsSection) -> Trouble | None:
    """What is wrong with a step of this mean loss (nats; nan without ``valid_tokens``) and global gradient norm, if anything."""
    if (valid_tokens and not math.isfinite(loss)) or not math.isfinite(grad_norm):
        return Trouble("not_finite", f"loss {loss}, gradient norm {grad_norm}")
    for name, value, before in (("loss", loss, history.loss), ("gradient norm", grad_norm, history.grad_norm)):
        if len(before) < max(2, settings.spike_steps // 4):
            continue
        mean = statistics.fmean(before)
        deviation = max(statistics.pstdev(before, mean), LEAST_DEVIATION * abs(mean))
        if deviation and value > mean + settings.spike_deviations * deviation:
            far = (value - mean) / deviation
            return Trouble(
                "spike", f"{name} {value:.4g} is {far:.1f} standard deviations above {mean:.4g}, the mean of the last {len(before)} steps"
            )
    return None
