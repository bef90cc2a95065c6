"""A traced training step: every allocation, free and operation in order, and what can be read from it.

Written by ``trace_recorder.py`` (fake or real tensors), read by the address planner, the cost model, the planner and everything
that shows memory. Time is the index of an event: only the order counts. Imports no torch.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, get_args

FORMAT_VERSION = 1

TraceKind = Literal[
    "parameter",
    "gradient",
    "optimizer",
    "skeletal",  # activation made in forward and needed in backward
    "transient",  # made and freed inside one layer's forward or backward, or inside clipping or the update
    "loss",  # made by the output head and the loss
    "communication",  # handed to a collective or to send/receive
    "workspace",  # scratch memory of a kernel, modelled
    "state",  # a memory layer's recurrent state
    "batch",
]
Phase = Literal["build", "forward", "loss", "backward", "clip", "update"]
Place = Literal["device", "host"]


@dataclass(slots=True)
class TracedBuffer:
    """One allocation: live on the half-open event interval [lower, upper)."""

    id: int
    lower: int
    upper: int
    size: int
    """Bytes as the device's allocator rounds them."""
    requested: int
    """Bytes as the tensor needs them."""
    kind: TraceKind
    op: str
    """Operation that made it, such as ``aten::mm``."""
    module: str
    """Path of the module that was running, such as ``blocks.3.ffn``; empty outside the model."""
    layer: int | None
    phase: Phase
    freed_in: Phase | None
    """None: outlives the step."""
    stream: str = "compute"
    """CUDA: the stream it was allocated on, whose pool takes it back: ``compute``, or ``side 1`` and so on (gathers, reductions)."""
    place: Place = "device"


@dataclass(slots=True)
class TracedOp:
    """One operation that does work."""

    time: int
    name: str
    module: str
    layer: int | None
    phase: Phase
    flops: int
    """Multiplications and additions counted separately; hidden scores of causal and window attention not counted."""
    bytes: int
    """Read plus written on the device."""
    dtype: str
    recompute: bool = False
    """Forward work done again in the backward pass."""
    stream: str = "compute"
    group_size: int = 1
    """Ranks that take part: 1 for computation, more for a collective, send or receive."""
    repeats: int = 1
    """Times it was done in a row; ``flops``, ``bytes`` and ``message_bytes`` are those of all of them together."""
    message_bytes: int = 0
    """Of a collective: bytes of this rank's whole (gathered or unreduced) message; of send/receive and host copies: bytes moved."""
    group_stride: int = 0
    """Of a collective: by how much the ranks of neighbours in its group differ; 0: not known, or not the same for all."""
    in_flight: int = 0
    """Of a collective: messages of its layer, itself included, that may be on their way beside computation; 0: waited for at once."""


@dataclass
class Trace:
    """One training step of one rank, in steady state (states of the optimizer exist)."""

    device: str
    """Device semantics under which it was traced: ``cpu`` or ``cuda``."""
    buffers: list[TracedBuffer]
    ops: list[TracedOp]
    marks: list[tuple[int, str]]
    """(time, label) where a new stretch begins, such as ``forward blocks.3``; sorted."""
    end: int
    """One after the last event; buffers that outlive the step have ``upper == end``, those that it found have ``lower == 0``."""
    notes: dict[str, Any] = field(default_factory=dict)
    """How it was made: seconds, traced and extended layers, torch version, ..."""

    def of(self, place: Place = "device") -> list[TracedBuffer]:
        """The buffers in one place."""
        return [buffer for buffer in self.buffers if buffer.place == place]

    def peak(self, place: Place = "device") -> tuple[int, int]:
        """(bytes, time): the most that is live at once, and the first time it is."""
        peak_bytes, peak_time = 0, 0
        for time, live in self.curve(place):
            if live > peak_bytes:
                peak_bytes, peak_time = live, time
        return peak_bytes, peak_time

    def curve(self, place: Place = "device") -> list[tuple[int, int]]:
        """(time, live bytes) after every time at which something is allocated or freed, in order."""
        changes: dict[int, int] = {}
        for buffer in self.of(place):
            changes[buffer.lower] = changes.get(buffer.lower, 0) + buffer.size
            changes[buffer.upper] = changes.get(buffer.upper, 0) - buffer.size
        live, points = 0, []
        for time in sorted(changes):
            live += changes[time]
            points.append((time, live))
        return points

    def live_at(self, time: int, place: Place = "device") -> list[TracedBuffer]:
        """Buffers that are live at ``time``."""
        return [buffer for buffer in self.of(place) if buffer.lower <= time < buffer.upper]

    def mark_at(self, time: int) -> str:
        """The label of the stretch that ``time`` is in."""
        label = ""
        for start, name in self.marks:
            if start > time:
                break
            label = name
        return label

    def save(self, path: Path) -> None:
        """Write as gzipped JSON (columns instead of records: a tenth of the size)."""
        data = {
            "format_version": FORMAT_VERSION,
            "device": self.device,
            "end": self.end,
            "marks": self.marks,
            "notes": self.notes,
            "buffers": _columns(TracedBuffer, self.buffers),
            "ops": _columns(TracedOp, self.ops),
        }
        # Two processes may write one trace: each its own file, the rename is atomic.
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(gzip.compress(json.dumps(data).encode(), compresslevel=1))
        temporary.replace(path)

    @staticmethod
    def load(path: Path) -> Trace:
        """Read what ``save`` wrote. Raises ValueError for anything else."""
        try:
            data = json.loads(gzip.decompress(path.read_bytes()))
            if data["format_version"] != FORMAT_VERSION:
                raise ValueError(f"trace of format version {data['format_version']}; this longstride reads {FORMAT_VERSION}")
            buffers, ops = _records(TracedBuffer, data["buffers"]), _records(TracedOp, data["ops"])
            marks = [(time, label) for time, label in data["marks"]]
            return Trace(data["device"], buffers, ops, marks, data["end"], data["notes"])
        except (OSError, EOFError, KeyError, TypeError, json.JSONDecodeError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: not a saved trace ({error})") from None


def _columns(kind: type, records: Iterable[Any]) -> dict[str, list[Any]]:
    names = [f.name for f in fields(kind)]
    values = attrgetter(*names)  # astuple copies every value
    columns = list(zip(*(values(record) for record in records), strict=True)) or [[] for _ in names]
    return {name: list(column) for name, column in zip(names, columns, strict=True)}


def _records(kind: type, columns: dict[str, list[Any]]) -> list[Any]:
    names = [f.name for f in fields(kind)]
    return [kind(*values) for values in zip(*(columns[name] for name in names), strict=True)]


def by_kind(buffers: Iterable[TracedBuffer]) -> dict[str, int]:
    """Bytes summed by kind, in the order of ``TraceKind``; kinds that hold nothing are left out."""
    sums = dict.fromkeys(get_args(TraceKind), 0)
    for buffer in buffers:
        sums[buffer.kind] += buffer.size
    return {kind: size for kind, size in sums.items() if size}


def describe(buffer: TracedBuffer) -> dict[str, Any]:
    """A buffer as a plain dictionary, for JSON and tables."""
    return asdict(buffer)
