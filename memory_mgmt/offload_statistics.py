"""What an offload store did in a step, for people and for the check against the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Copied(NamedTuple):
    """Bytes copied in each direction."""

    to_host: int
    to_device: int


@dataclass(frozen=True)
class OffloadStatistics:
    """What a store did since the last reset."""

    peak_bytes: int
    """Most host memory in use at once: parked tensors, and what is kept there."""
    copied: Copied
    waited_seconds: float
    """Time in which the computation stood still for copies."""
    disk_bytes: int
    """Bytes written to the disk tier."""
    pageable_reason: str
    """Why host memory is not page-locked; empty if it is."""
