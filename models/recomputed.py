"""A function of tensors that keeps its inputs only: what lies between is made again in the backward pass.

For arithmetic that is cheap beside the bytes it would leave behind, inside modules whose memory is counted. Unlike
``torch.utils.checkpoint`` it needs no hooks, so that it composes with recomputation, offloading and traces around it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fn: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.fn = fn
        ctx.save_for_backward(*inputs)
        return fn(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *gradients_of(ctx.fn, ctx.saved_tensors, ctx.needs_input_grad[1:], grads)


def gradients_of(
    fn: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], wanted: tuple[bool, ...], grads: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """Gradients of ``inputs`` where ``wanted`` under the output gradients ``grads``, by running ``fn`` again."""
    with torch.enable_grad(), torch.autocast(inputs[0].device.type, enabled=False):
        again = [x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
        found = [(y, g) for y, g in zip(fn(*again), grads, strict=True) if g is not None and y.requires_grad]
    sought = [x for x in again if x.requires_grad]
    if not found or not sought:
        return [None] * len(inputs)
    answers = iter(torch.autograd.grad([y for y, _ in found], sought, [g for _, g in found], allow_unused=True))
    return [next(answers) if x.requires_grad else None for x in again]


def recomputed(fn: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """``fn(*inputs)``; ``fn`` returns a tuple of tensors and is called again in the backward pass. Never under autocast."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        return _Recomputed.apply(fn, *inputs)  # type: ignore[return-value]
