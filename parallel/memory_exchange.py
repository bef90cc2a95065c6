"""Which memories can cross ranks by which ``parallel.memory_exchange``, from their traits; what cannot is refused by name."""

from __future__ import annotations

from models.errors import UserError
from models.memory.protocol import MemoryModule
from parallel.config import MemoryExchange


def refused_exchange(exchange: MemoryExchange, memory: MemoryModule, ranks: int) -> str | None:
    """Why ``memory`` cannot be shared by ``ranks`` ranks through ``exchange``; None where it can."""
    traits = memory.traits
    if exchange == "ring" and traits.transition not in ("affine_dense", "affine_diag"):
        return f"the state of {type(memory).__name__} is no affine function of the one before, so its columns cannot go around alone"
    if exchange == "ulysses" and traits.head_splittable == 1:
        return f"{type(memory).__name__} has no heads that do not meet, or only one"
    if exchange == "ulysses" and traits.head_splittable < ranks:
        return f"{type(memory).__name__} has {traits.head_splittable} heads, fewer than the {ranks} ranks of a sequence"
    return None


def check_exchange(memory: MemoryModule, exchange: MemoryExchange, ranks: int) -> None:
    """Raise UserError where ``refused_exchange`` has a reason."""
    if refused := refused_exchange(exchange, memory, ranks):
        raise UserError(f"parallel.memory_exchange {exchange}: {refused}; set parallel.memory_exchange=states")
