"""The time of a traced training step, before it runs: every operation at the achieved rates, and what hides behind what.

``predict_step`` walks the trace once, stretch by stretch (``Trace.marks``: one stretch is one block's forward or backward), with one
clock for computation and one for each of NVLink, network, and the two directions of the host link. Modelled:

* computation runs in order, each operation as ``cost_ops.op_seconds`` says;
* all-gathers of parameters (those that ``fsdp::all_gather_copy_in`` precedes) start one stretch ahead: in the forward pass with the
  stretch before the one that records them, in the backward pass where FSDP2 records its own prefetch; computation waits at the stretch's
  beginning for what is late;
* reduce-scatters of gradients run beside the next stretch's computation; the next one, clipping and the update wait for them;
* send/receive pairs of ring attention run beside the attention of the same hop: in the forward pass one transfer is under way, in the
  backward pass two (keys, and gradients one hop behind), and a stretch ends only when its transfers have arrived;
* of all-to-alls by stages of heads and of gathered keys so many are under way beside computation as the code says
  (``TracedOp.in_flight``); the oldest has arrived before another starts, and all before the stretch ends;
* all other collectives (tensor parallelism, state passing, norms) are waited for at once;
* copies to host memory run beside the computation of this stretch and the next and are waited for after that (two rounding buffers);
  copies back are recorded where their prefetch starts and are waited for when the next stretch begins;
* an offloaded optimizer's stretches are its buckets: one comes in the buffer that the bucket before the present one leaves;
* with ``Rates.overlap`` false (CPU) nothing runs beside anything.

Exposed time is what computation waits. Not modelled: stragglers, input of data, checkpoints, and the host falling behind the device.
Imports no torch. Try alone: ``longstride plan quickstart``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import get_args

from memory_mgmt.cost_ops import COMMUNICATION, COPIES, OpClass, copy_seconds, moved_bytes, op_class, op_seconds
from memory_mgmt.cost_rates import Curve, Rates, Topology
from memory_mgmt.plan import Prediction
from memory_mgmt.trace import Phase, Trace, TracedOp

__all__ = ["Curve", "Rates", "Stretch", "Topology", "copy_seconds", "op_class", "op_seconds", "predict_step", "step_schedule"]

_GATHER_OF_PARAMETERS = "fsdp::all_gather_copy_in"
_REDUCTION_OF_GRADIENTS = "fsdp::chunk_cat"
_PHASES: dict[str, Phase] = {phase: phase for phase in get_args(Phase)}
_FORWARD = ("build", "forward", "loss")
_ONCE = ("clip", "update")
"""Phases that come once in a step, after all passes."""


@dataclass
class Stretch:
    """What one stretch of the step takes. Seconds; ``compute`` includes ``recompute``."""

    label: str
    """Of the mark that begins it; its first word is the phase (else: the first operation's)."""
    phase: Phase
    layer: int | None
    start: float = 0.0
    end: float = 0.0
    compute: float = 0.0
    recompute: float = 0.0
    communication: float = 0.0
    """Of transfers and collectives that this stretch starts, hidden or not."""
    copy_out: float = 0.0
    copy_in: float = 0.0
    waited_communication: float = 0.0
    waited_copy: float = 0.0
    work: list[_Work] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class _Work:
    op: TracedOp
    kind: OpClass
    seconds: float
    of_parameters: bool
    """An all-gather of parameters, or a reduction of gradients."""


@dataclass(frozen=True)
class _Pending:
    """Something under way: when it is done, and the stretch that started it."""

    done: float
    stretch: int


def predict_step(
    trace: Trace,
    rates: Rates,
    topology: Topology,
    *,
    tokens_per_step: int,
    model_flops_per_step: float,
    peak_flops: float | None = None,
    passes: float = 1.0,
) -> Prediction:
    """Time and traffic of the traced step.

    Args:
        tokens_per_step: of the whole run, all ranks and micro-steps.
        model_flops_per_step: of the whole run, by ``models/flops.py`` (nothing counted for recomputation).
        peak_flops: peak FLOP/s of one device; None: MFU is not known.
        passes: how many times as many forward and backward passes the step has as the trace; clipping and update come once.
    Raises ValueError where an operation's cost is not known (``op_seconds``).
    """
    stretches = step_schedule(trace, rates, topology)

    def total(of: Callable[[Stretch], float]) -> float:
        return sum(of(s) * (1.0 if s.phase in _ONCE else passes) for s in stretches)

    seconds = total(lambda s: s.end - s.start)
    return Prediction(
        step_seconds=seconds,
        tokens_per_second=tokens_per_step / seconds if seconds else 0.0,
        mfu=model_flops_per_step / (seconds * peak_flops * topology.ranks) if peak_flops and seconds else None,
        compute_seconds=total(lambda s: s.compute),
        recompute_seconds=total(lambda s: s.recompute),
        exposed_communication_seconds=total(lambda s: s.waited_communication),
        exposed_copy_seconds=total(lambda s: s.waited_copy),
        host_bytes_per_node=trace.peak("host")[0] * topology.ranks_per_node,
        copied_bytes=round(total(lambda s: sum(moved_bytes(work.op) for work in s.work if work.kind in COPIES))),
        source=rates.source,
        tensor_bytes=round(total(lambda s: sum(_sent_bytes(work) for work in s.work if _is_tensor_parallel(work, topology)))),
        tensor_seconds=total(lambda s: sum(work.seconds for work in s.work if _is_tensor_parallel(work, topology))),
    )


def _is_tensor_parallel(work: _Work, topology: Topology) -> bool:
    """Whether this is a message of a tensor-parallel group: its ranks are neighbours, those of every other group lie ``tp`` apart."""
    return topology.tp > 1 and work.kind in COMMUNICATION and (work.op.group_size, work.op.group_stride) == (topology.tp, 1)


def _sent_bytes(work: _Work) -> float:
    """By one rank, of a message among the ranks of a group: all but its own share (an all-reduce: of the summands, then of the result)."""
    shared = work.op.message_bytes * (work.op.group_size - 1) / work.op.group_size
    return 2 * shared if work.kind == "all_reduce" else shared


def step_schedule(trace: Trace, rates: Rates, topology: Topology) -> list[Stretch]:
    """The stretches of the step in order, with their times. What ``predict_step`` sums up, and what a planner asks for windows."""
    stretches = _stretches(trace, rates, topology)
    schedule = _Schedule(rates, topology, stretches)
    for i in range(len(stretches)):
        schedule.run(i)
    return stretches


def _stretches(trace: Trace, rates: Rates, topology: Topology) -> list[Stretch]:
    """The operations of each stretch with their times; stretches without operations are left out."""
    starts = [time for time, _ in trace.marks]
    found: dict[int, Stretch] = {}
    previous = ""
    for op in trace.ops:
        mark = bisect_right(starts, op.time) - 1
        if mark not in found:
            label = trace.marks[mark][1] if mark >= 0 else ""
            found[mark] = Stretch(label, _PHASES.get(label.partition(" ")[0], op.phase), op.layer)
        kind = op_class(op)
        found[mark].work.append(_Work(op, kind, op_seconds(op, rates, topology), _is_of_parameters(kind, previous)))
        previous = op.name
    return list(found.values())


def _is_of_parameters(kind: OpClass, previous: str) -> bool:
    """Whether FSDP2 made this collective, told by what precedes it: its copy into the message, or (replicas) its reduce-scatter."""
    if kind == "all_gather":
        return previous == _GATHER_OF_PARAMETERS
    if kind == "reduce_scatter":
        return previous == _REDUCTION_OF_GRADIENTS
    return kind == "all_reduce" and "reduce_scatter" in previous


def _turn_by_turn(works: Sequence[_Work]) -> Iterator[_Work]:
    """``works`` in the order in which they are done: where the turns of a loop send messages (the hops of a ring), a turn's messages run
    beside that turn's computation and not beside that of all."""
    for repeats, group in groupby(works, lambda work: work.op.repeats > 1):
        some = list(group)
        turns = [work.op.repeats for work in some if work.kind in COMMUNICATION] if repeats else []
        n = min(turns, default=1)
        if n == 1 or any(work.op.repeats % n for work in some):
            yield from some
            continue
        one = [replace(work, seconds=work.seconds / n) for work in some]
        for _ in range(n):
            yield from one


class _Schedule:
    """The clocks while the step is walked."""

    def __init__(self, rates: Rates, topology: Topology, stretches: list[Stretch]) -> None:
        self.rates, self.topology, self.stretches = rates, topology, stretches
        self.now = 0.0
        self.free: dict[str, float] = {"link": 0.0, "network": 0.0, "sending": 0.0, "receiving": 0.0, "copy_out": 0.0, "copy_in": 0.0}
        self.gathers: list[_Pending] = []
        self.reductions: list[_Pending] = []
        self.transfers: list[_Pending] = []
        self.messages: list[_Pending] = []
        self.copies_out: list[_Pending] = []
        self.copies_in: list[_Pending] = []
        self.gathered: set[int] = set()

    def run(self, i: int) -> None:
        """One stretch."""
        stretch = self.stretches[i]
        stretch.start = self.now
        self._begin(i)
        for work in _turn_by_turn(stretch.work):
            if work.kind in COMMUNICATION:
                stretch.communication += work.seconds
                self._communicate(i, work)
            elif work.kind in COPIES:
                self._copy(i, work)
            else:
                self.now += work.seconds
                stretch.compute += work.seconds
                stretch.recompute += work.seconds if work.op.recompute else 0.0
        self._arrive(i, self.transfers, 0)
        self._arrive(i, self.messages, 0)
        if i == len(self.stretches) - 1:
            self._wait_for_all(i)
        stretch.end = self.now

    def _begin(self, i: int) -> None:
        """Wait for what this stretch needs; start what the next one needs."""
        if self.stretches[i].phase in _ONCE and (i == 0 or self.stretches[i - 1].phase != "update"):
            self._wait_for_all(i)
        self._start_gathers(i, i)
        self._arrive_from(i, self.gathers, before=i + 1 if i in self.gathered else i)
        self._arrive_from(i, self.copies_in, before=i, copy=True)
        self._arrive_from(i, self.copies_out, before=i - 1, copy=True)
        self._start_gathers(i + 1, i)

    def _start_gathers(self, of: int, at: int) -> None:
        """Start the forward pass's gathers of the parameters of stretch ``of``, unless that was done."""
        if of >= len(self.stretches) or of in self.gathered or not self.rates.overlap:
            return
        gathers = [work for work in self.stretches[of].work if work.of_parameters and work.kind == "all_gather"]
        if gathers and self.stretches[of].phase in _FORWARD:
            self.gathered.add(of)
            self.gathers += [_Pending(self._occupy(work), at) for work in gathers]

    def _communicate(self, i: int, work: _Work) -> None:
        if not self.rates.overlap:
            if work.kind != "send":  # a rank sends while it receives
                self._wait(i, self.now + work.seconds)
        elif work.of_parameters and work.kind == "all_gather":
            if i not in self.gathered:
                self.gathers.append(_Pending(self._occupy(work), i))
        elif work.of_parameters:
            if work.kind == "reduce_scatter":
                self._arrive_from(i, self.reductions, before=i)
            ready = self.reductions[-1].done if work.kind == "all_reduce" and self.reductions else self.now
            self.reductions.append(_Pending(self._occupy(work, ready=ready), i))
        elif work.kind in ("send", "receive"):
            # Before another transfer starts, ring attention waits for the one before (backward: for the one before that).
            self._arrive(i, self.transfers, 1 if work.op.phase == "backward" and not work.op.recompute else 0)
            done = self._occupy(work, "sending" if work.kind == "send" else "receiving")
            if work.kind == "receive":
                self.transfers.append(_Pending(done, i))
        elif work.op.in_flight:
            self._arrive(i, self.messages, work.op.in_flight - 1)
            self.messages.append(_Pending(self._occupy(work), i))
        else:
            self._wait(i, self._occupy(work))

    def _copy(self, i: int, work: _Work) -> None:
        stretch = self.stretches[i]
        if work.kind == "copy_out":
            stretch.copy_out += work.seconds
        else:
            stretch.copy_in += work.seconds
        if not self.rates.overlap:
            self._wait(i, self.now + work.seconds, copy=True)
            return
        pending = self.copies_out if work.kind == "copy_out" else self.copies_in
        # In the update the buffer is that of the bucket before, which has to leave it.
        ready = self.copies_out[-1].done if stretch.phase == "update" and work.kind == "copy_in" and self.copies_out else 0.0
        pending.append(_Pending(self._occupy(work, work.kind, ready), i))

    def _occupy(self, work: _Work, channel: str | None = None, ready: float = 0.0) -> float:
        """Put work on its link, behind what is there and not before ``ready``; gives the time at which it is done."""
        if channel is None:
            channel = "network" if self.topology.crosses_nodes(work.op.group_size, stride=work.op.group_stride) else "link"
        self.free[channel] = max(self.free[channel], self.now, ready) + work.seconds
        return self.free[channel]

    def _wait(self, i: int, until: float, *, copy: bool = False) -> None:
        waited = max(0.0, until - self.now)
        if copy:
            self.stretches[i].waited_copy += waited
        else:
            self.stretches[i].waited_communication += waited
        self.now += waited

    def _arrive(self, i: int, pending: list[_Pending], left: int, *, copy: bool = False) -> None:
        """Wait for the oldest until ``left`` are under way."""
        while len(pending) > left:
            self._wait(i, pending.pop(0).done, copy=copy)

    def _arrive_from(self, i: int, pending: list[_Pending], *, before: int, copy: bool = False) -> None:
        """Wait for those that stretches before ``before`` started."""
        while pending and pending[0].stretch < before:
            self._wait(i, pending.pop(0).done, copy=copy)

    def _wait_for_all(self, i: int) -> None:
        self._arrive(i, self.gathers, 0)
        self._arrive(i, self.reductions, 0)
        self._arrive(i, self.transfers, 0)
        self._arrive(i, self.copies_out, 0, copy=True)
        self._arrive(i, self.copies_in, 0, copy=True)
