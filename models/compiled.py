"""Blocks of attention and feed-forward whose token-wise parts are compiled: the seam ``Block.run`` filled with ``torch.compile``.

What is compiled are two whole graphs per block, before attention (norm, projections, rotary positions) and after it (output projection,
norm, feed-forward, the residual stream), shared by all blocks of equal shapes. Attention itself stays as it is: its kernels are fused
already, its plan depends on every batch's documents, and between ranks its autograd functions wait for messages, which no graph holds. So
every sequence scheme, mask and kernel works under it, and nothing is left to a compiler that breaks graphs in silence (``fullgraph``).

Gradients are the same sums in another order: equal to rounding, not bit for bit.

Legend: B row, T token of this rank, C channel, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from models.attention import Attention
from models.batch import Bounds
from models.feedforward import SwiGLU
from models.rope import rotate
from models.transformer import Block, Transformer, call


def _before(block: Block, x_BTC: Tensor, cos_B1TK: Tensor, sin_B1TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q_BHTD and k_BGTD, turned to their positions, and v_BGTD."""
    mixer = cast(Attention, block.mixer)
    q_BHTD, k_BGTD, v_BGTD = mixer.project(block.norm1(x_BTC))
    return rotate(q_BHTD, cos_B1TK, sin_B1TK), rotate(k_BGTD, cos_B1TK, sin_B1TK), v_BGTD


def _after(block: Block, x_BTC: Tensor, out_BHTD: Tensor) -> Tensor:
    """The residual stream after the block, from the one before it and what attention found."""
    mixer, ffn = cast(Attention, block.mixer), cast(SwiGLU, block.ffn)
    x_BTC = x_BTC + mixer.wo(out_BHTD.transpose(1, 2).flatten(2))
    return x_BTC + ffn(block.norm2(x_BTC))


class CompiledBlock:
    """``Block.run`` of one block of attention and a dense feed-forward. ``body`` is not called: its parts are."""

    def __init__(self, block: Block, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        self.block, self.before, self.after = block, before, after

    def __call__(self, body: Callable[..., Any], x_BTC: Tensor, positions_BT: Tensor, bounds: Bounds) -> Tensor:
        mixer = cast(Attention, self.block.mixer)
        cos_sin = mixer.rope_table(positions_BT, torch.float32 if x_BTC.dtype != torch.float64 else x_BTC.dtype, bounds)
        q_BHTD, k_BGTD, v_BGTD = self.before(self.block, x_BTC, *cos_sin)
        return self.after(self.block, x_BTC, mixer.inner_attention(q_BHTD, k_BGTD, v_BGTD, bounds))


def compile_blocks(model: Transformer, layers: Sequence[int], backend: str = "inductor") -> None:
    """Have the blocks of ``layers`` compiled when they first run, after the model is built, placed and sharded.

    ``backend``: torch.compile's. Raises ValueError for a block that is not one of plain attention and a dense feed-forward run as it is, or
    whose gradients are to be kept in another dtype than their weights, which a graph would round.
    """
    from torch._inductor import config as inductor_config  # takes a moment, which runs without it need not wait

    # In this process: workers beside every rank would outlive the few graphs there are.
    inductor_config.compile_threads = 1
    before, after = (torch.compile(part, fullgraph=True, dynamic=False, backend=backend) for part in (_before, _after))
    for i in layers:
        block = cast(Block, model.blocks[i])
        if not (isinstance(block.mixer, Attention) and isinstance(block.ffn, SwiGLU)) or block.run is not call:
            raise ValueError(f"block {i} is not one of attention and a dense feed-forward run as it is; it cannot be compiled")
        if block.mixer.tokens.ranks > 1 or any(p.grad_dtype not in (None, p.dtype) for p in block.parameters()):
            raise ValueError(f"block {i} is shared by ranks, or keeps gradients wider than its weights; it cannot be compiled")
        block.run = CompiledBlock(block, before, after)
