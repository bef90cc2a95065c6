"""FRUGAL: Adam on a part of the columns, signs for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from optim.counter_random import gaussian_rows
from optim.methods import Rows, StateSpec, Steps
from optim.projectors import REFRESH, Refresh
from optim.rules import TORCH_ADAM, Adam


@dataclass(frozen=True)
class Frugal:
    """FRUGAL (arXiv 2411.07837, algorithm 1) with random columns as the subspace:

        columns in J, a random part ``density`` of them:  Adam;  the others:  inactive_scale · sign(G)

    J is drawn anew, and Adam starts anew, moments and bias correction, at each refresh. J is a function of (key, epoch): no indices are
    stored. Columns of row-sharded matrices are local, so there are no requests at all.
    """

    density: float = 0.25
    refresh: Refresh = REFRESH
    rule: Adam = TORCH_ADAM
    inactive_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1:
            raise ValueError(f"density {self.density} must lie in [0, 1]")

    def active(self, columns: int) -> int:
        """How many columns Adam updates."""
        return round(self.density * columns)

    def chosen(self, columns: int, step: int, key: int, device: torch.device) -> Tensor:
        """Their indices, int64 [active]."""
        order = gaussian_rows(key, self.refresh.epoch(step, key), 0, columns, 1, device)[:, 0]
        return order.argsort(stable=True)[: self.active(columns)]

    def states(self, shape: tuple[int, int]) -> Mapping[str, StateSpec]:
        active = (shape[0], self.active(shape[1]))
        return {"exp_avg": StateSpec(active, "rows", codec="moment"), "exp_avg_sq": StateSpec(active, "rows", codec="variance")}

    def step(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        since = self.refresh.since(step, key)
        if since == 1:
            for moment in states.values():
                moment.zero_()
        chosen = self.chosen(gradient_in.shape[1], step, key, gradient_in.device)
        ratio = self.rule.ratio(gradient_in[:, chosen], states, since)
        update = gradient_in.sign().mul_(self.inactive_scale)
        update[:, chosen] = ratio.mul_(self.rule.correction(since))
        return update
        yield  # pyright: ignore[reportUnreachable]  # a generator without requests
