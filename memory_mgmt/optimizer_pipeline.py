"""Bucket after bucket of optimizer states to the device, through an update, and back: two are on the device at a time.

While one is updated the next one comes and the one before leaves; on CUDA with streams of their own (``offload_copies.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from memory_mgmt.offload_copies import Copies


class Bucket(Protocol):
    """What travels at a time."""

    @property
    def host(self) -> list[Tensor]:
        """Where its bytes are in host memory: flat uint8 tensors."""
        ...

    @property
    def nbytes(self) -> int:
        """Of ``host`` together."""
        ...


B = TypeVar("B", bound=Bucket)


def through(copies: Copies, buckets: Sequence[B], device: torch.device, update: Callable[[B, Tensor], None]) -> Any:
    """``update(bucket, its bytes on the device)`` for every bucket, in order; what it writes there goes back. Gives the event after which
    the last bytes are back in host memory. The computing stream waits for that, the host does not."""
    size = max((bucket.nbytes for bucket in buckets), default=0)
    buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in buckets[:2]]
    left: list[Any] = []

    def fetch(i: int, after: Any) -> Any:
        return copies.to_device(buckets[i].host, buffers[i % 2][: buckets[i].nbytes], after)

    landed = fetch(0, None) if buckets else None
    for i, bucket in enumerate(buckets):
        arrived, buffer = landed, buffers[i % 2][: bucket.nbytes]
        if i + 1 < len(buckets):  # into the buffer that the bucket before this one is leaving
            landed = fetch(i + 1, left[-1] if left else None)
        copies.hold(arrived, timed=True)
        update(bucket, buffer)
        left.append(copies.to_host(buffer, bucket.host))
    for event in left[-2:]:  # the buffers are freed with this call
        copies.hold(event, timed=True)
    return left[-1] if left else None
