"""How long this rank waits for the others: the rest of a step is its own work, by which a slow rank is told.

All ranks of a step take equally long, because each waits for the slowest; what differs is how much of it they wait. Collectives of gloo
block in torch's ``Work.wait``, which is timed here. NCCL's do not block the process: there the time is that of a fixed product.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch._C._distributed_c10d import Work

_PRODUCT = 2048
_PRODUCTS = 8


class WaitClock:
    """Seconds that the thread which uses it as a context manager has waited for other ranks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[WaitClock]:
        """Time waits from here to the end. One clock at a time."""
        wait, own_thread = Work.wait, threading.get_ident()

        def timed(work: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != own_thread:  # a save in the background waits for itself
                return wait(work, *args, **kwargs)
            started = time.perf_counter()
            try:
                return wait(work, *args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        Work.wait = timed  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield self
        finally:
            Work.wait = wait  # pyright: ignore[reportAttributeAccessIssue]


def product_seconds(device: torch.device) -> float:
    """Seconds of a fixed piece of work on a CUDA device, measured there: what tells a throttled GPU from its neighbours."""
    a = torch.ones(_PRODUCT, _PRODUCT, dtype=torch.bfloat16, device=device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(_PRODUCTS):
        torch.mm(a, a)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000
