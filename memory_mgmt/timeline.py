"""The memory of one step over its course, from a traced step: bytes by kind at every event, phases, peak, host memory.

``timeline_png.py`` and ``timeline_html.py`` draw it. Only the order of events is known, so the axis counts events; seconds are the
cost model's. Imports no torch. Try alone: ``longstride plan debug_cpu --timeline somewhere``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from memory_mgmt.plan import MemoryPlan
from memory_mgmt.trace import Phase, Place, Trace, TracedBuffer, TraceKind

Curve = NDArray[np.int64]

STACK: tuple[TraceKind, ...] = (
    "parameter",
    "optimizer",
    "gradient",
    "batch",
    "skeletal",
    "state",
    "loss",
    "communication",
    "workspace",
    "transient",
)
"""Kinds from bottom to top: what stays through the step below, what comes and goes above."""
KIND_NAMES: Mapping[TraceKind, str] = {
    "parameter": "parameters",
    "optimizer": "optimizer states",
    "gradient": "gradients",
    "batch": "batch",
    "skeletal": "activations kept for backward",
    "state": "memory states",
    "loss": "head and loss",
    "communication": "communication",
    "workspace": "kernel workspace",
    "transient": "transient",
}
KIND_COLORS: Mapping[TraceKind, str] = {
    "parameter": "#7e8aa2",
    "optimizer": "#9c755f",
    "gradient": "#b07aa1",
    "batch": "#59a14f",
    "skeletal": "#4e79a7",
    "state": "#edc948",
    "loss": "#e15759",
    "communication": "#76b7b2",
    "workspace": "#ff9da7",
    "transient": "#f28e2b",
}
HOST_SHARE = 0.005
OUTSIDE_NAME = "not in the trace"
OUTSIDE_COLOR = "#c5beb6"


@dataclass(frozen=True)
class Stretch:
    """Part of the step, the half-open event interval [start, end)."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Timeline:
    """What is live over one step of one rank. Values hold from their time to the next one."""

    device: str
    end: int
    """One after the last event."""
    kinds: tuple[TraceKind, ...]
    """Kinds that occur, bottom to top."""
    times: Curve
    """[P], ascending; the first is 0."""
    by_kind: Curve
    """[K, P] bytes on the device."""
    host_times: Curve
    host: Curve
    """[H] bytes in host memory; empty where none is used."""
    phases: tuple[Stretch, ...]
    peak_bytes: int
    """Of the traced buffers, without ``outside_bytes``."""
    peak_time: int
    peak_label: str
    """What was running then, such as ``backward blocks.3``."""
    outside_bytes: int
    """Part of the plan's peak that no trace sees: context, libraries, holes; the same at all times."""
    outside_terms: tuple[tuple[str, int], ...]
    """(name, bytes) of the plan's terms of that sort, for people."""
    limit_bytes: int | None
    """Budget or device memory, the smaller one."""
    limit_name: str

    @property
    def total(self) -> Curve:
        """[P] bytes on the device, what is outside the trace included."""
        return self.by_kind.sum(axis=0) + self.outside_bytes

    @property
    def uses_host(self) -> bool:
        """Whether host memory is worth drawing: a batch that waits there is not."""
        return self.host.size > 0 and int(self.host.max()) >= HOST_SHARE * (self.peak_bytes + self.outside_bytes)

    def thinned(self, points: int) -> Timeline:
        """The same with at most about ``points`` points: of every stretch its highest and its lowest, so that all peaks stay exact."""
        kept, host_kept = extremes(self.total, points), extremes(self.host, points)
        return replace(
            self, times=self.times[kept], by_kind=self.by_kind[:, kept], host_times=self.host_times[host_kept], host=self.host[host_kept]
        )


