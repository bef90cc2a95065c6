"""What a block of attention is: which keys its queries see, and what may compute it. No kernels; ``models/kernels.py`` has them.

Legend: B batch, H query heads, G key/value heads (H a multiple of G), T queries, S keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch

_INF = float("inf")
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class MaskKind(Enum):
    """Which keys a query of a block sees."""

    NONE = "none"
    CAUSAL = "causal"
    BAND = "band"
    DENSE = "dense"


@dataclass(frozen=True)
class BlockMask:
    """The mask of one block, in local indices: query row a, key column b.

    NONE: everything. CAUSAL: b <= a, square blocks only. BAND: ``low <= b - a`` and, unless high is None, ``b - a <= high``.
    DENSE: ``tensor`` [.., T, S] broadcastable to [B, H, T, S]; boolean (True = visible) or additive (-inf = hidden).
    """

    kind: MaskKind
    low: int = 0
    high: int | None = None
    tensor: torch.Tensor | None = None
    no_empty_rows: bool = False
    """The caller's promise that every query sees a key; saves a pass over a dense mask."""

    @staticmethod
    def band(low: int, high: int | None) -> BlockMask:
        """Key minus query index between low and high (None: no upper limit)."""
        return BlockMask(MaskKind.BAND, low, high)

    @staticmethod
    def dense(tensor: torch.Tensor, no_empty_rows: bool = False) -> BlockMask:
        """A mask given as a tensor."""
        return BlockMask(MaskKind.DENSE, tensor=tensor, no_empty_rows=no_empty_rows)


NONE = BlockMask(MaskKind.NONE)
CAUSAL = BlockMask(MaskKind.CAUSAL)


class Block(NamedTuple):
    """What the choice of an implementation depends on."""

    device: str
    """Type of the device: cpu, cuda."""
    dtype: torch.dtype
    head_dim: int
    kind: MaskKind
    capability: tuple[int, int] | None = None
    """Compute capability of a CUDA device; None: not known, or none."""
    deterministic: bool = False
    """Only deterministic kernels (``train.deterministic``)."""


def _always(block: Block) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute a block."""

    name: str
    refuses: Callable[[Block], str | None]
    """Why it cannot, or None when it can."""
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    """(q, k, v, mask, scale) -> (out, lse)"""
    backward: Callable[..., Gradients]
    """(dout, q, k, v, out, lse, mask, scale) -> (dq, dk, dv)"""
    yields: Callable[[Block], str | None] = _always
    """Why it leaves a block that it can compute to the next implementation, or None; not asked where it is chosen by name."""
    native_band: bool = False
    """A BAND block costs its visible scores only and needs no mask tensor."""


def additive_mask(mask: BlockMask, n_queries: int, n_keys: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """The mask as a tensor to add to the scores, broadcastable to [B, H, T, S]; None when nothing is hidden."""
    if mask.kind is MaskKind.NONE:
        return None
    if mask.kind is MaskKind.DENSE:
        assert mask.tensor is not None
        if mask.tensor.dtype != torch.bool:
            return mask.tensor.to(dtype)
        return torch.zeros(mask.tensor.shape, dtype=dtype, device=device).masked_fill_(~mask.tensor, -_INF)
    low, high = (None, 0) if mask.kind is MaskKind.CAUSAL else (mask.low, mask.high)
    hidden_TS = torch.full((n_queries, n_keys), -_INF, dtype=dtype, device=device)
    if high is None:
        return hidden_TS.tril_(mask.low - 1)
    above_TS = hidden_TS.triu(high + 1)
    return above_TS if low is None else above_TS.add_(hidden_TS.tril_(low - 1))


def mask_4d(mask: BlockMask, q_BHTD: torch.Tensor, k_BGSD: torch.Tensor) -> torch.Tensor | None:
    """The additive mask as the 4-dimensional tensor that the kernels want, without copies along B and H; None where they need none."""
    if mask.kind in (MaskKind.NONE, MaskKind.CAUSAL):
        return None
    hidden = additive_mask(mask, q_BHTD.shape[2], k_BGSD.shape[2], q_BHTD.dtype, q_BHTD.device)
    assert hidden is not None
    return hidden.reshape((1,) * (4 - hidden.ndim) + hidden.shape)


def repeat_heads(x_BGSD: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Key/value heads once per query head, for kernels that know no groups."""
    return x_BGSD if x_BGSD.shape[1] == n_heads else x_BGSD.repeat_interleave(n_heads // x_BGSD.shape[1], dim=1)
