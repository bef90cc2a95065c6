"""What ``longstride plan --timeline`` and a run write about their memory plan. Imports no torch.

Every file appears whole or not at all (``run_dir.write_atomic``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from memory_mgmt.devices import device_named
from memory_mgmt.plan import MemoryPlan
from memory_mgmt.trace import Trace
from memory_mgmt.traced_plan import step_addresses
from models.errors import UserError
from trainer.choosing_offload import as_planned
from trainer.config import RunConfig
from trainer.planning import ADDRESS_SECONDS, target_of, this_machine
from trainer.run_dir import write_atomic
from trainer.tracing import TraceRequest, kept, trace_step

PLAN, PICTURE, PAGE = "memory_plan.json", "memory_timeline.png", "memory_timeline.html"


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


def planned_trace(config: RunConfig, plan: MemoryPlan, device_name: str | None = None) -> Trace:
    """The traced step behind ``plan`` (``planning.plan_run`` of the same arguments), from the cache of traces where it is there.

    Raises UserError for a plan made from formulas, and for a step that cannot be traced.
    """
    if config.memory.plan == "estimate":
        raise UserError("--timeline: draws a traced step, and memory.plan=estimate plans by formulas; leave memory.plan at trace")
    return trace_step(_planned_request(config, plan, device_name))


def kept_trace(config: RunConfig, plan: MemoryPlan) -> Trace | None:
    """The traced step behind ``plan`` of this machine's device where it is kept from when the plan was made; traces nothing."""
    return kept(_planned_request(config, plan, None))


def _planned_request(config: RunConfig, plan: MemoryPlan, device_name: str | None) -> TraceRequest:
    """What ``planning.plan_run`` asked for: a policy of its own only where it chose one."""
    device = this_machine(config.train.device) if device_name is None else device_named(device_name)
    return target_of(as_planned(config, plan), device).request(plan.policy if config.memory.recompute == "auto" else None)


def write_plan_files(trace: Trace, plan: MemoryPlan, directory: Path | str) -> tuple[Path, Path, Path]:
    """``memory_plan.json`` and the timeline with planned addresses, in ``directory``, which is made if it does not exist.

    Raises UserError when it cannot be made or written.
    """
    offsets, addresses = step_addresses(trace, ADDRESS_SECONDS)
    plan = replace(plan, addresses=addresses)  # of the very addresses that the page shows
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(directory / PLAN, plan.to_json().encode())
        return directory / PLAN, *write_timeline(trace, plan, directory, offsets)
    except OSError as error:
        raise UserError(f"--timeline: cannot write in {directory}: {error.strerror or error}") from None
