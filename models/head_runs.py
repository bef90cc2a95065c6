"""The backward of a large block of attention, some heads at a time: a kernel then takes beside what it is given what a few heads need.

Kernels on CUDA sum the queries' gradient in float32 and, where query heads share keys, make keys' and values' gradients per query head:
32 GiB for a layer of 32 heads of 128 at a million tokens. Heads know nothing of each other, so the bits are the same.

Legend: B batch, H query heads, G key/value heads (H a multiple of G), T queries, S keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from models.block import BlockMask, Gradients
from models.repeat import repeated

HEADS_ELEMENTS = 1 << 29
"""Of the queries whose gradient is computed in one call; a million tokens of four heads of 128."""


def head_runs(q_BHTD: torch.Tensor, key_heads: int, elements: int = HEADS_ELEMENTS) -> int:
    """The least number of equal runs of key heads, with the query heads that share them, of at most ``elements`` of q; or one head each."""
    return next(n for n in range(1, key_heads + 1) if key_heads % n == 0 and (q_BHTD.numel() <= n * elements or n == key_heads))


def by_heads(backward: Callable[..., Gradients], tensors: tuple[torch.Tensor, ...], mask: BlockMask, scale: float, runs: int) -> Gradients:
    """``backward(*tensors, mask, scale)`` with ``tensors`` (dout, q, k, v, out, lse), for ``runs`` equal parts of the heads in turn."""
    if runs == 1:
        return backward(*tensors, mask, scale)
    grads: Gradients = tuple(torch.empty_like(x) for x in tensors[1:4])  # type: ignore[assignment]
    for i in repeated(runs, tensors[1]):
        some = backward(*(_heads(x, i, runs) for x in tensors[:-1]), _heads(tensors[-1], i, runs).contiguous(), mask, scale)
        for grad, part in zip(grads, some, strict=True):
            _heads(grad, i, runs).copy_(part)
    return grads


def _heads(x_BH: torch.Tensor, i: int, runs: int) -> torch.Tensor:
    n = x_BH.shape[1] // runs
    return x_BH.narrow(1, i * n, n)
