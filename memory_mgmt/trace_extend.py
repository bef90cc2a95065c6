"""From a trace of a few layers to one of many: layers that repeat exactly are traced once and copied.

The longest stretch of layers with a repeating pattern is cut to a few periods (a period is one layer in a model of equal layers, two
in one that alternates attention and memory); layers before and after the stretch are all traced. The middle period and the next one,
which have inner neighbours on both sides, must be identical event by event, seen relative to their own layer; then the middle one is
copied as often as needed, in forward order in the forward pass, clipping and the update, in reverse order in the backward pass.
Where they are not identical ``extend`` refuses and the caller traces the whole model.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, NamedTuple

from memory_mgmt.trace import Trace, TracedBuffer, TracedOp
from memory_mgmt.trace_recorder import Region, StepRecorder

MARGIN = 3
"""Periods traced before the one that is copied, and after it: what reaches no further than that is seen to repeat."""


class NotRepeating(Exception):
    """The traced layers differ from one another; the message says where."""


class _Event(NamedTuple):
    time: int
    action: Literal["begin", "end", "op"]
    item: TracedBuffer | TracedOp
    layer: int | None


_LAYERS = "blocks"
"""Module of a run in which layers run, one after another."""


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
    margin: int = MARGIN

    @property
    def periods(self) -> int:
        """Periods of the stretch that are traced; the one in the middle, number ``margin``, is copied."""
        return 2 * self.margin + 1

    @property
    def traced(self) -> list[int]:
        """The layers that are traced, by their index in the whole model."""
        cut = self.start + (self.margin + 1) * self.period
        return [*range(cut), *range(cut + self.copies * self.period, self.n_layers)]

    def period_of(self, layer: int) -> int:
        """The period that a traced layer is in; -1 before the stretch, the last one also after it."""
        return max(-1, min((layer - self.start) // self.period, self.periods - 1))


def shorten(kinds: Sequence[Hashable], multiple: int = 1, margin: int = MARGIN) -> Shortening:
    """The cut that leaves out most layers of a model whose layers are equal where ``kinds`` are, in periods that are multiples of
    ``multiple`` (2 where layers take turns with two buffers)."""
    best = Shortening(len(kinds), 0, 1, 0, margin)
    for period in range(multiple, len(kinds) // best.periods + 1, multiple):
        start = 0
        for end in range(1, len(kinds) + 1):
            if end < len(kinds) and (end - start < period or kinds[end] == kinds[end - period]):
                continue
            copies = (end - start) // period - best.periods
            if copies * period > best.copies * best.period:
                best = Shortening(len(kinds), start, period, copies, margin)
            start = end - period + 1
    return best


def extend(recorder: StepRecorder, cut: Shortening) -> Trace:
    """The trace of a whole model from that of its layers ``cut.traced``. Raises NotRepeating when they do not repeat exactly."""
    trace = recorder.trace()
    if not cut.copies:
        return trace
    runs = list(_runs(trace, recorder.regions, cut))
    _check_repeating(runs, cut.margin)
    longer = _Extension(trace, runs, cut).build()
    longer.notes |= {"traced_layers": len(cut.traced), "layers": cut.n_layers}
    return longer


def _runs(trace: Trace, regions: list[tuple[int, Region]], cut: Shortening) -> Iterable[_Run]:
    """The events in order, cut where the region or the period changes."""
    starts = [time for time, _ in regions]

    def region_at(time: int) -> Region:
        return regions[max(0, bisect_right(starts, time) - 1)][1]

    def period_at(event: _Event) -> int | None:
        return None if event.layer is None else cut.period_of(event.layer)

    events = _placed(sorted(_events(trace), key=lambda event: event.time), region_at, cut)
    labelled = ((event, region_at(event.time), period_at(event)) for event in events)
    for (region, place), group in groupby(labelled, key=lambda entry: (_coarse(entry[1]), entry[2])):
        yield _Run(region, place, [event for event, _, _ in group])


def _events(trace: Trace) -> Iterable[_Event]:
    """Everything that happens, each with the layer of what it happens to."""
    for buffer in trace.buffers:
        yield _Event(buffer.lower, "begin", buffer, buffer.layer)
        if buffer.upper < trace.end:
            yield _Event(buffer.upper, "end", buffer, buffer.layer)
    for op in trace.ops:
        yield _Event(op.time, "op", op, op.layer)


def _placed(events: Iterable[_Event], region_at: Callable[[int], Region], cut: Shortening) -> Iterator[_Event]:
    """The events with the layer that runs. Where none does (clipping, update: parameter after parameter) it is the one that owns the
    tensor; the end of a tensor of the period before belongs to what runs, since it made room for it."""
    running: int | None = None
    for event in events:
        region = region_at(event.time)
        if event.time > 0 and region.layer is not None:
            yield event._replace(layer=region.layer)
            continue
        if event.action != "end":
            running = event.layer
        elif None not in (running, event.layer) and 0 <= cut.period_of(running) - cut.period_of(event.layer) <= 1:  # type: ignore[arg-type]
            event = event._replace(layer=running)
        yield event


def _coarse(region: Region) -> Region:
    """A region without its layer: the period says that."""
    return replace(region, layer=None, module=_LAYERS) if region.layer is not None else region


def _check_repeating(runs: list[_Run], copied: int) -> None:
    one, other = _shape(runs, copied), _shape(runs, copied + 1)
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            raise NotRepeating(f"periods {copied} and {copied + 1} differ at event {i}: {a} and {b}")
    if len(one) != len(other):
        raise NotRepeating(f"period {copied} has {len(one)} events, period {copied + 1} {len(other)}")


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

    def __init__(self, trace: Trace, runs: list[_Run], cut: Shortening) -> None:
        self.trace, self.runs, self.period, self.copies, self.copied = trace, runs, cut.period, cut.copies, cut.margin
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
            if run.period != self.copied:
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
        if period is None or period < self.copied:
            return 0
        return (copy if period == self.copied else self.copies) * self.period

    def _play(self, run: _Run, copy: int) -> None:
        shift = self._shift(run.period, copy)
        for event in run.events:
            self._mark(run.region, event.layer, shift)
            if isinstance(event.item, TracedOp):
                self.clock += 1
                self.ops.append(replace(event.item, time=self.clock, **self._moved(event.item, shift)))
            elif event.action == "begin":
                self._begin(event.item, copy if run.period == self.copied else 0, shift, found=event.time == 0)
            else:
                self._end(event.item, run.period, copy)

    def _mark(self, region: Region, layer: int | None, shift: int) -> None:
        """Note what begins to run with the next event."""
        module = f"{_LAYERS}.{layer + shift}" if region.module == _LAYERS and layer is not None else region.module
        label = f"{region.phase} {module}".strip()
        if not self.marks or self.marks[-1][1] != label:
            self.marks.append((self.clock + 1 if self.clock else 0, label))

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
            return [(buffer.id, c) for c in range(self.copies + 1 if owner == self.copied else 1)]
        target = self._in_longer(period, copy) + owner - period
        if self.copied <= target <= self.copied + self.copies:
            return [(self.at.get((self.copied, ordinal), -1), target - self.copied)]
        traced = target if target < self.copied else target - self.copies
        return [(buffer.id if traced == owner else self.at.get((traced, ordinal), -1), 0)]

    def _in_longer(self, period: int, copy: int) -> int:
        """Which period of the longer model a run of the traced one becomes."""
        return period if period < self.copied else period + (copy if period == self.copied else self.copies)


def _renamed(module: str, layer: int, shift: int) -> str:
    head = f"blocks.{layer}"
    if module == head or module.startswith(head + "."):
        return f"blocks.{layer + shift}{module[len(head) :]}"
    return module
