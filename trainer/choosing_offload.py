"""What ``memory.offload_optimizer: auto`` means for a configuration: none or host, found by planning both. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable

from memory_mgmt.plan import MemoryPlan
from trainer.config import RunConfig

FASTER = 0.99
"""The states go to host memory for speed only where the step takes less than this share of the time."""


def resolve_offload(config: RunConfig, plan: Callable[[RunConfig], MemoryPlan]) -> tuple[RunConfig, MemoryPlan]:
    """``config`` with ``memory.offload_optimizer`` none or host where it was auto, and ``plan`` of it.

    host is taken where the step does not fit without it but does with it, where neither fits and it lowers the peak, or where both fit
    and less recomputation makes the step faster. A CPU's host memory is the very memory that it would save: none.
    """
    here, *others = places(config)
    at_first = plan(here)
    if not others or at_first.device == "cpu" or (at_first.fits and not _may_be_faster(config, at_first)):
        return here, at_first
    there = others[0]
    offloaded = plan(there)
    return (there, offloaded) if _better(offloaded, at_first) else (here, at_first)


def places(config: RunConfig) -> list[RunConfig]:
    """``config`` with each place that ``memory.offload_optimizer`` may mean; the device first. Only the states of torch's AdamW can be
    moved, and not in a fused update."""
    if config.memory.offload_optimizer == "auto" and (not config.optim.is_torch_adamw or config.optim.is_fused):
        return [_with(config, "none")]
    auto = config.memory.offload_optimizer == "auto"
    return [_with(config, "none"), _with(config, "host")] if auto else [config]


def as_planned(config: RunConfig, plan: MemoryPlan) -> RunConfig:
    """``config`` with what ``plan`` decided about the optimizer's states: what a run builds, and what is traced again."""
    return _with(config, plan.offload_optimizer)


def _with(config: RunConfig, where: str) -> RunConfig:
    return config.model_copy(update={"memory": config.memory.model_copy(update={"offload_optimizer": where})})


def _may_be_faster(config: RunConfig, plan: MemoryPlan) -> bool:
    """Whether more room on the device could save time: where the planner chooses, and had to recompute or to wait for copies."""
    p = plan.prediction
    return config.memory.recompute == "auto" and p is not None and p.recompute_seconds + p.exposed_copy_seconds > 0


def _better(offloaded: MemoryPlan, here: MemoryPlan) -> bool:
    if offloaded.fits != here.fits:
        return offloaded.fits
    if not here.fits:
        return offloaded.host_fits and offloaded.peak_bytes < here.peak_bytes
    after, before = offloaded.prediction, here.prediction
    return after is not None and before is not None and after.step_seconds < FASTER * before.step_seconds
