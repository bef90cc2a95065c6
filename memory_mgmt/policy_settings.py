"""What plain memory settings mean as a policy. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from memory_mgmt.config import MemoryConfig
from memory_mgmt.policy import KEEP_ALL, KEEP_MIXER, QUANTISE, RECOMPUTE, RECOMPUTE_BLOCK, SWAP, LayerPolicy, Policy, Split
from models.config import LayerKind

_LAYERS = {"none": KEEP_ALL, "mixer": KEEP_MIXER, "block": RECOMPUTE_BLOCK}


def policy_of(config: MemoryConfig, layers: int | Sequence[LayerKind]) -> Policy:
    """The policy that plain settings stand for. ``layers``: their kinds, or how many attention layers.

    ``ffn_tile_tokens`` recomputes the feed-forward in tiles and ``memory_tile_tokens`` the inside of memory layers, whatever
    ``recompute`` says; with ``quantise`` the feed-forward's tiles are kept in eight bits instead. Raises ValueError for
    ``recompute: auto``, which only a planner can answer.
    """
    if config.recompute == "auto":
        raise ValueError("memory.recompute auto is decided by the planner; apply its policy instead")
    kinds: Sequence[LayerKind] = ("full",) * layers if isinstance(layers, int) else layers
    return Policy(
        layers=tuple(_layer_of(config, kind) for kind in kinds),
        group_blocks=config.group_blocks if config.recompute == "block" else 1,
        loss_tile_tokens=config.loss_tile_tokens,
        ffn_tile_tokens=config.ffn_tile_tokens,
        memory_tile_tokens=config.memory_tile_tokens,
    )


def _layer_of(config: MemoryConfig, kind: LayerKind) -> LayerPolicy:
    layer = _LAYERS[config.recompute]
    if config.quantise == "feed_forward" and config.recompute == "none":
        layer = replace(layer, feed_forward=QUANTISE)
    elif config.ffn_tile_tokens:
        layer = replace(layer, feed_forward=RECOMPUTE)
    if config.memory_tile_tokens and kind == "memory":
        layer = replace(layer, mixer=RECOMPUTE)
    if config.offload == "inputs":
        return replace(layer, input=SWAP)
    if config.offload == "kept":
        swapped = {name: _swap_kept(layer.of(name)) for name in ("input", "projections", "mixer", "feed_forward")}
        return LayerPolicy(**swapped)
    return layer


def _swap_kept(split: Split) -> Split:
    return replace(split, keep=0.0, swap=split.keep + split.swap)
