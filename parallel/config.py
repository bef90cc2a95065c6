"""Settings of parallelism: how many ranks along which mesh axis. Imports no torch."""

from __future__ import annotations

from typing import Literal

from models.config import PositiveInt, Section


class ParallelConfig(Section):
    """Degrees of the mesh axes; their product is the number of ranks."""

    dp_replicate: PositiveInt = 1
    """Data-parallel replicas that each hold a whole copy of the (sharded) parameters."""
    dp_shard: PositiveInt = 1
    """Data-parallel ranks over which parameters, gradients and optimizer states are sharded."""
    cp: PositiveInt = 1
    """Sequence-parallel (context-parallel) ranks that share one sequence; parameters are sharded over dp_shard x cp."""
    layout: Literal["auto", "contiguous", "zigzag"] = "auto"
    """Which tokens a sequence-parallel rank holds; auto: zigzag when the model has full attention, else contiguous."""
    timeout_seconds: PositiveInt = 600
    """A collective that waits longer than this fails instead of hanging."""
