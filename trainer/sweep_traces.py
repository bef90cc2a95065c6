"""Trace the steps of a sweep ahead of its plans: many steps per process, and as many processes as there are cores. Imports no torch.

A process that traces spends most of its time on starting; one per combination would make a sweep take minutes longer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from memory_mgmt.devices import device_named
from models.errors import UserError
from trainer.planning import target_of, this_machine
from trainer.tracing import TraceRequest, trace_steps

if TYPE_CHECKING:
    from trainer.sweep import Combination

MAX_PROCESSES = 4


def trace_ahead(combinations: Sequence[Combination]) -> None:
    """Put the traces that the combinations need into the cache of traces; what cannot be traced is left for its plan to report."""
    requests: list[TraceRequest] = []
    for config, name in combinations:
        if config.memory.plan == "trace" and "auto" not in (
            config.memory.recompute,
            config.memory.offload_optimizer,
            config.memory.offload_parameters,
        ):
            # What auto traces depends on what it finds.
            with contextlib.suppress(UserError):
                request = target_of(config, this_machine(config.train.device) if name is None else device_named(name)).request()
                if request not in requests:  # h100 and h200 share a trace
                    requests.append(request)
    trace_ahead_of(requests)


def trace_ahead_of(requests: Sequence[TraceRequest]) -> None:
    """Put these traces into the cache, several processes at a time."""
    shares = _shares(requests, min(MAX_PROCESSES, os.cpu_count() or 1))
    with ThreadPoolExecutor(max(1, len(shares))) as pool:
        list(pool.map(_trace, shares))


def _shares(requests: Sequence[TraceRequest], processes: int) -> list[list[TraceRequest]]:
    """The requests dealt out, those for one type of device together."""
    shares = []
    for device_type in ("cpu", "cuda"):
        alike = [request for request in requests if request.device_type == device_type]
        shares += [part for start in range(processes) if (part := alike[start::processes])]
    return shares


def _trace(requests: Sequence[TraceRequest]) -> None:
    with contextlib.suppress(UserError):
        trace_steps(requests)
