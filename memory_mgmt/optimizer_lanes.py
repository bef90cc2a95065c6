"""The composed optimizer (``optim/driver.py``) with its states in host memory: few-bit moments, projected ones, whatever a preset keeps.

States come to the device in buckets, are updated there by the very code that updates them without this, and go back
(``optimizer_pipeline.py``). A bucket holds the states of some parameters of one section (a block, the embedding, the head), or of a run of
rows of one large parameter that is updated element by element: blocks of few bits lie inside rows, and chance knows rows by their place, so
the bits are the same. Of a matrix that is updated as a whole all states come together, with those that share its messages.

The states of tables stay on the device: a step touches few of their rows. Host memory, its budget and the accounting are the
``HostStore``'s. torch's own AdamW has ``optimizer_offload.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from memory_mgmt.offload import HostStore
from memory_mgmt.offload_layout import fake_mode_of
from memory_mgmt.optimizer_buckets import ALIGNMENT, BUCKET_BYTES, section_of
from memory_mgmt.optimizer_pipeline import through
from optim.clip import local_part
from optim.driver import ComposedOptimizer, together
from optim.lane import Lane
from optim.row_sparse import RowSparse

STRETCH_BYTES = 1 << 30
"""Host memory is asked for in pieces of about so many bytes, or of one state where that is larger."""


@dataclass(frozen=True)
class _Kept:
    """One state of one lane: its shape here, and where its bytes are in the section's host memory."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    host: Tensor
    """Flat uint8; its length rounded up to the alignment."""

    def values(self, raw: Tensor, rows: slice | None = None) -> Tensor:
        """The state, or some rows of it, in bytes that begin with it."""
        shape = self.shape if rows is None else (rows.stop - rows.start, *self.shape[1:])
        return raw[: torch.Size(shape).numel() * self.dtype.itemsize].view(self.dtype).view(shape)

    def part(self, rows: slice | None) -> Tensor:
        """The bytes of ``rows``, with what is unused behind the last one."""
        if rows is None:
            return self.host
        row = torch.Size(self.shape[1:]).numel() * self.dtype.itemsize
        stop = self.host.numel() if rows.stop == self.shape[0] else rows.stop * row
        return self.host[rows.start * row : stop]


@dataclass(frozen=True)
class _Unit:
    """A lane, or some rows of one."""

    lane: Lane
    rows: slice | None = None

    @property
    def last(self) -> bool:
        """No later unit has rows of this lane."""
        return self.rows is None or self.rows.stop == _rows(self.lane)


@dataclass
class _Load:
    """Units whose states travel together. ``group``: of the optimizer's groups."""

    section: str
    group: int
    units: list[_Unit]
    kept: list[list[_Kept]] = field(default_factory=list)
    """Of every unit."""
    host: list[Tensor] = field(default_factory=list)
    nbytes: int = 0

    def place(self, kept: Mapping[str, list[_Kept]]) -> None:
        """Know where the states are; what lies side by side travels as one."""
        self.kept = [kept[unit.lane.name] for unit in self.units]
        parts = [one.part(unit.rows) for unit, states in zip(self.units, self.kept, strict=True) for one in states]
        self.host = list(_merged(part for part in parts if part.numel()))
        self.nbytes = sum(part.numel() for part in self.host)

    def states(self, buffer: Tensor) -> Iterator[tuple[_Unit, dict[str, Tensor]]]:
        """Every unit's states in a device buffer that holds the load."""
        at = 0
        for unit, states in zip(self.units, self.kept, strict=True):
            found: dict[str, Tensor] = {}
            for one in states:
                size = one.part(unit.rows).numel()
                found[one.name] = one.values(buffer[at : at + size], unit.rows)
                at += size
            yield unit, found


