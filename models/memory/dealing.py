"""Tokens dealt to the ranks that work on them, chunk by chunk, and brought back; each is the other's backward.

Legend: B row, T local token, C channel, N step, S stream, p slot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.batch import Bounds
from models.memory.chunk_plan import Chunks, Share, share_of
from models.memory.protocol import Carry


class _Deal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTC: Tensor, share: Share, carry: Carry) -> Tensor:
        ctx.share, ctx.carry, ctx.tokens = share, carry, x_BTC.shape[1]
        return _to_slots(x_BTC, share, carry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _to_tokens(grads[0], ctx.share, ctx.carry, ctx.tokens), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_NSpC: Tensor, share: Share, carry: Carry, tokens: int) -> Tensor:
        ctx.share, ctx.carry = share, carry
        return _to_tokens(y_NSpC, share, carry, tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _to_slots(grads[0], ctx.share, ctx.carry), None, None, None


def _to_slots(x_BTC: Tensor, share: Share, carry: Carry) -> Tensor:
    C = x_BTC.shape[-1]
    arrived = carry.swap(x_BTC.reshape(-1, C)[share.give_T], share.given, share.taken)
    slots = x_BTC.new_zeros(*share.shape, C)
    slots.view(-1, C)[share.take_T] = arrived
    return slots


def _to_tokens(y_NSpC: Tensor, share: Share, carry: Carry, tokens: int) -> Tensor:
    C = y_NSpC.shape[-1]
    arrived = carry.swap(y_NSpC.reshape(-1, C)[share.take_T], share.taken, share.given)
    x = y_NSpC.new_empty(share.held, C) if len(share.give_T) == share.held else y_NSpC.new_zeros(share.held, C)
    x[share.give_T] = arrived
    return x.view(-1, tokens, C)


def share_in(carry: Carry, bounds: Bounds, chunks: Chunks, device: torch.device) -> Share:
    """The share of this rank, kept in ``bounds`` for all layers."""
    rank, held = carry.holders(bounds)
    key = ("share", id(chunks), tuple(held), rank, device)
    if key not in bounds._cache:
        bounds._cache[key] = share_of(chunks, held, rank, device)
    return bounds._cache[key]


def deal(x_BTC: Tensor, share: Share, carry: Carry) -> Tensor:
    """[N, S, p, C]: the tokens that this rank works on; empty slots are 0."""
    return _Deal.apply(x_BTC, share, carry)  # type: ignore[return-value]


def collect(y_NSpC: Tensor, share: Share, carry: Carry, tokens: int) -> Tensor:
    """[B, tokens, C]: what became of this rank's own tokens."""
    return _Collect.apply(y_NSpC, share, carry, tokens)  # type: ignore[return-value]
