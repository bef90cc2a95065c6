"""What an optimizer holds, parameter by parameter: planned from shapes, and measured by storage, which must be the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optim.driver import ComposedOptimizer
from optim.placement import Placed, storage_bytes


@dataclass(frozen=True)
class PlannedParameter:
    """One parameter of an optimizer."""

    name: str
    shape: tuple[int, ...]
    algorithm: str
    """The rule or method with its settings."""
    storage: str
    """dtype of each state as it is kept."""
    placement: str
    """``whole``, or the rows of this rank."""
    planned_bytes: int
    """Of this rank's states, from shapes."""
    measured_bytes: int
    """Of this rank's states, by storage."""


def plan(optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str] | None = None) -> list[PlannedParameter]:
    """Every parameter of ``optimizer`` in the order of its groups. ``names``: of parameters whose optimizer does not know them."""
    rows = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            lane = optimizer.lanes[parameter] if isinstance(optimizer, ComposedOptimizer) else None
            states = optimizer.state[parameter]
            placed = Placed.of(parameter)
            measured = sum(storage_bytes(tensor) for tensor in states.values())
            if lane is not None:
                planned, algorithm = lane.planned_bytes(), repr(lane.rule)
            else:
                elements = torch.Size((placed.rows.count, *placed.shape[1:])).numel() if placed.shape else 1
                planned = (len(states) - 1) * elements * parameter.element_size() + 4
                algorithm = type(optimizer).__name__
            where = "whole" if placed.rows.ranks == 1 else f"{placed.rows.count} of {placed.rows.total} rows"
            storage = ", ".join(f"{name} {str(tensor.dtype).removeprefix('torch.')}" for name, tensor in states.items() if name != "step")
            name = lane.name if lane is not None else (names or {}).get(parameter, "")
            rows.append(PlannedParameter(name, placed.shape, algorithm, storage or "nothing", where, planned, measured))
    return rows


def table(rows: list[PlannedParameter]) -> str:
    """Aligned text, one line per parameter, and the total."""
    header = ("parameter", "shape", "bytes", "where", "states", "algorithm")
    lines = [(r.name, "x".join(map(str, r.shape)), f"{r.planned_bytes:,}", r.placement, r.storage, r.algorithm) for r in rows]
    lines.append(("total", "", f"{sum(r.planned_bytes for r in rows):,}", "", "", ""))
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(5)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[5]]).rstrip() for line in [header, *lines])
