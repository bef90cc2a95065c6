"""Which memories ``parallel.memory_exchange`` can serve, from the settings alone. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.memory_config import AFFINE, HEADWISE

if TYPE_CHECKING:
    from trainer.config import RunConfig


def refusal(config: RunConfig) -> str | None:
    """Why the exchange that ``config`` names is not possible, with the remedy; None where it is, or is still to be chosen."""
    exchange, memory = config.parallel.memory_exchange, config.model.memory
    if exchange in ("auto", "states"):
        return None
    asked, remedy = f"parallel.memory_exchange {exchange}", "set parallel.memory_exchange=states"
    if memory.around_stack or "memory" not in config.model.layer_kinds:
        return f"{asked}: no layer of model.layers is a memory that ranks could share; {remedy}"
    kind = f"model.memory.kind {memory.kind}" + (f" with attach {memory.attach}" if memory.attach == "mac" else "")
    if exchange == "ring" and memory.kind not in AFFINE:
        return f"{asked} sends the columns of affine states ({', '.join(AFFINE)}); {kind} has another state: {remedy}"
    if exchange == "ulysses" and (memory.kind not in HEADWISE or memory.attach == "mac"):
        return f"{asked} deals out heads that do not meet ({', '.join(HEADWISE)}, not with attach mac); those of {kind} do: {remedy}"
    ranks = config.parallel.cp * config.parallel.tp
    if exchange == "ulysses" and config.model.memory_heads < ranks:
        return (
            f"{asked} gives every one of {ranks} ranks (parallel.cp x tp) a memory head, and model.memory has "
            f"{config.model.memory_heads}; {remedy}, or model.memory.n_heads={ranks}"
        )
    return None
