"""Next-token loss without ever holding all logits: one tile of tokens at a time, recomputed in the backward pass.

A vocabulary of 128k makes 256 KB of bf16 logits per token, so a million tokens would need 256 GB; here one tile exists at a
time and only the log-sum-exp of each token is kept. The weight gradient adds up in float32 (float64): summed over 256 tiles
in bf16 its error would grow sevenfold.

Legend: B row, T token, n tokens of all rows flattened, C channel, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from models.batch import IGNORE_INDEX
from models.repeat import repeated


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_nC: Tensor, weight_VC: Tensor, labels_n: Tensor, tile_tokens: int, dtype: torch.dtype) -> Tensor:
        lse_n = torch.empty(len(h_nC), dtype=_wide(dtype), device=h_nC.device)
        target_n = torch.empty_like(lse_n)
        valid_n = labels_n != IGNORE_INDEX
        weight = weight_VC.to(dtype)
        for tile in _tiles(h_nC, tile_tokens):
            logits = torch.mm(h_nC[tile].to(dtype), weight.t()).to(lse_n.dtype)
            lse_n[tile] = logits.logsumexp(-1)
            target_n[tile] = logits.gather(1, labels_n[tile].where(valid_n[tile], 0).unsqueeze(1)).squeeze(1)
        ctx.save_for_backward(h_nC, weight_VC, labels_n, lse_n)
        ctx.tile_tokens, ctx.dtype = tile_tokens, dtype
        return (lse_n - target_n).masked_fill_(~valid_n, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h_nC, weight_VC, labels_n, lse_n = ctx.saved_tensors
        valid_n = labels_n != IGNORE_INDEX
        scale_n = grads[0].to(lse_n.dtype).masked_fill(~valid_n, 0)
        needs_h, needs_weight = ctx.needs_input_grad[:2]
        dh_nC = torch.empty_like(h_nC) if needs_h else None
        dweight = torch.zeros_like(weight_VC, dtype=lse_n.dtype) if needs_weight else None
        weight = weight_VC.to(ctx.dtype)
        with torch.autocast(h_nC.device.type, enabled=False):
            for tile in _tiles(h_nC, ctx.tile_tokens):
                h = h_nC[tile].to(ctx.dtype)
                dlogits = torch.mm(h, weight.t()).to(lse_n.dtype).sub_(lse_n[tile].unsqueeze(1)).exp_()
                target = labels_n[tile].where(valid_n[tile], 0).unsqueeze(1)
                dlogits.scatter_(1, target, dlogits.gather(1, target) - 1)
                # A token without label contributes exactly nothing, even if its logits are not finite.
                dlogits = dlogits.mul_(scale_n[tile].unsqueeze(1)).masked_fill_(~valid_n[tile].unsqueeze(1), 0).to(ctx.dtype)
                if dh_nC is not None:
                    dh_nC[tile] = torch.mm(dlogits, weight).to(h_nC.dtype)
                if dweight is not None:
                    _add_product(dweight, dlogits.t(), h)
        return dh_nC, None if dweight is None else dweight.to(weight_VC.dtype), None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in the dtype of ``total``."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b)


def _tiles(h_nC: Tensor, tile_tokens: int) -> Iterator[slice]:
    n = len(h_nC)
    for i in repeated(-(-n // tile_tokens), h_nC):
        yield slice(i * tile_tokens, min((i + 1) * tile_tokens, n))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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
        nll_n = _ChunkedCrossEntropy.apply(h_BTC.flatten(0, 1), weight_VC, labels_BT.flatten(), tile_tokens, dtype)
    # A copy of T numbers: FSDP2 hooks the output of its root module and warns about views.
    return nll_n.view(labels_BT.shape).clone()  # type: ignore[union-attr]