def timeline(trace: Trace, plan: MemoryPlan | None = None) -> Timeline:
    """What is live over the step of ``trace``; ``plan`` adds the limit and what no trace sees.

    Raises ValueError for a trace without device buffers.
    """
    if not trace.of("device"):
        raise ValueError("the trace holds no device buffers: there is nothing to draw")
    kinds = kinds_of(trace.of("device"))
    times, by_kind = _curves(trace, kinds, "device")
    host_times, host = _curves(trace, STACK, "host")
    peak_bytes, peak_time = trace.peak()
    outside = max(0, plan.peak_bytes - peak_bytes) if plan is not None else 0
    hidden = [term for term in plan.terms if term.kind in ("overhead", "outside") and term.bytes] if plan is not None and outside else []
    limit, limit_name = _limit(plan)
    return Timeline(
        device=plan.device if plan is not None else trace.device,
        end=trace.end,
        kinds=kinds,
        times=times,
        by_kind=by_kind,
        host_times=host_times,
        host=host.sum(axis=0),
        phases=phases(trace),
        peak_bytes=peak_bytes,
        peak_time=peak_time,
        peak_label=trace.mark_at(peak_time),
        outside_bytes=outside,
        outside_terms=tuple((term.name, term.bytes) for term in hidden),
        limit_bytes=limit,
        limit_name=limit_name,
    )


def kinds_of(buffers: Iterable[TracedBuffer]) -> tuple[TraceKind, ...]:
    """Kinds that occur, bottom to top."""
    present = {buffer.kind for buffer in buffers}
    return tuple(kind for kind in STACK if kind in present)


def phases(trace: Trace) -> tuple[Stretch, ...]:
    """The step cut where its phase changes; from the trace's marks if they name phases, else from its operations and buffers."""
    known = set(get_args(Phase))
    starts = [(time, label.split(" ")[0]) for time, label in trace.marks if label.split(" ")[0] in known]
    if not starts:
        seen = [(op.time, op.phase) for op in trace.ops] + [(b.lower, b.phase) for b in trace.buffers if b.lower > 0]
        starts = sorted(seen, key=lambda entry: entry[0])
    cut = [entry for i, entry in enumerate(starts) if i == 0 or starts[i - 1][1] != entry[1]]
    ends = [time for time, _ in cut[1:]] + [trace.end]
    return tuple(Stretch(name, start, end) for (start, name), end in zip(cut, ends, strict=True) if end > start)


def extremes(values: Curve, points: int) -> Curve:
    """Ascending indexes into ``values`` [P]: all if they are at most ``points``, else the first, the last, and the first highest and
    first lowest of each of ``points // 2`` stretches."""
    if len(values) <= points:
        return np.arange(len(values))
    bounds = np.linspace(0, len(values), max(1, points // 2) + 1).astype(np.int64)
    chosen = {0, len(values) - 1}
    for start, stop in itertools.pairwise(bounds.tolist()):
        part = values[start:stop]
        chosen |= {start + int(part.argmax()), start + int(part.argmin())}
    return np.array(sorted(chosen), dtype=np.int64)


def _curves(trace: Trace, kinds: tuple[TraceKind, ...], place: Place) -> tuple[Curve, Curve]:
    """Times [P] at which something changes, and bytes by kind [K, P] after each; both empty where there are no buffers."""
    buffers = trace.of(place)
    if not buffers:
        return np.empty(0, np.int64), np.empty((len(kinds), 0), np.int64)
    lower = np.array([buffer.lower for buffer in buffers], np.int64)
    upper = np.array([buffer.upper for buffer in buffers], np.int64)
    size = np.array([buffer.size for buffer in buffers], np.int64)
    row = np.array([kinds.index(buffer.kind) for buffer in buffers], np.int64)
    times = np.unique(np.concatenate([[0], lower, upper[upper < trace.end]]))
    changes = np.zeros((len(kinds), len(times)), np.int64)
    np.add.at(changes, (row, np.searchsorted(times, lower)), size)
    freed = upper < trace.end  # what is freed at the end or later is live through the last event
    np.add.at(changes, (row[freed], np.searchsorted(times, upper[freed])), -size[freed])
    return times, changes.cumsum(axis=1)


def _limit(plan: MemoryPlan | None) -> tuple[int | None, str]:
    if plan is None or plan.limit_bytes is None:
        return None, ""
    return plan.limit_bytes, "memory.budget_gib" if plan.limit_bytes == plan.budget_bytes else f"memory of {plan.device}"
