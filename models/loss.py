"""Next-token loss without ever holding all logits: one tile of tokens at a time.

A vocabulary of 128k makes 256 KB of bf16 logits per token, so a million tokens would need 256 GB; here one tile exists at a
time. When gradients are wanted they are made in the forward pass, from the same logits, for an upstream gradient of 1 per token:
three products with the head instead of four. The gradient that arrives is nearly always one number for all tokens (that of a sum or
a mean), which scales them; for any other one they are made again, from logits computed a second time. The final norm runs inside
the tiles, forward and backward, so that neither the normed stream nor the wide temporaries of its backward exist for all tokens.
Weight gradients add up in float32 (float64): summed over 256 tiles in bf16 the error would grow sevenfold.

A head whose rows are dealt out to ranks that hold different tokens (``parallel/vocabulary.py``) is another ``Sweep``.

Legend: B row, T token, n tokens of all rows flattened, t tokens of a tile, C channel, V vocabulary; P ranks whose tokens are swept
together (1 here).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.batch import IGNORE_INDEX
from models.feedforward import compute_dtype, rms_norm, rms_norm_backward
from models.linear import gradient_dtype
from models.repeat import turns


class How(NamedTuple):
    """How a loss is computed."""

    tile_tokens: int
    """Of all ranks together."""
    dtype: torch.dtype
    """Of the products with the head."""
    hidden_dtype: torch.dtype
    """Of the normed stream."""
    norm_eps: float
    sweep: Callable[..., Sweep]


class Sweep:
    """One pass over all tiles of ``norm(x) @ weight^T`` in ``dtype``; statistics and gradients are wide (float32, or float64).

    ``labels_Pn``: of this rank's tokens, and of those of the ranks that take part, in their order.
    """

    def __init__(self, x_nC: Tensor, weight_VC: Tensor, norm_C: Tensor | None, labels_Pn: Tensor, how: How) -> None:
        self.x_nC, self.master_VC, self.norm_C, self.labels_Pn, self.how = x_nC, weight_VC, norm_C, labels_Pn, how
        self.weight_VC = weight_VC.to(how.dtype)
        self.wide = torch.float64 if how.dtype == torch.float64 else torch.float32
        n, step = len(x_nC), max(1, how.tile_tokens // len(labels_Pn))
        self.tiles = [slice(start, min(start + step, n)) for start in range(0, n, step)]
        self.dx_nC: Tensor | None = None
        self.dweight_VC: Tensor | None = None
        self.dnorm_C: Tensor | None = None

    def want(self, x: bool, weight: bool, norm: bool) -> None:
        """Make room for the gradients that ``add_gradients`` is to fill."""
        self.dx_nC = torch.empty_like(self.x_nC) if x else None
        self.dweight_VC = torch.zeros_like(self.master_VC, dtype=self.wide) if weight else None
        self.dnorm_C = torch.zeros_like(self.norm_C, dtype=self.wide) if norm and self.norm_C is not None else None

    def labels(self, tile: slice) -> Tensor:
        """Of the tile's tokens, of all ranks that take part, as an index."""
        return self.labels_Pn[:, tile].reshape(-1).long()

    def each(self) -> Iterator[slice]:
        """All tiles, in order."""
        return turns(self.tiles, self.x_nC, lambda tile: tile.stop - tile.start)

    def logits(self, tile: slice) -> Tensor:
        """Of the tile that ``add_gradients`` gets next."""
        x_tC = self.x_nC[tile]
        self._rnorm_t1 = None
        if self.norm_C is not None:
            x_tC, self._rnorm_t1 = rms_norm(x_tC, self.norm_C, self.how.norm_eps, self.how.hidden_dtype)
        self._h_tC = self.gathered(x_tC.to(self.how.dtype))
        return torch.mm(self._h_tC, self.weight_VC.t()).to(self.wide)

    def statistics(self, tile: slice, logits_tV: Tensor) -> tuple[Tensor, Tensor]:
        """(log-sum-exp, logit of the label) of every token of the tile; the second is any finite number where there is no label."""
        labels_t = self.labels(tile)
        target_t = logits_tV.gather(1, labels_t.where(labels_t != IGNORE_INDEX, 0).unsqueeze(1)).squeeze(1)
        return logits_tV.logsumexp(-1), target_t

    def subtract_targets(self, labels_t1: Tensor, dlogits_tV: Tensor) -> None:
        """1 from every label's probability; what it does to tokens without a label does not count."""
        target_t1 = labels_t1.masked_fill(labels_t1 == IGNORE_INDEX, 0)
        dlogits_tV.scatter_add_(1, target_t1, torch.full_like(target_t1, -1, dtype=dlogits_tV.dtype))

    def gathered(self, h_tC: Tensor) -> Tensor:
        """The tokens of the tile of all ranks that take part."""
        return h_tC

    def summed(self, dh_tC: Tensor) -> Tensor:
        """The way back of ``gathered``: this rank's tokens of the tile, summed over ranks."""
        return dh_tC

    def add_gradients(self, tile: slice, dlogits_tV: Tensor, scale_Pn: Tensor | None) -> None:
        """``dlogits``: the softmax, overwritten. ``scale``: upstream gradient per token, None for 1."""
        labels_t1 = self.labels(tile).unsqueeze(1)
        invalid_t1 = labels_t1 == IGNORE_INDEX
        self.subtract_targets(labels_t1, dlogits_tV)
        if scale_Pn is not None:
            dlogits_tV.mul_(scale_Pn[:, tile].reshape(-1, 1))
        # A token without label contributes exactly nothing, even if its logits are not finite.
        narrow_tV = dlogits_tV.masked_fill_(invalid_t1, 0).to(self.how.dtype)
        if self.dweight_VC is not None:
            _add_product(self.dweight_VC, narrow_tV.t(), self._h_tC)
        if self.dx_nC is None and self.dnorm_C is None:
            return
        dx_tC = self.summed(torch.mm(narrow_tV, self.weight_VC)).to(self.how.hidden_dtype)
        if self.norm_C is not None:
            assert self._rnorm_t1 is not None
            dx_tC, dnorm_C = rms_norm_backward(dx_tC, self.x_nC[tile], self.norm_C, self._rnorm_t1)
            dx_tC.masked_fill_(self.own(invalid_t1), 0)
            if self.dnorm_C is not None:
                self.dnorm_C += dnorm_C
        if self.dx_nC is not None:
            self.dx_nC[tile] = dx_tC

    def own(self, of_t1: Tensor) -> Tensor:
        """Of a number per token of the tile those of this rank's tokens."""
        return of_t1

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of x, weight and norm; the last two still wide."""
        return self.dx_nC, self.dweight_VC, self.dnorm_C


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nC: Tensor, weight_VC: Tensor, norm_C: Tensor | None, labels_Pn: Tensor, how: How, gradients: bool) -> Tensor:
        sweep = how.sweep(x_nC, weight_VC, norm_C, labels_Pn, how)
        if gradients:
            sweep.want(*ctx.needs_input_grad[:3])
        lse_Pn = torch.empty(labels_Pn.shape, dtype=sweep.wide, device=x_nC.device)
        target_Pn = torch.empty_like(lse_Pn)
        for tile in sweep.each():
            logits_tV = sweep.logits(tile)
            lse_t, target_t = sweep.statistics(tile, logits_tV)
            lse_Pn[:, tile], target_Pn[:, tile] = lse_t.view(len(labels_Pn), -1), target_t.view(len(labels_Pn), -1)
            if gradients:
                sweep.add_gradients(tile, logits_tV.sub_(lse_t.unsqueeze(1)).exp_(), None)
        ctx.save_for_backward(x_nC, weight_VC, norm_C, labels_Pn, lse_Pn)
        ctx.how = how
        ctx.ready = sweep.gradients() if gradients else None
        return (lse_Pn - target_Pn).masked_fill_(labels_Pn == IGNORE_INDEX, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_nC, weight_VC, norm_C, labels_Pn, lse_Pn = ctx.saved_tensors
        (scale_Pn,) = grads
        ready, ctx.ready = ctx.ready, None
        if ready is not None and _one_number(scale_Pn):
            dx_nC, dweight_VC, dnorm_C = (None if grad is None else grad.mul_(scale_Pn[0, 0]) for grad in ready)
        else:
            del ready
            sweep = ctx.how.sweep(x_nC, weight_VC, norm_C, labels_Pn, ctx.how)
            sweep.want(*ctx.needs_input_grad[:3])
            scale_Pn = scale_Pn.to(sweep.wide)
            with torch.autocast(x_nC.device.type, enabled=False):
                for tile in sweep.each():
                    softmax_tV = sweep.logits(tile).sub_(lse_Pn[:, tile].reshape(-1, 1)).exp_()
                    sweep.add_gradients(tile, softmax_tV, scale_Pn)
            dx_nC, dweight_VC, dnorm_C = sweep.gradients()
        dweight_VC = None if dweight_VC is None else dweight_VC.to(gradient_dtype(weight_VC))
        return dx_nC, dweight_VC, None if dnorm_C is None or norm_C is None else dnorm_C.to(norm_C.dtype), None, None, None


def _one_number(grad: Tensor) -> bool:
    """Whether all entries are the same one in memory, as the gradient of a sum or mean is: no look at values, no wait for a device."""
    return all(size == 1 or stride == 0 for size, stride in zip(grad.shape, grad.stride(), strict=True))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in the dtype of ``total``."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b)


def chunked_cross_entropy(
    x_BTC: Tensor,
    weight_VC: Tensor,
    labels_BT: Tensor,
    tile_tokens: int,
    norm: tuple[Tensor, float] | None = None,
    sweep: Callable[..., Sweep] = Sweep,
) -> Tensor:
    """Negative log likelihood per token, ``-log softmax(h @ weight^T)[label]``, 0 where the label is IGNORE_INDEX.

    ``h`` is ``x``, or with ``norm`` (weight_C, eps) its RMSNorm. float32 (float64 for float64 inputs) whatever the inputs; under
    autocast the products run in the autocast dtype. ``tile_tokens`` (at least 1) tokens of logits exist at a time. Raises
    ValueError for a smaller tile. ``sweep``: what goes over the tiles; labels may be of more tokens than ``x`` where others hold the rest,
    those of every row in the order of the ranks.
    """
    if tile_tokens < 1:
        raise ValueError(f"tile_tokens is {tile_tokens}; memory.loss_tile_tokens must be at least 1")
    device = x_BTC.device.type
    hidden_dtype = compute_dtype(x_BTC) if norm is not None else x_BTC.dtype
    dtype = torch.promote_types(hidden_dtype, weight_VC.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    norm_C, eps = (None, 0.0) if norm is None else norm
    how = How(tile_tokens, dtype, hidden_dtype, eps, sweep)
    rows, ranks = len(labels_BT), labels_BT.shape[1] // x_BTC.shape[1]
    labels_Pn = labels_BT.view(rows, ranks, -1).transpose(0, 1).reshape(ranks, -1)
    with torch.autocast(device, enabled=False):
        nll_Pn = _ChunkedCrossEntropy.apply(x_BTC.flatten(0, 1), weight_VC, norm_C, labels_Pn, how, torch.is_grad_enabled())
    nll_BT = nll_Pn.view(ranks, rows, -1).transpose(0, 1).reshape(labels_BT.shape)  # type: ignore[union-attr]
    # A copy of T numbers: FSDP2 hooks the output of its root module and warns about views.
    return nll_BT.clone()
