"""Next-token loss without ever holding all logits: one tile of tokens at a time.

A vocabulary of 128k makes 256 KB of bf16 logits per token, so a million tokens would need 256 GB; here one tile exists at a
time. When gradients are wanted they are made in the forward pass, from the same logits, for an upstream gradient of 1 per token:
three products with the head instead of four. The gradient that arrives is nearly always one number for all tokens (that of a sum or
a mean), which scales them; for any other one they are made again, from logits computed a second time. The weight gradient adds up
in float32 (float64): summed over 256 tiles in bf16 its error would grow sevenfold.

Legend: B row, T token, n tokens of all rows flattened, C channel, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.batch import IGNORE_INDEX


class _Sweep:
    """One pass over all tiles of ``h @ weight^T`` in ``dtype``; statistics and gradients are wide (float32, or float64)."""

    def __init__(self, h_nC: Tensor, weight_VC: Tensor, labels_n: Tensor, tile_tokens: int, dtype: torch.dtype) -> None:
        self.h_nC, self.master_VC, self.labels_n, self.dtype = h_nC, weight_VC, labels_n, dtype
        self.weight_VC = weight_VC.to(dtype)
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        n = len(h_nC)
        self.tiles = [slice(start, min(start + tile_tokens, n)) for start in range(0, n, tile_tokens)]
        self.dh_nC: Tensor | None = None
        self.dweight_VC: Tensor | None = None

    def want(self, h: bool, weight: bool) -> None:
        """Make room for the gradients that ``add_gradients`` is to fill."""
        self.dh_nC = torch.empty_like(self.h_nC) if h else None
        self.dweight_VC = torch.zeros_like(self.master_VC, dtype=self.wide) if weight else None

    def logits(self, tile: slice) -> Tensor:
        return torch.mm(self.h_nC[tile].to(self.dtype), self.weight_VC.t()).to(self.wide)

    def add_gradients(self, tile: slice, dlogits: Tensor, scale_n1: Tensor | None) -> None:
        """``dlogits``: the softmax, overwritten. ``scale``: upstream gradient per token, None for 1."""
        labels = self.labels_n[tile].unsqueeze(1)
        invalid = labels == IGNORE_INDEX
        target = labels.masked_fill(invalid, 0)
        dlogits.scatter_add_(1, target, torch.full_like(target, -1, dtype=dlogits.dtype))
        if scale_n1 is not None:
            dlogits.mul_(scale_n1[tile])
        # A token without label contributes exactly nothing, even if its logits are not finite.
        narrow = dlogits.masked_fill_(invalid, 0).to(self.dtype)
        if self.dh_nC is not None:
            self.dh_nC[tile] = torch.mm(narrow, self.weight_VC).to(self.dh_nC.dtype)
        if self.dweight_VC is not None:
            _add_product(self.dweight_VC, narrow.t(), self.h_nC[tile].to(self.dtype))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_nC: Tensor, weight_VC: Tensor, labels_n: Tensor, tile_tokens: int, dtype: torch.dtype, gradients: bool
    ) -> Tensor:
        sweep = _Sweep(h_nC, weight_VC, labels_n, tile_tokens, dtype)
        if gradients:
            sweep.want(*ctx.needs_input_grad[:2])
        lse_n = torch.empty(len(h_nC), dtype=sweep.wide, device=h_nC.device)
        target_n = torch.empty_like(lse_n)
        valid_n = labels_n != IGNORE_INDEX
        for tile in sweep.tiles:
            logits = sweep.logits(tile)
            target_n[tile] = logits.gather(1, labels_n[tile].where(valid_n[tile], 0).unsqueeze(1)).squeeze(1)
            lse_n[tile] = logits.logsumexp(-1)
            if gradients:
                sweep.add_gradients(tile, logits.sub_(lse_n[tile].unsqueeze(1)).exp_(), None)
        ctx.save_for_backward(h_nC, weight_VC, labels_n, lse_n)
        ctx.tile_tokens, ctx.dtype = tile_tokens, dtype
        ctx.ready = (sweep.dh_nC, sweep.dweight_VC) if gradients else None
        return (lse_n - target_n).masked_fill_(~valid_n, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h_nC, weight_VC, labels_n, lse_n = ctx.saved_tensors
        (scale_n,) = grads
        ready, ctx.ready = ctx.ready, None
        if ready is not None and _one_number(scale_n):
            dh_nC, dweight_VC = (None if grad is None else grad.mul_(scale_n[0]) for grad in ready)
        else:
            del ready
            sweep = _Sweep(h_nC, weight_VC, labels_n, ctx.tile_tokens, ctx.dtype)
            sweep.want(*ctx.needs_input_grad[:2])
            with torch.autocast(h_nC.device.type, enabled=False):
                for tile in sweep.tiles:
                    softmax = sweep.logits(tile).sub_(lse_n[tile].unsqueeze(1)).exp_()
                    sweep.add_gradients(tile, softmax, scale_n.to(sweep.wide).unsqueeze(1))
            dh_nC, dweight_VC = sweep.dh_nC, sweep.dweight_VC
        return dh_nC, None if dweight_VC is None else dweight_VC.to(weight_VC.dtype), None, None, None, None


def _one_number(grad_n: Tensor) -> bool:
    """Whether all entries are the same one in memory, as the gradient of a sum or mean is: no look at values, no wait for a device."""
    return len(grad_n) == 1 or grad_n.stride(0) == 0


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in the dtype of ``total``."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b)


def chunked_cross_entropy(h_BTC: Tensor, weight_VC: Tensor, labels_BT: Tensor, tile_tokens: int) -> Tensor:
    """Negative log likelihood per token, ``-log softmax(h @ weight^T)[label]``, 0 where the label is IGNORE_INDEX.

    float32 (float64 for float64 inputs) whatever the inputs; under autocast the products run in the autocast dtype.
    ``tile_tokens`` (at least 1) tokens of logits exist at a time. Raises ValueError for a smaller tile.
    """
    if tile_tokens < 1:
        raise ValueError(f"tile_tokens is {tile_tokens}; memory.loss_tile_tokens must be at least 1")
    device = h_BTC.device.type
    dtype = torch.promote_types(h_BTC.dtype, weight_VC.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        nll_n = _ChunkedCrossEntropy.apply(h_BTC.flatten(0, 1), weight_VC, labels_BT.flatten(), tile_tokens, dtype, torch.is_grad_enabled())
    # A copy of T numbers: FSDP2 hooks the output of its root module and warns about views.
    return nll_n.view(labels_BT.shape).clone()  # type: ignore[union-attr]
