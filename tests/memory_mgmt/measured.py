"""What torch really keeps and really allocates, for comparison with arithmetic."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def kept_bytes(run: Callable[[], torch.Tensor]) -> int:
    """Bytes that ``run()`` leaves allocated while its result lives, the result excluded: what waits for backward. Exact."""
    gc.collect()  # not in the middle of it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    return sum(event.nbytes() for event in _memory_events(recorded)) - result.nbytes


def peak_allocated(run: Callable[[], Any]) -> int:
    """The most that torch's CPU allocator handed out at one moment during ``run()``, above what was held before: exact."""
    gc.collect()  # what others left is not freed in between
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    live = peak = 0
    for event in sorted(_memory_events(recorded), key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _memory_events(recorded: profile) -> list[Any]:
    kineto = recorded.profiler.kineto_results  # type: ignore[union-attr]
    return [event for event in kineto.events() if event.name() == "[memory]"]
