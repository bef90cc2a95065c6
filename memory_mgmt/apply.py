"""Put the memory settings of a run onto a model: what is kept, swapped or recomputed, and in which tiles. Before FSDP is applied.

``policy_settings.policy_of`` turns plain settings into a ``Policy``; the planner makes one for ``recompute: auto``; ``apply_policy``
installs it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from torch import nn

from memory_mgmt.execution import BlockExecution
from memory_mgmt.groups import GroupedBlocks
from memory_mgmt.pieces import Store
from memory_mgmt.policy import KEEP, KEEP_ALL, RECOMPUTE, Policy
from models.attention import Attention
from models.feedforward import SwiGLU
from models.memory.protocol import MemoryModule
from models.transformer import Block, Transformer, call, run_in_order


def apply_policy(model: Transformer, policy: Policy, store: Store | None = None) -> None:
    """Install ``policy`` on ``model``; calling it again replaces what was installed before.

    A model that keeps everything and has no tiles runs as the plain modules. ``store`` takes swapped tensors and may be None when none are.
    Raises ValueError for a policy of another model, for one that swaps without a store, and for an input to be recomputed
    outside of a group; TypeError for blocks that are not those of models/.
    """
    _check(model, policy, store)
    model.loss_tile_tokens = policy.loss_tile_tokens
    keep_rng = draws_random_numbers(model)
    grouped = policy.group_blocks > 1
    inputs = [layer.input for layer in policy.layers]
    model.run_blocks = GroupedBlocks(policy.group_blocks, inputs, store, keep_rng) if grouped else run_in_order
    # One layer that keeps everything beside others that do not runs as they do: it keeps less than the plain module would.
    plain = not policy.ffn_tile_tokens and all(layer == KEEP_ALL for layer in policy.layers)
    for i, (module, layer) in enumerate(zip(model.blocks, policy.layers, strict=True)):
        block = cast(Block, module)
        if grouped:
            # A group holds its own input, and while it runs again the blocks' inputs stay where they are. The last block's backward follows
            # its second run at once: attention need not run a third time.
            last = i % policy.group_blocks == policy.group_blocks - 1 or i == len(policy.layers) - 1
            stays = last and layer.mixer == RECOMPUTE and isinstance(block.mixer, Attention)
            layer = replace(layer, input=KEEP, mixer=KEEP if stays else layer.mixer)
        if isinstance(block.mixer, MemoryModule):
            block.mixer.tile_tokens = 0
        if plain:
            block.run = call
        else:
            block.run = BlockExecution(block, i, layer, policy.ffn_tile_tokens, policy.memory_tile_tokens, store, keep_rng)


def _check(model: Transformer, policy: Policy, store: Store | None) -> None:
    if len(policy.layers) != len(model.blocks):
        raise ValueError(f"the memory policy is for {len(policy.layers)} layers; the model has {len(model.blocks)}")
    for i, layer in enumerate(policy.layers):
        splits = {"input": layer.input, "projections": layer.projections, "mixer": layer.mixer, "feed_forward": layer.feed_forward}
        swaps = [name for name, split in splits.items() if split.swap > 0]
        if swaps and store is None:
            raise ValueError(f"layer {i} swaps its {swaps[0]}, but there is no host store")
        refused = layer.feed_forward.swap > 0 or layer.feed_forward.quantise > 0
        if refused and not isinstance(cast(Block, model.blocks[i]).ffn, SwiGLU):
            raise ValueError(f"layer {i} reads a table: its feed-forward is kept or recomputed, not swapped or kept in eight bits")
        if layer.input.recompute > 0 and (policy.group_blocks == 1 or i % policy.group_blocks == 0):
            raise ValueError(f"layer {i} is to recompute its input; only blocks inside a group can (memory.group_blocks)")


def draws_random_numbers(model: nn.Module) -> bool:
    """Whether a forward pass in training draws random numbers: some module drops out."""
    return any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in model.modules())
