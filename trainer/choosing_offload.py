"""What ``auto`` means for ``memory.offload_optimizer`` and ``memory.offload_parameters``: none or host, found by planning each.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable

from memory_mgmt.plan import MemoryPlan
from trainer.config import RunConfig

FASTER = 0.99
"""Something goes to host memory for speed only where the step takes less than this share of the time."""


def resolve_offload(
    config: RunConfig, plan: Callable[[RunConfig], MemoryPlan], room: int | None = None, parameters: int = 0
) -> tuple[RunConfig, MemoryPlan]:
    """``config`` with the optimizer's states and the parameters where they fit best, as far as it leaves that open, and ``plan`` of it.

    Host memory is taken where the step does not fit without it but does with it, where neither fits and it lowers the peak, or where both
    fit and less recomputation makes the step faster; the states first, then the parameters as well. A CPU's host memory is the very
    memory that it would save: none. ``room`` and ``parameters``: as of ``places``.
    """
    best, *others = places(config, room, parameters)
    found = plan(best)
    for other in others:
        if found.device == "cpu" or (found.fits and not _may_be_faster(config, found)):
            break
        offloaded = plan(other)
        if _better(offloaded, found):
            best, found = other, offloaded
    return best, found


def places(config: RunConfig, room: int | None = None, parameters: int = 0) -> list[RunConfig]:
    """``config`` with each place that its settings may mean; the device first. States cannot be moved in a fused update, and formulas
    know those of torch's AdamW only; parameters are where the states of torch's AdamW are. Those that leave more of the model's
    ``parameters`` and what belongs to them on a device than its ``room`` in bytes are left out, while there is another: no policy makes
    them fit, and to find that takes traces."""
    memory, plain = config.memory, config.optim.is_torch_adamw
    movable = not config.optim.is_fused and (plain or memory.plan == "trace")
    states = ["none", *(["host"] if movable else [])] if memory.offload_optimizer == "auto" else [memory.offload_optimizer]
    where = ["none", *(["host"] if plain else [])] if memory.offload_parameters == "auto" else [memory.offload_parameters]
    pairs = [(s, p) for p in where for s in states if p == "none" or s == "host"]
    found = [_with(config, *pair) for pair in pairs]
    if room is not None and movable and plain:
        ranks = config.parallel.dp_shard * config.parallel.cp * config.parallel.tp
        while len(found) > 1 and _least_bytes(found[0]) * parameters > room * ranks:
            del found[0]
    return found


def _least_bytes(config: RunConfig) -> int:
    """Of torch's AdamW and float32 weights, per parameter that a rank holds: gradients, and what is not in host memory."""
    memory = config.memory
    return 4 + 4 * (memory.offload_parameters != "host") + 8 * (memory.offload_optimizer != "host")


def as_planned(config: RunConfig, plan: MemoryPlan) -> RunConfig:
    """``config`` with what ``plan`` decided about states and parameters: what a run builds, and what is traced again."""
    return _with(config, plan.offload_optimizer, plan.offload_parameters)


def _with(config: RunConfig, states: str, parameters: str) -> RunConfig:
    update = {"offload_optimizer": states, "offload_parameters": parameters}
    return config.model_copy(update={"memory": config.memory.model_copy(update=update)})


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
