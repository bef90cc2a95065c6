"""What torch really keeps and really allocates, for comparison with arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def saved_bytes(run: Callable[[], Any], module: torch.nn.Module) -> int:
    """Bytes of the distinct storages that autograd keeps for backward while ``run()``'s result lives; parameters excluded."""
    parameters = {p.untyped_storage()._cdata for p in module.parameters()}
    sizes: dict[int, int] = {}
    held = []  # keeps every storage alive, so that no address is counted twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(sizes.values())


def peak_allocated(run: Callable[[], Any]) -> int:
    """The most that torch's CPU allocator handed out at one moment during ``run()``, above what was held before: exact."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    kineto = recorded.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((e for e in kineto.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    live = peak = 0
    for event in events:
        live += event.nbytes()
        peak = max(peak, live)
    return peak
