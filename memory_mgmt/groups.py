"""Run blocks in groups of k: only a group's input lives from forward to backward, where the whole group runs forward again.

Inside that second run every block follows its own policy. The first run saves nothing, so nothing of it reaches the host store.

Legend: B row, T token, C channel.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from memory_mgmt.pieces import Held, Parking, Store
from memory_mgmt.policy import Split
from models.batch import Bounds
from models.repeat import again
from models.transformer import Block, run_in_order

_LAST_GROUP = "last group of blocks"


class GroupedBlocks:
    """The seam ``Transformer.run_blocks``: groups of ``size`` blocks whose inputs follow ``inputs``, one split per block.

    ``keep_rng``: the second run draws the same random numbers as the first.
    """

    def __init__(self, size: int, inputs: Sequence[Split], store: Store | None, keep_rng: bool) -> None:
        if size < 1:
            raise ValueError(f"group_blocks is {size}; a group holds at least 1 block")
        self.size, self.inputs, self.store, self.keep_rng = size, inputs, store, keep_rng

    def __call__(self, blocks: Iterable[Block], x_BTC: Tensor, positions_BT: Tensor, bounds: Bounds) -> Tensor:
        """The residual stream after all blocks."""
        blocks = list(blocks)
        if not torch.is_grad_enabled():
            return run_in_order(blocks, x_BTC, positions_BT, bounds)
        starts = torch.empty(0, device=x_BTC.device, requires_grad=True)  # gives the node a gradient whatever the input's is
        for first in range(0, len(blocks), self.size):
            group = blocks[first : first + self.size]
            x_BTC = _Group.apply(self, first, group, starts, x_BTC, positions_BT, bounds)  # type: ignore[assignment]
        return x_BTC


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: GroupedBlocks, first: int, blocks: list[Block], _: Tensor, x_BTC: Tensor, positions_BT: Tensor, bounds: Bounds
    ) -> Tensor:
        device = x_BTC.device.type
        ctx.blocks, ctx.positions_BT, ctx.bounds = blocks, positions_BT, bounds
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
            "cache_enabled": False,
        }
        ctx.rng = _rng_states(device) if run.keep_rng else None
        ctx.parking = Parking(run.store, ("group", first, id(ctx)))
        # The group below, so that its input comes back while this group's backward runs.
        ctx.below = bounds._cache.get(_LAST_GROUP) if first else None
        bounds._cache[_LAST_GROUP] = weakref.ref(ctx.parking)
        split = run.inputs[first].tokens(x_BTC.shape[1], 0)
        ctx.x = Held(x_BTC, 1, split.swapped, split.kept, ctx.parking, "input")
        y_BTC = run_in_order(blocks, x_BTC, positions_BT, bounds)
        ctx.x.trim()
        return y_BTC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if ctx.x is None:
            raise RuntimeError("a group of blocks was differentiated a second time; run its forward pass again first")
        below = ctx.below() if ctx.below is not None else None
        if below is not None:
            below.prefetch()
        x_BTC, ctx.x = ctx.x.whole().detach().requires_grad_(), None
        now = None if ctx.rng is None else _rng_states(x_BTC.device.type)
        with torch.enable_grad(), torch.autocast(**ctx.autocast), again():
            if ctx.rng is not None:
                _restore_rng(x_BTC.device.type, ctx.rng)
            y_BTC = run_in_order(ctx.blocks, x_BTC, ctx.positions_BT, ctx.bounds)
        if now is not None:
            _restore_rng(x_BTC.device.type, now)
        # Accumulates into the parameters' own gradients, where FSDP2's hooks of each block find them.
        torch.autograd.backward(y_BTC, grads[0])
        return None, None, None, None, x_BTC.grad if ctx.needs_input_grad[4] else None, None, None


def _rng_states(device: str) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states if device == "cpu" else [*states, torch.get_device_module(device).get_rng_state()]


def _restore_rng(device: str, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device != "cpu":
        torch.get_device_module(device).set_rng_state(states[1])
