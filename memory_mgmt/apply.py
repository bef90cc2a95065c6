"""Put the memory settings of a run onto a model: what is recomputed, and in which tiles. Before FSDP is applied."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memory_mgmt.config import MemoryConfig
from memory_mgmt.tiles import tiled
from models.memory.protocol import MemoryModule
from models.transformer import Block, Transformer, call


def recomputed(body: Callable[..., Any], *args: Any) -> Any:
    """Run ``body`` keeping only its inputs; its inside is computed again in the backward pass."""
    # The model draws no random numbers, so their state need not be saved and restored around every block.
    return checkpoint(body, *args, use_reentrant=False, preserve_rng_state=False)


def _ffn_in_tiles(tile_tokens: int, module: nn.Module, x_BTC: Tensor) -> Tensor:
    return tiled(module, x_BTC, tile_tokens)


def apply_memory_settings(model: Transformer, config: MemoryConfig) -> None:
    """Set every seam that ``config`` speaks of; calling it again replaces the earlier settings."""
    model.loss_tile_tokens = config.loss_tile_tokens
    for module in model.blocks:
        block = cast(Block, module)
        block.run = recomputed if config.recompute == "block" else call
        block.run_ffn = partial(_ffn_in_tiles, config.ffn_tile_tokens) if config.ffn_tile_tokens else call
        if isinstance(block.mixer, MemoryModule):
            block.mixer.tile_tokens = config.memory_tile_tokens
