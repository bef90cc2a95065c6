"""What ``longstride plan --timeline`` and a run write about their memory plan. Imports no torch.

Every file appears whole or not at all (``run_dir.write_atomic``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from memory_mgmt.address_planning import plan_addresses
from memory_mgmt.address_problem import Lifetime
from memory_mgmt.devices import DEVICES
from memory_mgmt.plan import Addresses, MemoryPlan
from memory_mgmt.trace import Trace
from models.errors import UserError
from trainer.config import RunConfig
from trainer.data.tokenizers import load_tokenizer
from trainer.planning import model_vocab_size
from trainer.run_dir import write_atomic
from trainer.tracing import TraceRequest, trace_step

PLAN, PICTURE, PAGE = "memory_plan.json", "memory_timeline.png", "memory_timeline.html"
ADDRESS_SECONDS = 5.0
"""Longest time spent on planning addresses for the page."""
_ALIGNMENT = {"cpu": 64, "cuda": 512}
"""Bytes; what torch's allocators align tensors to."""


def write_timeline(trace: Trace, plan: MemoryPlan, directory: Path | str, offsets: Mapping[int, int] | None = None) -> tuple[Path, Path]:
    """Write the memory timeline of a traced step as a picture and as a page; returns their paths.

    ``offsets``: planned address in bytes by ``TracedBuffer.id``, for the page's view of addresses. Raises OSError where ``directory``
    cannot be written and ValueError for a trace without device buffers.
    """
    from memory_mgmt.timeline_html import timeline_html
    from memory_mgmt.timeline_png import timeline_png

    picture, page = Path(directory) / PICTURE, Path(directory) / PAGE
    write_atomic(picture, timeline_png(trace, plan))
    write_atomic(page, timeline_html(trace, plan, offsets).encode())
    return picture, page


def planned_trace(config: RunConfig, plan: MemoryPlan) -> Trace:
    """The traced step behind ``plan``, from the cache of traces where it is there.

    Raises UserError for a plan made from formulas, and for a step that cannot be traced.
    """
    if config.memory.plan == "estimate":
        raise UserError("--timeline: draws a traced step, and memory.plan=estimate plans by formulas; leave memory.plan at trace")
    device = DEVICES.get(plan.device)
    vocab_size = model_vocab_size(config, load_tokenizer(config.data.tokenizer).vocab_size)
    device_type = "cuda" if device is None or device.is_cuda else "cpu"  # a GPU that the table does not know keeps its own name
    return trace_step(TraceRequest(config, vocab_size, device_type, policy=plan.policy))


def step_addresses(trace: Trace, time_limit: float = ADDRESS_SECONDS) -> tuple[dict[int, int], Addresses]:
    """Planned addresses of all device buffers that begin and end within the step: byte offset by ``TracedBuffer.id``, and the outcome.

    What outlives the step (parameters, states) has its own place for the whole run and is not planned.
    """
    inside = [b for b in trace.of("device") if b.size and 0 < b.lower < b.upper < trace.end]
    lifetimes = [Lifetime(b.id, b.lower, b.upper, b.size) for b in inside]
    found = plan_addresses(lifetimes, time_limit=time_limit, alignment=_ALIGNMENT[trace.device])
    status = "optimal" if found.optimal else f"at most {found.ratio - 1:.2%} above the best there can be"
    offsets = {buffer.id: offset for buffer, offset in zip(inside, found.offsets, strict=True)}
    return offsets, Addresses(found.height, found.lower_bound, status, found.method, found.seconds)


def write_plan_files(trace: Trace, plan: MemoryPlan, directory: Path | str) -> tuple[Path, Path, Path]:
    """``memory_plan.json`` and the timeline with planned addresses, in ``directory``, which is made if it does not exist.

    Raises UserError when it cannot be made or written.
    """
    offsets, addresses = step_addresses(trace)
    plan = plan if plan.addresses is not None else replace(plan, addresses=addresses)
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(directory / PLAN, plan.to_json().encode())
        return directory / PLAN, *write_timeline(trace, plan, directory, offsets)
    except OSError as error:
        raise UserError(f"--timeline: cannot write in {directory}: {error.strerror or error}") from None
