"""FRUGAL: Adam on a part of the columns, scattered or one run of them, signs for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from optim.counter_random import gaussian_rows
from optim.methods import Rows, StateSpec, Steps
from optim.projectors import REFRESH, Refresh
from optim.rules import TORCH_ADAM, Adam


@dataclass(frozen=True)
class Frugal:
    """FRUGAL (arXiv 2411.07837, algorithm 1) with columns as the subspace:

        columns in J, a part ``density`` of them:  Adam;  the others:  inactive_scale · sign(G)

    J is another at each refresh, and Adam starts anew, moments and bias correction. ``choice="columns"``: J is random, a function of
    (key, epoch). ``"blocks"``: J is a run of columns, all of which have their turn, the last first (the paper's ``descending``; the last
    turn of a round takes some columns again where the runs do not come out even). The paper's blocks are whole layers, whose moments
    would wander from parameter to parameter; runs of columns keep every state at its parameter and of one size. No indices are stored.
    Columns of row-sharded matrices are local, so there are no requests at all.
    """

    density: float = 0.25
    refresh: Refresh = REFRESH
    rule: Adam = TORCH_ADAM
    inactive_scale: float = 1.0
    choice: Literal["columns", "blocks"] = "columns"

    @property
    def gap(self) -> int:
        """See ``Method``."""
        return self.refresh.gap

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1:
            raise ValueError(f"density {self.density} must lie in [0, 1]")

    def active(self, columns: int) -> int:
        """How many columns Adam updates."""
        return round(self.density * columns)

    def chosen(self, columns: int, step: int, key: int, device: torch.device) -> Tensor | slice:
        """Their indices, int64 [active], or the run of them."""
        if self.choice == "columns":
            return self.drawn(columns, step, key, device)
        active = max(1, self.active(columns))
        last = columns - active - self.refresh.epoch(step, key) % -(-columns // active) * active
        return slice(max(0, last), max(0, last) + self.active(columns))

    def drawn(self, columns: int, step: int, key: int, device: torch.device) -> Tensor:
        """Indices of random ones, int64 [active]."""
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
