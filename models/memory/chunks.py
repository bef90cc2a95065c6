"""What the chunked forms of linear recurrences share: sums and decays within chunks and documents, the scan over chunks.

Legend: N chunk, G row x head, B row, C token in chunk, K and W the two sides of a state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.repeat import repeated


def running_sum(x_NGC: Tensor, segment_NBC: Tensor | None, reverse: bool = False) -> Tensor:
    """Sum up to (or from) each token within chunk and document, so that not even rounding depends on another document.

    A product with ones, because cumsum is not deterministic on CUDA.
    """
    N, G, C = x_NGC.shape
    ones_CC = torch.ones(C, C, dtype=x_NGC.dtype, device=x_NGC.device)
    ones_CC = ones_CC.tril_() if reverse else ones_CC.triu_()
    if segment_NBC is None:
        return x_NGC @ ones_CC
    same_NBCC = ones_CC * (segment_NBC.unsqueeze(-1) == segment_NBC.unsqueeze(-2))
    return (x_NGC.view(N, same_NBCC.shape[1], -1, C) @ same_NBCC).view(N, G, C)


class Decays:
    """Decay factors of all chunks: pair (t, i), chunk start -> t, t -> chunk end; exact zeros across document starts."""

    def __init__(self, g_NGC: Tensor, segment_NBC: Tensor | None) -> None:
        N, G, C = g_NGC.shape
        pair = g_NGC.unsqueeze(-1) - g_NGC.unsqueeze(-2)
        future = torch.full((C, C), float("-inf"), dtype=g_NGC.dtype, device=g_NGC.device).triu_(1)
        pair += future
        self.from_start_NGC = g_NGC.exp()
        self.to_end_NGC = (g_NGC[..., -1:] - g_NGC).exp_()
        if segment_NBC is not None:
            B = segment_NBC.shape[1]
            other = segment_NBC.unsqueeze(-1) != segment_NBC.unsqueeze(-2)
            pair.view(N, B, G // B, C, C).masked_fill_(other.unsqueeze(2), float("-inf"))
            self.from_start_NGC.view(N, B, G // B, C).masked_fill_((segment_NBC != 0).unsqueeze(2), 0)
            self.to_end_NGC.view(N, B, G // B, C).masked_fill_((segment_NBC != segment_NBC[..., -1:]).unsqueeze(2), 0)
        self.pair_NGCC = pair.exp_()
        self.whole_NG11 = self.from_start_NGC[..., -1, None, None]


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """Batched product over the two leading dims (torch.matmul would fold or copy some layouts)."""
    N, G = a.shape[:2]
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, (N, G))


def scan(update_NGKW: Tensor, whole_NGK1: Tensor, state_GKW: Tensor) -> Tensor:
    """S_{n+1} = whole_n S_n + update_n, elementwise: the state before every chunk and after the last, [N + 1, G, K, W].

    ``whole`` may have one row for all K."""
    s = torch.cat([state_GKW.unsqueeze(0), update_NGKW])
    for n in repeated(len(update_NGKW), s):
        s[n + 1].addcmul_(s[n], whole_NGK1[n])
    return s


def scan_reverse(read_NGKW: Tensor, whole_NGK1: Tensor, dfinal_GKW: Tensor) -> Tensor:
    """Gradients of all states of `scan`; ``read`` holds what the outputs of a chunk send to the state before it."""
    N = len(read_NGKW)
    ds = torch.cat([read_NGKW, dfinal_GKW.unsqueeze(0)])
    for turn in repeated(N, ds):
        n = N - 1 - turn
        ds[n].addcmul_(ds[n + 1], whole_NGK1[n])
    return ds


class _States(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, update_NGKW: Tensor, whole_NGK1: Tensor, state_GKW: Tensor) -> Tensor:
        ctx.save_for_backward(whole_NGK1)
        return scan(update_NGKW, whole_NGK1, state_GKW)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        (whole_NGK1,) = ctx.saved_tensors
        ds = scan_reverse(grads[0][:-1], whole_NGK1, grads[0][-1])
        return ds[1:], None, ds[0]


def states(update_NGKW: Tensor, whole_NGK1: Tensor, state_GKW: Tensor) -> Tensor:
    """`scan`, differentiable in the updates and the first state; it keeps the decays only, which have no gradient."""
    return _States.apply(update_NGKW, whole_NGK1, state_GKW)  # type: ignore[return-value]