class OffloadedLanes(ComposedOptimizer):
    """See the module. ``groups``, ``lanes`` and ``lr`` as of a composed optimizer, lanes on one device; ``bucket_bytes``: of states, at
    most, but matrices which are updated as wholes come with all of theirs. Raises UserError where ``store``'s budget is too small."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], lanes: Sequence[Lane], lr: float, store: HostStore, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self._last_copy: Any = None
        self._near: dict[Tensor, dict[str, Tensor]] = {}
        """States that are on the device now, by parameter."""
        self._store = store
        self.watch: Callable[[str], None] = lambda section: None
        """As of ``OffloadedOptimizer``."""
        super().__init__(groups, lanes, lr)
        first = local_part(lanes[0].parameter.detach())
        self._device, self._mode = first.device, fake_mode_of(first)
        moving = [lane for lane in lanes if not isinstance(lane.rule, RowSparse)]
        number = {parameter: i for i, group in enumerate(self.param_groups) for parameter in group["params"]}
        self._loads = list(_loads(moving, number, bucket_bytes))
        kept = self._place()
        for load in self._loads:
            load.place(kept)

    # --- states ---------------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """States by parameter, in host memory: the live ones, read and written between steps."""
        if self._last_copy is not None:
            self._store.copies_for(self._mode).finish(self._last_copy)
        return self._states

    @state.setter
    def state(self, states: Any) -> None:
        self._states = states

    def _make_states(self, lane: Lane) -> None:
        if isinstance(lane.rule, RowSparse):
            super()._make_states(lane)
        else:
            self.state[lane.parameter]["step"] = torch.zeros((), dtype=torch.float32)

    def _place(self) -> dict[str, list[_Kept]]:
        """Give all states their host memory, zeros, in the order in which they travel. By the lane's name."""
        lanes = list({unit.lane.name: unit.lane for load in self._loads for unit in load.units}.values())
        wanted = [(lane, name, lane.placed.local_shape(spec), spec) for lane in lanes for name, spec in lane.stored().items()]
        sizes = [_up(torch.Size(shape).numel() * spec.dtype.itemsize) for _, _, shape, spec in wanted]
        runs, following = _runs(sizes, [section_of(lane.name) for lane, *_ in wanted]), iter(wanted)
        found: dict[str, list[_Kept]] = {lane.name: [] for lane in lanes}
        raws = self._store.keep([max(sum(run), ALIGNMENT) for run in runs], "the optimizer's states", self._mode)
        for run, raw in zip(runs, raws, strict=True):
            raw.zero_()
            at = 0
            for size in run:
                lane, name, shape, spec = next(following)
                kept = _Kept(name, tuple(shape), spec.dtype, raw[at : at + size])
                found[lane.name].append(kept)
                self._states[lane.parameter][name] = lane.placed.laid(kept.values(kept.host), spec)
                at += size
        self.host_bytes = sum(sizes)
        return found

    def _stored(self, lane: Lane) -> dict[str, Tensor]:
        near = self._near.get(lane.parameter)
        return super()._stored(lane) if near is None else near

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of every torch optimizer; the states are written where they are."""
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        states = self.state
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        for parameter, number in zip((p for group in self.param_groups for p in group["params"]), numbers, strict=True):
            for name, value in states[parameter].items():
                local_part(value).copy_(local_part(state_dict["state"][number][name]))

    # --- the step ---------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient. On CUDA returns before the last states are back; ``state`` waits for them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._last_copy = None  # what computes next waits for it already (``through``)
        self.watch("")
        for group in self.param_groups:
            self.step_lanes(group, [lane for p in group["params"] if isinstance((lane := self.lanes[p]).rule, RowSparse)])
        self._last_copy = through(self._store.copies_for(self._mode), self._loads, self._device, self._update)
        moved = sum(load.nbytes for load in self._loads)
        self._store.count(to_host=moved, to_device=moved)
        return loss

    def _update(self, load: _Load, buffer: Tensor) -> None:
        self.watch(load.section)
        group = self.param_groups[load.group]
        for unit, states in load.states(buffer):
            self._near[unit.lane.parameter] = states
        try:
            self.step_lanes(group, [unit.lane for unit in load.units if unit.rows is None])
            for unit in load.units:
                if unit.rows is not None and unit.lane.has_gradient:
                    self._step_rows(unit, unit.rows, group)
        finally:
            self._near.clear()

    def _step_rows(self, unit: _Unit, rows: slice, group: Mapping[str, Any]) -> None:
        """Of one large parameter; its count of steps goes up with the last of its rows."""
        counter = self._states[unit.lane.parameter]["step"]
        number = int(counter) + 1
        work = self._workspace(unit.lane.parameter.device)
        self._update_rows(unit.lane, number, work, group["lr"], group["weight_decay"], rows)
        if unit.last:
            counter.fill_(number)


def _loads(lanes: Sequence[Lane], number: Mapping[Tensor, int], most: int) -> Iterator[_Load]:
    """What travels together, in the order of sections: equal layers have equal loads."""
    by_section: dict[tuple[str, int], list[Lane]] = {}
    for lane in lanes:
        by_section.setdefault((section_of(lane.name), number[lane.parameter]), []).append(lane)
    order = {section: i for i, section in enumerate(dict.fromkeys(section_of(lane.name) for lane in lanes))}
    for (section, group), members in sorted(by_section.items(), key=lambda entry: (order[entry[0][0]], entry[0][1])):
        small: list[_Unit] = []
        size = 0
        for lane in members:
            if lane.is_method:
                continue
            own, pieces = _bytes(lane), _pieces(lane, most)
            if pieces:
                yield from (_Load(section, group, [_Unit(lane, rows)]) for rows in pieces)
                continue
            if small and size + own > most:
                yield _Load(section, group, small)
                small, size = [], 0
            small.append(_Unit(lane))
            size += own
        if small:
            yield _Load(section, group, small)
        for _, some in together([lane for lane in members if lane.is_method]):
            yield _Load(section, group, [_Unit(lane) for lane in some])


def _pieces(lane: Lane, most: int) -> list[slice]:
    """Runs of rows whose states take about ``most`` bytes; none for a lane that goes in one piece."""
    rows, own = _rows(lane), _bytes(lane)
    shapes = [lane.placed.local_shape(spec) for spec in lane.stored().values()]
    if own <= most or len(lane.placed.shape) < 2 or any(len(shape) < 1 or shape[0] != rows for shape in shapes):
        return []
    # Whole multiples of the alignment: every state's part then begins where its elements may.
    step = max(ALIGNMENT, rows * most // own // ALIGNMENT * ALIGNMENT)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)] if step < rows else []


def _rows(lane: Lane) -> int:
    """Of the parameter, that this rank has."""
    return lane.placed.rows.count


def _bytes(lane: Lane) -> int:
    """Of all its states here."""
    return sum(_up(torch.Size(lane.placed.local_shape(spec)).numel() * spec.dtype.itemsize) for spec in lane.stored().values())


def _up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _runs(sizes: Sequence[int], sections: Sequence[str]) -> list[list[int]]:
    """The sizes in order, those of a section together up to ``STRETCH_BYTES``."""
    found: list[list[int]] = []
    for i, size in enumerate(sizes):
        if not found or sections[i] != sections[i - 1] or sum(found[-1]) + size > STRETCH_BYTES:
            found.append([])
        found[-1].append(size)
    return found


def _merged(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Stretches of host memory, neighbours as one."""
    run: list[Tensor] = []
    for part in parts:
        if run and _follows(part, run):
            run.append(part)
            continue
        if run:
            yield _joined(run)
        run = [part]
    if run:
        yield _joined(run)


def _follows(part: Tensor, run: Sequence[Tensor]) -> bool:
    last = run[-1]
    same = part.untyped_storage()._cdata == last.untyped_storage()._cdata
    return same and part.storage_offset() == last.storage_offset() + last.numel()


def _joined(run: Sequence[Tensor]) -> Tensor:
    total = sum(part.numel() for part in run)
    return run[0] if len(run) == 1 else run[0].as_strided((total,), (1,), run[0].storage_offset())
