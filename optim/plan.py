"""What an optimizer holds, parameter by parameter: planned from shapes, and measured by storage, which must be the same; and what its step
asks of other ranks (``plan_collectives.py``).

``planned`` needs no memory: a model on the meta device, and how many ranks share each parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn as nn

from models.tables import Columns
from optim.build import lanes_of, parameter_groups
from optim.composed import Composed, Point
from optim.config import OptimConfig
from optim.driver import ComposedOptimizer
from optim.frugal import Frugal
from optim.fused import BITS
from optim.fused_low_rank import known
from optim.lane import Lane
from optim.methods import Rows
from optim.placement import Placed, storage_bytes
from optim.plan_collectives import requests_of
from optim.routing import route
from optim.writers import weights_of


@dataclass(frozen=True)
class PlannedParameter:
    """One parameter of an optimizer."""

    name: str
    shape: tuple[int, ...]
    algorithm: str
    """The rule or method with its settings."""
    kind: str
    """The name of the rule or method alone."""
    side: str
    """Of the projection: ``right``, ``left``; empty without one."""
    rank: int | None
    """Of the projection (of columns: how many); None without one."""
    storage: str
    """dtype of each state as it is kept."""
    weights: str
    """dtype of the parameter, and how it is rounded where it is."""
    placement: str
    """``whole``, or the rows of this rank."""
    requests: tuple[str, ...]
    """Of other ranks in a step that renews no basis, in order; all matrices' are answered together."""
    fallbacks: tuple[str, ...]
    """Where this parameter does not get what was asked for, and why."""
    planned_bytes: int
    """Of this rank's states, from shapes."""
    measured_bytes: int | None
    """Of this rank's states, by storage; None of one that is only planned."""
    kernel: str = "torch"
    """What runs updates by Adam and low-rank methods: ``C++``, ``triton``, ``eager`` and why, ``by device`` on the meta device."""


def plan(
    optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str] | None = None, *, strict: bool = False
) -> list[PlannedParameter]:
    """Every parameter of ``optimizer`` in the order of its groups. ``names``: of parameters whose optimizer does not know them.

    ``strict``: raises ValueError where a parameter does not get what was asked for, naming it and the reason.
    """
    rows = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            states = optimizer.state[parameter]
            measured = sum(storage_bytes(tensor) for tensor in states.values())
            if isinstance(optimizer, ComposedOptimizer):
                rows.append(_of_lane(optimizer.lanes[parameter], measured))
            else:
                rows.append(_of_torch(type(optimizer).__name__, (names or {}).get(parameter, ""), parameter, len(states) - 1, measured))
    return _strict(rows) if strict else rows


def planned(model: nn.Module, config: OptimConfig, shards: int = 1, rank: int = 0, *, strict: bool = False) -> list[PlannedParameter]:
    """Every trainable parameter of ``model``, whose tensors are plain and may be on the meta device, as ``rank`` of ``shards`` ranks that
    share each (rank 0 has the most). Raises ValueError as ``build_optimizer`` does, and ``plan`` with ``strict``."""
    routed, lanes = route(model), lanes_of(model, config)
    parameter_groups(model, routed, config)  # refuses what the optimizer would
    if lanes is None:
        moments = 2
        found = [_of_torch("AdamW", one.name, one.parameter, moments, None, shards, rank) for one in routed]
    else:
        tp = max((part.ranks for part in getattr(model, "parts", {}).values()), default=1)
        for lane in lanes:
            lane.lie_as(_shared(lane, rank, shards, tp))
        found = [_of_lane(lane, None) for lane in lanes]
    return _strict(found) if strict else found


def _strict(rows: list[PlannedParameter]) -> list[PlannedParameter]:
    reasons = [f"{row.name}: {reason}" for row in rows for reason in row.fallbacks]
    if reasons:
        raise ValueError("not everything is as asked for: " + "; ".join(reasons))
    return rows


def _of_lane(lane: Lane, measured: int | None) -> PlannedParameter:
    stored = ", ".join(f"{name} {str(spec.dtype).removeprefix('torch.')}" for name, spec in lane.stored().items())
    side, rank = _projection(lane)
    return PlannedParameter(
        lane.name,
        lane.placed.shape,
        repr(lane.rule),
        type(lane.rule).__name__,
        side,
        rank,
        stored or "nothing",
        weights_of(lane.writer) or str(lane.parameter.dtype).removeprefix("torch."),
        _where(lane.placed),
        requests_of(lane.rule, lane.placed.shape) if lane.placed.rows.ranks > 1 else (),
        _fallbacks(lane, rank),
        lane.planned_bytes(),
        measured,
        f"eager: {lane.eager_because}" if lane.path == "eager" and _has_kernels(lane) else lane.path,
    )


def _has_kernels(lane: Lane) -> bool:
    """Somewhere, so that it is of interest why there is none here."""
    return bool(BITS.keys() & {codec.name for codec in lane.codecs.values()}) or known(lane.rule) is not None


