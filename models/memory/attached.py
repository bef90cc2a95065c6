"""A memory and sliding-window attention in one mixer: side by side (MAG) or one after the other (MAL, after), for any kind of memory.

    MAG   y = W_o (RMSNorm(attention(x)) * silu(RMSNorm(memory(x))))          memory as gate, section 4.2 of arXiv 2501.00663
    MAL   m = memory(x)        y = m + attention(RMSNorm(x + m))               memory as layer, section 4.3
    after a = attention(x)     y = a + memory(RMSNorm(x + a))                  MAL the other way round

Attention is the model's own sliding-window layer, with its seam for other ranks; the memory has its own. Both reach tokens of other ranks
by themselves, so what the memory claims holds for the pair. Attention sees the present sequence only, as the other layers do.

Legend: B row, T token, C channel.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.attention import Attention
from models.batch import Bounds
from models.feedforward import RMSNorm, compute_dtype
from models.linear import Linear
from models.memory.attached_shapes import AttachedShapes
from models.memory.protocol import MemoryCost, MemoryModule, State
from models.recomputed import recomputed


class AttachedMemory(MemoryModule):
    """Base of the pairs. ``memory`` keeps its own carry; tiles are the memory's, attention runs as one."""

    def __init__(self, memory: MemoryModule, attention: Attention, shapes: AttachedShapes) -> None:
        super().__init__()
        self.memory, self.attention, self.shapes = memory, attention, shapes

    def init_state(self, batch_size: int, device: torch.device | str, dtype: torch.dtype) -> State:
        """The memory's."""
        return self.memory.init_state(batch_size, device, dtype)

    @property
    def carrier(self) -> MemoryModule:
        """The memory: between training sequences its state goes on, while attention sees the present one only, as in other layers."""
        return self.memory

    def forward(self, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
        """See `MemoryModule.forward`. Raises ValueError for a given state: attention would miss the tokens before the sequence."""
        if state is not None:
            raise ValueError("attention beside a memory sees the present sequence only: its layer takes no state from an earlier one")
        self.memory.tile_tokens, self.memory.run_tile = self.tile_tokens, self.run_tile
        try:
            return self.mix(x_BTC, bounds)
        finally:
            self.memory.run_tile = None

    def mix(self, x_BTC: Tensor, bounds: Bounds) -> tuple[Tensor, State]:
        """The output and the memory's state after the sequence."""
        raise NotImplementedError

    def attend(self, x_BTC: Tensor, bounds: Bounds) -> Tensor:
        """Attention over the sequence; recomputed in backward where the memory's tiles are."""
        body = partial(self.attention, positions_BT=positions(bounds, x_BTC.device), bounds=bounds)
        if self.run_tile is not None:
            return self.run_tile(0, x_BTC.shape[1], body, x_BTC)
        if not self.tile_tokens or not torch.is_grad_enabled():
            return body(x_BTC)
        return checkpoint(body, x_BTC, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]

    def cost(self, batch_size: int, tokens: int, itemsize: int) -> MemoryCost:
        """The memory's, and attention's beside it: whole (``attached_shapes.py``)."""
        memory, shapes = self.memory.cost(batch_size, tokens, itemsize), self.shapes
        n = batch_size * tokens
        tiled = 0 < self.tile_tokens < tokens
        return MemoryCost(
            flops_forward=memory.flops_forward + n * shapes.flops_forward(tokens),
            flops_backward=memory.flops_backward + n * shapes.flops_backward(tokens),
            saved_bytes=memory.saved_bytes + shapes.saved_bytes(batch_size, tokens, itemsize, max(itemsize, 4), tiled),
            state_bytes=memory.state_bytes,
            exchange_bytes=memory.exchange_bytes + (0 if self.memory.carry.local else shapes.halo_bytes(batch_size, itemsize)),
        )


class MemoryAsGate(AttachedMemory):
    """MAG: attention and memory read the same tokens; the memory gates what attention found."""

    def __init__(self, memory: MemoryModule, attention: Attention, shapes: AttachedShapes, d_model: int, norm_eps: float) -> None:
        super().__init__(memory, attention, shapes)
        self.traits = replace(memory.traits, attach="parallel_attn")
        self.norm_eps = norm_eps
        self.attention_norm = nn.Parameter(torch.empty(d_model))
        self.memory_norm = nn.Parameter(torch.empty(d_model))
        self.w_out = Linear(d_model, d_model)

    def init_parameter(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """Norms begin at 1."""
        return torch.ones(shape)

    def mix(self, x_BTC: Tensor, bounds: Bounds) -> tuple[Tensor, State]:
        """See `AttachedMemory.mix`."""
        read_BTC, state = self.memory.goes_on(x_BTC, bounds)
        seen_BTC = self.attend(x_BTC, bounds)
        fn = partial(gated, self.norm_eps, compute_dtype(x_BTC))
        (out_BTC,) = recomputed(fn, seen_BTC, read_BTC, self.attention_norm, self.memory_norm)
        return self.w_out(out_BTC), state


class MemoryAsLayer(AttachedMemory):
    """MAL: attention reads what the memory made of the tokens."""

    def __init__(self, memory: MemoryModule, attention: Attention, shapes: AttachedShapes, d_model: int, norm_eps: float) -> None:
        super().__init__(memory, attention, shapes)
        self.traits = replace(memory.traits, attach="pre_attn")
        self.norm = RMSNorm(d_model, norm_eps)

    def mix(self, x_BTC: Tensor, bounds: Bounds) -> tuple[Tensor, State]:
        """See `AttachedMemory.mix`."""
        read_BTC, state = self.memory.goes_on(x_BTC, bounds)
        return read_BTC + self.attend(self.norm(x_BTC + read_BTC), bounds), state


class MemoryAfterAttention(AttachedMemory):
    """The memory reads, and keeps, what attention made of the tokens."""

    def __init__(self, memory: MemoryModule, attention: Attention, shapes: AttachedShapes, d_model: int, norm_eps: float) -> None:
        super().__init__(memory, attention, shapes)
        self.traits = replace(memory.traits, attach="post_attn")
        self.norm = RMSNorm(d_model, norm_eps)

    def mix(self, x_BTC: Tensor, bounds: Bounds) -> tuple[Tensor, State]:
        """See `AttachedMemory.mix`."""
        seen_BTC = self.attend(x_BTC, bounds)
        read_BTC, state = self.memory.goes_on(self.norm(x_BTC + seen_BTC), bounds)
        return seen_BTC + read_BTC, state


def gated(eps: float, dtype: torch.dtype, seen_BTC: Tensor, read_BTC: Tensor, seen_norm_C: Tensor, read_norm_C: Tensor) -> tuple[Tensor]:
    """What attention saw, gated by what the memory read, both normed; see the module."""

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        x = x if x.dtype == torch.float64 else x.float()
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight

    return ((normed(seen_BTC, seen_norm_C) * F.silu(normed(read_BTC, read_norm_C))).to(dtype),)


def positions(bounds: Bounds, device: torch.device) -> Tensor:
    """[B, T] of the tokens held here, from the start of their documents; one tensor for all layers."""
    key = ("positions", device)
    if key not in bounds._cache:
        held = np.concatenate([np.arange(start, end) for start, end in bounds.ranges])
        rows: list[Any] = []
        for documents in bounds.documents:
            starts = np.array(documents)
            rows.append(held - starts[np.searchsorted(starts, held, side="right") - 1])
        bounds._cache[key] = torch.tensor(np.stack(rows)).to(device)
    return bounds._cache[key]
