"""What queries see of keys that are all here: planned blocks, or a mask that is a tensor with no rule behind it.

Only a scheme that has all keys beside a rank's own queries can take such a mask (parallel/allgather_kv.py): elsewhere the queries of a
call, or its keys, are another rank's. Its queries go to the kernel a tile at a time, so that the mask as the kernels want it, additive and
in the dtype of q, is a tile's. Not differentiable by autograd but for ``attended_by``.

Legend: B batch row, H query heads, G key/value heads, n tokens of this rank, T tokens of the sequence, D head size, h query and g key/value
heads of one rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from models.attention import DEFAULT_CALL, KernelCall, Plan, attend_all, attend_all_backward, new_gradient
from models.block import BlockMask, Gradients
from models.kernels import block_attention, block_attention_backward
from parallel.comm_dtypes import AS_COMPUTED, CommDtypes

TILE = 1024
"""Queries of one call with such a mask."""


@dataclass(frozen=True)
class Planned:
    """Blocks of these queries and keys, in one place."""

    plan: Plan

    def forward(self, q_BhTD: torch.Tensor, k_BgTD: torch.Tensor, v_BgTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `parallel.by_heads.InnerAttention`."""
        return attend_all(q_BhTD, k_BgTD, v_BgTD, self.plan)

    def backward(
        self,
        dout_BhTD: torch.Tensor,
        q_BhTD: torch.Tensor,
        k_BgTD: torch.Tensor,
        v_BgTD: torch.Tensor,
        out_BhTD: torch.Tensor,
        lse_BhT: torch.Tensor,
    ) -> Gradients:
        """See `parallel.by_heads.InnerAttention`."""
        return attend_all_backward(dout_BhTD, q_BhTD, k_BgTD, v_BgTD, out_BhTD, lse_BhT, self.plan)


@dataclass(frozen=True)
class AnyMask:
    """This rank's queries against all keys; a ``parallel.by_heads.InnerAttention``. A query that sees nothing gets out 0 and gradients 0.

    ``visible_BnT``: booleans, True where a token is seen; B may be 1.
    """

    visible_BnT: torch.Tensor
    call: KernelCall = DEFAULT_CALL

    def forward(self, q_BHnD: torch.Tensor, k_BGTD: torch.Tensor, v_BGTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(out in q's dtype, lse_BHn)"""
        found = [
            block_attention(q_BHnD[:, :, rows], k_BGTD, v_BGTD, mask, self.call.scale, self.call.kernel) for rows, mask in self._tiles()
        ]
        return torch.cat([out for out, _ in found], 2), torch.cat([lse for _, lse in found], 2)

    def backward(
        self,
        dout_BHnD: torch.Tensor,
        q_BHnD: torch.Tensor,
        k_BGTD: torch.Tensor,
        v_BGTD: torch.Tensor,
        out_BHnD: torch.Tensor,
        lse_BHn: torch.Tensor,
    ) -> Gradients:
        """(dq in q's dtype, dk and dv in float32, float64 for float64)"""
        dq_BHnD, dk_BGTD, dv_BGTD = torch.empty_like(q_BHnD), new_gradient(k_BGTD), new_gradient(v_BGTD)
        for rows, mask in self._tiles():
            dout, q, out, lse = (x[:, :, rows] for x in (dout_BHnD, q_BHnD, out_BHnD, lse_BHn))
            dq, dk, dv = block_attention_backward(dout, q, k_BGTD, v_BGTD, out, lse, mask, self.call.scale, self.call.kernel)
            dq_BHnD[:, :, rows].copy_(dq)
            dk_BGTD += dk
            dv_BGTD += dv
        return dq_BHnD, dk_BGTD, dv_BGTD

    def _tiles(self) -> Iterator[tuple[slice, BlockMask]]:
        for first in range(0, self.visible_BnT.shape[1], TILE):
            rows = slice(first, first + TILE)
            yield rows, BlockMask.dense(self.visible_BnT[:, None, rows])


def check_mask(visible_BnT: torch.Tensor, rows: int, tokens: int, seq_len: int, **others: object) -> None:
    """Raise ValueError for a mask of another shape or dtype, or beside ``others`` that say what is seen."""
    asked = [name for name, value in others.items() if value is not None]
    if asked:
        raise ValueError(f"mask already says what {' and '.join(asked)} would; give one or the other")
    if visible_BnT.dtype != torch.bool or visible_BnT.ndim != 3:
        raise ValueError(f"mask must be booleans [B or 1, T/cp, T], not {visible_BnT.dtype} {tuple(visible_BnT.shape)}")
    if visible_BnT.shape[0] not in (1, rows) or visible_BnT.shape[1:] != (tokens, seq_len):
        raise ValueError(f"mask {tuple(visible_BnT.shape)} must be [B or 1, T/cp, T], here {(rows, tokens, seq_len)}")


def attended_by(
    q_BHnD: torch.Tensor, k_BGnD: torch.Tensor, v_BGnD: torch.Tensor, mask: AnyMask, comm: CommDtypes = AS_COMPUTED
) -> torch.Tensor:
    """out_BHnD of a process that holds the whole sequence; differentiable."""
    return _Alone.apply(q_BHnD, k_BGnD, v_BGnD, mask, comm)  # pyright: ignore[reportReturnType]


class _Alone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHnD, k_BGnD, v_BGnD, mask, comm):
        k, v = (comm.read(x, q_BHnD.dtype) for x in (k_BGnD, v_BGnD))
        out_BHnD, lse_BHn = mask.forward(q_BHnD, k, v)
        ctx.args = (mask, comm)
        ctx.save_for_backward(q_BHnD, k_BGnD, v_BGnD, out_BHnD, lse_BHn)
        return out_BHnD

    @staticmethod
    def backward(ctx, dout_BHnD):  # pyright: ignore[reportIncompatibleMethodOverride]
        q_BHnD, k_BGnD, v_BGnD, out_BHnD, lse_BHn = ctx.saved_tensors
        mask, comm = ctx.args
        k, v = (comm.read(x, q_BHnD.dtype) for x in (k_BGnD, v_BGnD))
        grads = mask.backward(dout_BHnD, q_BHnD, k, v, out_BHnD, lse_BHn)
        return *(grad.to(dout_BHnD.dtype) for grad in grads), None, None