def _of_torch(
    kind: str, name: str, parameter: nn.Parameter, states: int, measured: int | None, shards: int = 1, rank: int = 0
) -> PlannedParameter:
    placed = Placed.of(parameter)
    if shards > 1:
        placed = Placed(placed.shape, Rows.chunk(placed.rows.total, rank, shards))
    elements = torch.Size((placed.rows.count, *placed.shape[1:])).numel() if placed.shape else 1
    size = states * elements * parameter.element_size() + 4
    dtype = str(parameter.dtype).removeprefix("torch.")
    return PlannedParameter(
        name, placed.shape, kind, kind, "", None, f"exp_avg {dtype}, exp_avg_sq {dtype}", dtype, _where(placed), (), (), size, measured
    )


def _shared(lane: Lane, rank: int, shards: int, tp: int) -> Placed:
    """As one of ``shards`` ranks has it: some rows, or of a table that they share by columns some of those. Tensor-parallel ranks share the
    rows of a matrix that is updated whole, and the columns of a table, with them; this one is the first of ``tp``."""
    placed = lane.placed
    if lane.redealt is not None and lane.part is not None:
        return replace(lane.redealt, shards=shards).placed(lane.part, rank * lane.part.ranks + lane.part.rank)
    if placed.columns is None:
        return Placed(placed.shape, Rows.chunk(placed.rows.total, rank, shards))
    chunk = Rows.chunk(placed.columns.total, rank * tp, shards * tp)  # torch deals out every dim alike
    columns = Columns(placed.columns.total, chunk.first, chunk.count)
    return Placed((placed.shape[0], chunk.count), placed.rows, columns=columns)


def _where(placed: Placed) -> str:
    if placed.columns is not None and placed.columns.count < placed.columns.total:
        return f"{placed.columns.count} of {placed.columns.total} columns"
    return "whole" if placed.rows.ranks == 1 else f"{placed.rows.count} of {placed.rows.total} rows"


def _projection(lane: Lane) -> tuple[str, int | None]:
    rule, shape = lane.rule, lane.placed.shape
    composed = rule.composed if isinstance(rule, Point) else rule
    if isinstance(composed, Composed) and composed.projector is not None:
        return composed.side((shape[0], shape[1])), composed.width((shape[0], shape[1]))
    return ("right", rule.active(shape[1])) if isinstance(rule, Frugal) else ("", None)


def _fallbacks(lane: Lane, rank: int | None) -> tuple[str, ...]:
    found = []
    exact = [name for name, spec in lane.specs.items() if spec.codec != "exact" and name not in lane.codecs]
    if exact and lane.storage != "fp32":
        why = "too small for few bits" if lane.dtype == torch.float32 else f"computed in {lane.dtype}"
        found.append(f"{', '.join(exact)} not {lane.storage}: {why}")
    if lane.asked is not None:
        found.append(f"{lane.storage} not {lane.asked}: ranks share it by columns, and blocks lie along rows")
    rule = lane.rule.composed if isinstance(lane.rule, Point) else lane.rule
    asked = getattr(rule.projector, "rank", None) if isinstance(rule, Composed) else None
    if asked is not None and rank is not None and rank < asked:
        found.append(f"rank {rank} not {asked}: the matrix has no more")
    return tuple(found)


def table(rows: Sequence[PlannedParameter]) -> str:
    """Aligned text, one line per parameter, and the total."""
    header = ("parameter", "shape", "weights", "bytes", "where", "side", "rank", "requests", "states", "kernel", "algorithm")
    header = (*header, "not as asked")
    lines = [
        (
            r.name,
            "x".join(map(str, r.shape)),
            r.weights,
            f"{r.planned_bytes:,}",
            r.placement,
            r.side,
            "" if r.rank is None else str(r.rank),
            " ".join(r.requests),
            r.storage,
            r.kernel,
            r.algorithm,
            "; ".join(r.fallbacks),
        )
        for r in rows
    ]
    total = f"{sum(r.planned_bytes for r in rows):,}"
    return aligned([header, *lines, ("total", "", "", total, *[""] * 8)])


def table_by_kind(rows: Sequence[PlannedParameter]) -> str:
    """Aligned text, one line for parameters that are updated and kept alike, and the total."""
    kinds: dict[tuple[str, ...], list[PlannedParameter]] = {}
    for row in rows:
        rank = "" if row.rank is None else str(row.rank)
        fallback = ", ".join(sorted({reason.rpartition(": ")[2] for reason in row.fallbacks}))
        kinds.setdefault((row.kind, row.side, rank, " ".join(row.requests), row.weights, row.storage, row.kernel, fallback), []).append(row)
    header = ("update", "side", "rank", "tensors", "elements", "bytes", "requests", "weights", "states", "kernel", "not as asked")
    lines = [
        (
            kind,
            side,
            rank,
            str(len(some)),
            f"{sum(map(_elements, some)):,}",
            f"{sum(r.planned_bytes for r in some):,}",
            asks,
            weights,
            kept,
            kernel,
            fallback,
        )
        for (kind, side, rank, asks, weights, kept, kernel, fallback), some in kinds.items()
    ]
    total = ("total", "", "", str(len(rows)), f"{sum(map(_elements, rows)):,}", f"{sum(r.planned_bytes for r in rows):,}", *[""] * 5)
    return aligned([header, *lines, total])


def _elements(row: PlannedParameter) -> int:
    return torch.Size(row.shape).numel()


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; empty ones are left out."""
    columns = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    widths = {i: max(len(line[i]) for line in lines) for i in columns}
    return "\n".join("  ".join(line[i].ljust(widths[i]) for i in columns).rstrip() for line in lines)
