"""From a trace of a few layers to one of many: layers that repeat exactly are traced once and copied.

The longest stretch of layers with a repeating pattern is cut to seven periods (a period is one layer in a model of equal layers, two
in one that alternates attention and memory); layers before and after the stretch are all traced. The fourth and the fifth period,
which have inner neighbours on both sides, must be identical event by event, seen relative to their own layer; then the fourth is
copied as often as needed, in forward order in the forward pass, clipping and the update, in reverse order in the backward pass.
Where they are not identical ``extend`` refuses and the caller traces the whole model.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, NamedTuple

from memory_mgmt.trace import Trace, TracedBuffer, TracedOp
from memory_mgmt.trace_recorder import Region, StepRecorder

PERIODS = 7
_COPIED = 3
"""The period that is copied; the next one proves that it repeats."""


class NotRepeating(Exception):
    """The traced layers differ from one another; the message says where."""


class _Event(NamedTuple):
    time: int
    action: Literal["begin", "end", "op"]
    item: TracedBuffer | TracedOp
    layer: int | None


@dataclass(frozen=True)
class _Run:
    """Consecutive events of one period in one phase; ``period`` None: of no layer."""

    region: Region
    period: int | None
    events: list[_Event]


@dataclass(frozen=True)
class Shortening:
    """How a model of ``n_layers`` is cut: layers from ``start`` repeat with ``period``, and ``copies`` periods are left out."""

    n_layers: int
    start: int
    period: int
    copies: int

    @property
    def traced(self) -> list[int]:
        """The layers that are traced, by their index in the whole model."""
        cut = self.start + (_COPIED + 1) * self.period
        return [*range(cut), *range(cut + self.copies * self.period, self.n_layers)]

    def period_of(self, layer: int) -> int:
        """The period that a traced layer is in; -1 before the stretch, the last one also after it."""
        return max(-1, min((layer - self.start) // self.period, PERIODS - 1))


def shorten(kinds: Sequence[Hashable], multiple: int = 1) -> Shortening:
    """The cut that leaves out most layers of a model whose layers are equal where ``kinds`` are, in periods that are multiples of
    ``multiple`` (2 where layers take turns with two buffers)."""
    best = Shortening(len(kinds), 0, 1, 0)
    for period in range(multiple, len(kinds) // PERIODS + 1, multiple):
        start = 0
        for end in range(1, len(kinds) + 1):
            if end < len(kinds) and (end - start < period or kinds[end] == kinds[end - period]):
                continue
            copies = (end - start) // period - PERIODS
            if copies * period > best.copies * best.period:
                best = Shortening(len(kinds), start, period, copies)
            start = end - period + 1
    return best


def extend(recorder: StepRecorder, cut: Shortening) -> Trace:
    """The trace of a whole model from that of its layers ``cut.traced``. Raises NotRepeating when they do not repeat exactly."""
    trace = recorder.trace()
    if not cut.copies:
        return trace
    runs = list(_runs(trace, recorder.regions, cut))
    _check_repeating(runs)
    longer = _Extension(trace, runs, cut.period, cut.copies).build()
    longer.notes |= {"traced_layers": len(cut.traced), "layers": cut.n_layers}
    return longer


def _runs(trace: Trace, regions: list[tuple[int, Region]], cut: Shortening) -> Iterable[_Run]:
    """The events in order, cut where the region or the period changes."""
    starts = [time for time, _ in regions]

    def region_at(time: int) -> Region:
        return regions[max(0, bisect_right(starts, time) - 1)][1]

    def period_at(event: _Event) -> int | None:
        return None if event.layer is None else cut.period_of(event.layer)

    events = sorted(_events(trace, region_at), key=lambda event: event.time)
    labelled = ((event, region_at(event.time), period_at(event)) for event in events)
    for (region, place), group in groupby(labelled, key=lambda entry: (_coarse(entry[1]), entry[2])):
        yield _Run(region, place, [event for event, _, _ in group])


def _coarse(region: Region) -> Region:
    """A region without its layer: the period says that."""
    return replace(region, layer=None, module="") if region.layer is not None else region


def _events(trace: Trace, region_at: object) -> Iterable[_Event]:
    for buffer in trace.buffers:
        yield _Event(buffer.lower, "begin", buffer, _layer(buffer, buffer.lower, region_at))
        if buffer.upper < trace.end:
            yield _Event(buffer.upper, "end", buffer, _layer(buffer, buffer.upper, region_at))
    for op in trace.ops:
        yield _Event(op.time, "op", op, _layer(op, op.time, region_at))


def _layer(item: TracedBuffer | TracedOp, time: int, region_at: object) -> int | None:
    """The layer an event belongs to: the running one; where no layer runs, the one that owns the tensor."""
    region: Region = region_at(time)  # type: ignore[operator]
    return region.layer if time > 0 and region.layer is not None else item.layer


def _check_repeating(runs: list[_Run]) -> None:
    one, other = _shape(runs, _COPIED), _shape(runs, _COPIED + 1)
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            raise NotRepeating(f"periods {_COPIED} and {_COPIED + 1} differ at event {i}: {a} and {b}")
    if len(one) != len(other):
        raise NotRepeating(f"period {_COPIED} has {len(one)} events, period {_COPIED + 1} {len(other)}")


def _ordinals(runs: list[_Run]) -> dict[int, tuple[int | None, int]]:
    """Buffer id -> (period in which it begins, how many-th of that period)."""
    counts: dict[int | None, int] = {}
    found: dict[int, tuple[int | None, int]] = {}
    for run in runs:
        for event in run.events:
            if event.action == "begin":
                assert isinstance(event.item, TracedBuffer)
                ordinal = counts.get(run.period, 0)
                counts[run.period] = ordinal + 1
                found[event.item.id] = (run.period, ordinal)
    return found


def _shape(runs: list[_Run], period: int) -> list[tuple[object, ...]]:
    """The events of a period in a form that is equal for periods that repeat."""
    ordinals, found = _ordinals(runs), []
    for run in runs:
        if run.period != period:
            continue
        for event in run.events:
            item = event.item
            if isinstance(item, TracedOp):
                found.append((run.region.phase, item.name, item.flops, item.bytes, item.message_bytes))
                continue
            owner, ordinal = ordinals[item.id]
            relative = None if owner is None else owner - period
            found.append((run.region.phase, event.action, item.size, item.op if event.action == "begin" else "", relative, ordinal))
    return found


class _Extension:
    """Builds the longer trace: events in their new order, then buffers and times from them."""

    def __init__(self, trace: Trace, runs: list[_Run], period: int, copies: int) -> None:
        self.trace, self.runs, self.period, self.copies = trace, runs, period, copies
        self.place = _ordinals(runs)
        self.at = {place: buffer_id for buffer_id, place in self.place.items()}
        self.made: dict[tuple[int, int], TracedBuffer] = {}
        self.ops: list[TracedOp] = []
        self.marks: list[tuple[int, str]] = []
        self.clock = 0

    def build(self) -> Trace:
        """The extended trace."""
        for run in self.runs:
            descending = run.region.phase == "backward"
            if run.period != _COPIED:
                self._play(run, 0)
                continue
            order = range(self.copies, -1, -1) if descending else range(self.copies + 1)
            for copy in order:
                self._play(run, copy)
        end = self.clock + 2
        buffers = sorted(self.made.values(), key=lambda buffer: buffer.lower)
        for i, buffer in enumerate(buffers):
            buffer.id = i
            if buffer.upper < 0:
                buffer.upper, buffer.freed_in = end, None
        return Trace(self.trace.device, buffers, self.ops, self.marks, end, dict(self.trace.notes))

    def _shift(self, period: int | None, copy: int) -> int:
        """Layers by which events of a period move up."""
        if period is None or period < _COPIED:
            return 0
        return (copy if period == _COPIED else self.copies) * self.period

    def _play(self, run: _Run, copy: int) -> None:
        shift = self._shift(run.period, copy)
        layers = [event.layer for event in run.events if event.layer is not None]
        name = f"blocks.{layers[0] + shift}" if layers and run.region.phase in ("forward", "backward") else run.region.module
        label = f"{run.region.phase} {name}".strip()
        if not self.marks or self.marks[-1][1] != label:
            self.marks.append((self.clock, label))
        for event in run.events:
            if isinstance(event.item, TracedOp):
                self.clock += 1
                self.ops.append(replace(event.item, time=self.clock, **self._moved(event.item, shift)))
            elif event.action == "begin":
                self._begin(event.item, copy if run.period == _COPIED else 0, shift, found=event.time == 0)
            else:
                self._end(event.item, run.period, copy)

    def _begin(self, buffer: TracedBuffer, copy: int, shift: int, found: bool) -> None:
        if not found:
            self.clock += 1
        moved = replace(buffer, lower=0 if found else self.clock, upper=-1, **self._moved(buffer, shift))
        self.made[buffer.id, copy] = moved

    def _moved(self, item: TracedBuffer | TracedOp, shift: int) -> dict[str, object]:
        if item.layer is None or not shift:
            return {}
        return {"layer": item.layer + shift, "module": _renamed(item.module, item.layer, shift)}

    def _end(self, buffer: TracedBuffer, period: int | None, copy: int) -> None:
        self.clock += 1
        for reference in self._references(buffer, period, copy):
            target = self.made.get(reference)
            if target is None:
                raise NotRepeating(f"{buffer.op} in {buffer.module or 'no module'} ends where its copy does not exist")
            target.upper, target.freed_in = self.clock, buffer.freed_in

    def _references(self, buffer: TracedBuffer, period: int | None, copy: int) -> list[tuple[int, int]]:
        """Which buffers of the longer trace an end refers to: one as many periods away as in the traced model."""
        owner, ordinal = self.place[buffer.id]
        if owner is None:
            return [(buffer.id, 0)]
        if period is None:
            return [(buffer.id, c) for c in range(self.copies + 1 if owner == _COPIED else 1)]
        target = self._in_longer(period, copy) + owner - period
        if _COPIED <= target <= _COPIED + self.copies:
            return [(self.at.get((_COPIED, ordinal), -1), target - _COPIED)]
        traced = target if target < _COPIED else target - self.copies
        return [(buffer.id if traced == owner else self.at.get((traced, ordinal), -1), 0)]

    def _in_longer(self, period: int, copy: int) -> int:
        """Which period of the longer model a run of the traced one becomes."""
        return period if period < _COPIED else period + (copy if period == _COPIED else self.copies)


def _renamed(module: str, layer: int, shift: int) -> str:
    head = f"blocks.{layer}"
    if module == head or module.startswith(head + "."):
        return f"blocks.{layer + shift}{module[len(head) :]}"
    return module
