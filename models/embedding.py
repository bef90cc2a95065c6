"""The embedding table: rows by token, in the dtype of the residual stream.

A table of bfloat16 is read into a float32 stream under autocast: the sum over layers is where bfloat16 loses most (models/transformer.py).
Its gradient is summed in float32 and rounded once: a token that comes ten thousand times would stop adding to a bfloat16 sum.

Legend: B row, T token, C channel, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _WideLookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VC: Tensor, tokens_BT: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(tokens_BT)
        ctx.rows, ctx.dtype = len(weight_VC), weight_VC.dtype
        return F.embedding(tokens_BT, weight_VC).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (tokens_BT,) = ctx.saved_tensors
        total_VC = torch.ops.aten.embedding_dense_backward(grads[0].float(), tokens_BT, ctx.rows, -1, False)
        return total_VC.to(ctx.dtype), None, None


class Embedding(nn.Embedding):
    """``nn.Embedding`` without its options, for tables of few bits too."""

    def forward(self, input: Tensor) -> Tensor:
        """tokens_BT -> x_BTC: float32 (float64) under autocast, else in the table's dtype."""
        if self.weight.dtype not in (torch.bfloat16, torch.float16):
            return F.embedding(input, self.weight)
        wide = torch.is_autocast_enabled(self.weight.device.type)
        return _WideLookUp.apply(self.weight, input, torch.float32 if wide else self.weight.dtype)  # type: ignore[return-value]
