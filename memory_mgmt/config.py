"""Settings of the memory budget: what is recomputed and in which tile sizes. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from models.config import PositiveInt, Section


class MemoryConfig(Section):
    """Residence of activations on one rank."""

    budget_gib: float | None = Field(default=None, gt=0)
    """Bytes one rank may use, in GiB; a plan above it is refused before the run starts. null: no limit."""
    recompute: Literal["none", "block"] = "none"
    """block: keep only each block's input and recompute its inside in the backward pass."""
    loss_tile_tokens: PositiveInt = 4096
    """Tokens whose logits exist at the same time."""
    ffn_tile_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens per feed-forward tile, recomputed in backward; 0 processes the whole shard at once."""
    memory_tile_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens per tile of a memory layer, recomputed in backward with the state carried; 0 processes the whole shard at once."""
