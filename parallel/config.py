"""Settings of parallelism: how many ranks along which mesh axis. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from models.config import PositiveInt, Section

AUTO = 0
"""A degree that ``trainer/settling.py`` is to choose; written ``auto``."""


def _read_auto(value: Any) -> Any:
    if isinstance(value, str) and value != "auto":
        raise ValueError("neither a whole number nor auto")
    return AUTO if value == "auto" else value


Degree = Annotated[int, Field(ge=0), BeforeValidator(_read_auto)]


class ParallelConfig(Section):
    """Degrees of the mesh axes; their product is the number of ranks."""

    ranks: PositiveInt | None = None
    """Number of ranks where a degree is auto; null: what the launcher or --nproc says. With all degrees given: must be their product."""
    dp_replicate: Degree = 1
    """Data-parallel replicas that each hold a whole copy of the (sharded) parameters; auto: chosen by the memory plan."""
    dp_shard: Degree = 1
    """Data-parallel ranks over which parameters, gradients and optimizer states are sharded; auto: chosen by the memory plan. Where a
    data-parallel degree is auto, train.grad_accum counts a step's passes as if that degree were 1; chosen ranks share them."""
    cp: Degree = 1
    """Sequence-parallel (context-parallel) ranks that share one sequence; parameters are sharded over dp_shard x cp. auto: chosen by
    the memory plan."""
    layout: Literal["auto", "contiguous", "zigzag"] = "auto"
    """Which tokens a sequence-parallel rank holds; auto: zigzag when the model has full attention, else contiguous."""
    timeout_seconds: PositiveInt = 600
    """A collective that waits longer than this fails instead of hanging."""

    @property
    def chosen_by_plan(self) -> tuple[str, ...]:
        """Names of the degrees that are ``auto``."""
        return tuple(name for name in ("dp_replicate", "dp_shard", "cp") if getattr(self, name) == AUTO)
