"""A ``MemoryPlan`` from a traced step: who holds what at the peak, the peak of every stretch, and what a process holds beside its tensors.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from memory_mgmt.address_planning import plan_addresses
from memory_mgmt.address_problem import Lifetime
from memory_mgmt.arena_recording import ALIGNMENT, SMALLEST_BYTES
from memory_mgmt.devices import MIB, Device
from memory_mgmt.overheads import SEGMENT, fixed_terms, live_peak, reserved_by_streams, resident_peak
from memory_mgmt.plan import Addresses, Kind, MemoryPlan, Moment, Term, gib
from memory_mgmt.trace import Trace, TracedBuffer

METHOD = "traced step"
REGION_SECONDS = 0.1
"""Spent on the height of the arena's region in a plan; the planner asks for it with every policy that it tries."""
NOT_COUNTED = ("writing a checkpoint (an asynchronous save copies parameters and optimizer states to host memory)",)
TIGHT_FACTOR = 2.0
"""A CPU rank gives freed blocks back when the limit is below this times the peak; giving them back costs time (host_allocator.py)."""
MMAP_THRESHOLD_MAX = 32 * MIB
"""glibc's mmap threshold once tensors of that size have been freed; below it blocks come from the heap."""
HOLES_SHARE, HOLES_SHARE_LEAST = 0.7, 0.1
"""Holes of an ordinary heap at most and at least, as a share of the small blocks that come and go in a step. Small objects that stay
(oneDNN's kernels among them) split the free ranges, so it depends on the run and grows over its steps: 0.1 to 0.26 were measured in the
first step, 0.39 to 0.63 within six, 0.67 after the 160 of the quickstart. A limit below twice the peak leaves no room for them
(``TIGHT_FACTOR``)."""
MMAP_THRESHOLD_FIXED = MIB
"""The threshold that ``host_allocator.return_freed_memory`` sets."""

_KINDS: dict[str, tuple[str, Kind]] = {
    "parameter": ("parameters", "parameters"),
    "gradient": ("gradients", "gradients"),
    "optimizer": ("optimizer states", "optimizer"),
    "loss": ("loss", "loss"),
    "communication": ("gathered parameters and messages", "communication"),
    "workspace": ("scratch memory of a kernel", "transient"),
    "state": ("memory states", "activations"),
    "batch": ("batch", "batch"),
}
_PARTS = {"mixer": "attention or memory", "ffn": "feed-forward", "norm1": "norms", "norm2": "norms", "": "residual stream"}


@dataclass(frozen=True)
class Limits:
    """What one rank may take: ``budget_bytes`` as configured, ``device_bytes`` as the device has; None: not limited, not known."""

    budget_bytes: int | None
    device_bytes: int | None

    @property
    def bytes(self) -> int | None:
        """The smaller one."""
        known = [limit for limit in (self.budget_bytes, self.device_bytes) if limit is not None]
        return min(known) if known else None


def plan_of_trace(
    trace: Trace, device: Device, ranks: int, limits: Limits, *, prefetched_bytes: int = 0, correction: float = 1.0, arena: bool = False
) -> MemoryPlan:
    """The plan of one rank that runs the traced step on ``device``.

    ``prefetched_bytes``: batches made ready beside the one in the trace, where they share memory with it (CPU). A CPU rank whose
    limit is below twice the peak is planned to give freed blocks back (``return_freed_blocks``). ``correction``: how many times the plan a
    run was measured to take when it ran out of memory. ``arena``: tensors are served at planned addresses. On CPU that leaves about as
    little beside them as giving freed blocks back; on CUDA the region and what the caching allocator reserves for the rest are counted.
    """
    terms = _terms(trace)
    if prefetched_bytes:
        terms.append(Term("batches made ready", "batch", prefetched_bytes, prefetched_bytes, "of the steps that follow"))
    terms += fixed_terms(device, ranks, int(trace.notes.get("onednn_kernels", 0)))
    tight = False
    beside, why = _beside(trace, device, tight=arena)
    if not device.is_cuda and not arena:
        tight = limits.bytes is not None and (sum(t.bytes for t in terms) + beside) * TIGHT_FACTOR > limits.bytes
        if tight:
            beside, why = _beside(trace, device, tight=True)
    if beside:
        terms.append(Term("reserved but not used" if device.is_cuda else "heap holes", "overhead", beside, beside, why))
    if correction > 1:
        more = int((correction - 1) * sum(term.bytes for term in terms))
        terms.append(Term("measured above the plan", "overhead", more, more, "this run ran out of memory before"))
    constant = sum(term.bytes for term in terms) - trace.peak()[0]
    ordinary = not (device.is_cuda or arena or tight)
    spread = _holes(trace, HOLES_SHARE) - _holes(trace, HOLES_SHARE_LEAST) if ordinary else 0
    return MemoryPlan(
        method=METHOD,
        device=device.name,
        ranks=ranks,
        terms=tuple(terms),
        moments=tuple(Moment(label, live + constant) for label, live in stretches(trace)),
        budget_bytes=limits.budget_bytes,
        device_bytes=limits.device_bytes,
        return_freed_blocks=tight,
        not_counted=(*NOT_COUNTED, *([_spread_text(spread)] if spread else [])),
        spread_bytes=spread,
        host_bytes=trace.peak("host")[0],
    )


def _spread_text(spread: int) -> str:
    return (
        f"how the heap's holes fall in one run, which may hold up to {gib(spread)} less in its first steps; "
        "memory.arena, or a budget below twice the peak, leaves next to none"
    )


def step_addresses(trace: Trace, time_limit: float) -> tuple[dict[int, int], Addresses]:
    """Planned addresses of all device buffers that begin and end within the step: byte offset by ``TracedBuffer.id``, and the outcome.

    What outlives the step (parameters, states) has its own place for the whole run and is not planned.
    """
    inside = _inside(trace)
    lifetimes = [Lifetime(b.id, b.lower, b.upper, b.size) for b in inside]
    found = plan_addresses(lifetimes, time_limit=time_limit, alignment=ALIGNMENT[trace.device])
    status = "optimal" if found.optimal else f"at most {found.ratio - 1:.2%} above the best there can be"
    offsets = {buffer.id: offset for buffer, offset in zip(inside, found.offsets, strict=True)}
    return offsets, Addresses(found.height, found.lower_bound, status, found.method, found.seconds)


def stretches(trace: Trace) -> list[tuple[str, int]]:
    """(label, most live bytes) of every stretch of the step, in order; a label that comes again counts with the first."""
    most: dict[str, int] = {}
    points, index, live = trace.curve(), 0, 0
    for i, (start, label) in enumerate(trace.marks):
        end = trace.marks[i + 1][0] if i + 1 < len(trace.marks) else trace.end
        while index < len(points) and points[index][0] < start:
            live, index = points[index][1], index + 1
        top = live
        while index < len(points) and points[index][0] < end:
            live, index = points[index][1], index + 1
            top = max(top, live)
        most[label] = max(most.get(label, 0), top)
    return list(most.items())


def _beside(trace: Trace, device: Device, tight: bool) -> tuple[int, str]:
    """Bytes held above the live tensors at the peak, and why."""
    live, buffers = trace.peak()[0], trace.of("device")
    if device.is_cuda and tight:
        held, why = _with_arena(trace)
        return max(0, held - live), why
    if device.is_cuda:
        text = "the caching allocator with expandable segments, a pool per stream, simulated on the traced step"
        return max(0, reserved_by_streams(buffers) - live), text
    if tight:
        held = resident_peak(buffers, MMAP_THRESHOLD_FIXED)
        return max(0, held - live), f"the C library's heap of blocks below {MMAP_THRESHOLD_FIXED // MIB} MiB, simulated"
    text = f"the C library's heap of blocks below {MMAP_THRESHOLD_MAX // MIB} MiB: near the most that was measured, not derived"
    return _holes(trace, HOLES_SHARE), text


def _with_arena(trace: Trace) -> tuple[int, str]:
    """Bytes reserved on CUDA with the arena, and why: its region for the large tensors of a step and the caching allocator's segments for
    the rest; no less than the segments for all, which the steps need that are watched first."""
    large = [buffer for buffer in _inside(trace) if buffer.size >= SMALLEST_BYTES["cuda"]]
    served = {buffer.id for buffer in large}
    lifetimes = [Lifetime(b.id, b.lower, b.upper, b.size) for b in large]
    region = plan_addresses(lifetimes, time_limit=REGION_SECONDS, alignment=ALIGNMENT["cuda"]).height
    held = -(-region // SEGMENT) * SEGMENT + reserved_by_streams(b for b in trace.of("device") if b.id not in served)
    watched = reserved_by_streams(trace.of("device"))
    text = f"simulated on the traced step: {gib(held)} with the arena's region of {gib(region)}, {gib(watched)} in the steps watched first"
    return max(held, watched), text


def _inside(trace: Trace) -> list[TracedBuffer]:
    """Device buffers that begin and end within the step."""
    return [b for b in trace.of("device") if b.size and 0 < b.lower < b.upper < trace.end]


def _holes(trace: Trace, share: float) -> int:
    """Bytes of an ordinary heap's holes that are a ``share`` of the small blocks; never less than what one simulated step leaves."""
    live, buffers = trace.peak()[0], trace.of("device")
    small = [b for b in buffers if b.size < MMAP_THRESHOLD_MAX and b.lower > 0 and b.upper < trace.end]
    return max(0, resident_peak(buffers, MMAP_THRESHOLD_MAX) - live, int(share * live_peak(small)))


def _terms(trace: Trace) -> list[Term]:
    """What is live at the peak, grouped by owner, and the most each group ever holds."""
    _, time = trace.peak()
    groups: dict[tuple[str, Kind], list[TracedBuffer]] = {}
    for buffer in trace.of("device"):
        groups.setdefault(_owner(buffer), []).append(buffer)
    terms = []
    for (name, kind), buffers in groups.items():
        now = [buffer for buffer in buffers if buffer.lower <= time < buffer.upper]
        terms.append(Term(name, kind, sum(b.size for b in now), live_peak(buffers), _counted(now)))
    return sorted(terms, key=lambda term: -term.bytes)


def _owner(buffer: TracedBuffer) -> tuple[str, Kind]:
    if buffer.kind in _KINDS:
        return _KINDS[buffer.kind]
    part = _part(buffer.module)
    if buffer.kind == "skeletal":
        return f"kept: {part}", "activations"
    return f"made and freed: {part}" if buffer.phase in ("forward", "backward") else f"made and freed: {buffer.phase}", "transient"


def _part(module: str) -> str:
    """``blocks.3.ffn.w_up`` -> feed-forward."""
    words = module.split(".")
    if words[0] != "blocks":
        return words[0] or "step"
    return _PARTS.get(words[2] if len(words) > 2 else "", words[-1])


def _counted(buffers: Iterable[TracedBuffer]) -> str:
    """``32 x 2.00 GiB + 5 smaller``."""
    sizes = sorted((buffer.size for buffer in buffers), reverse=True)
    if not sizes:
        return ""
    equal = sizes.count(sizes[0])
    rest = len(sizes) - equal
    return f"{equal} x {gib(sizes[0])}" + (f" + {rest} smaller" if rest else "")
