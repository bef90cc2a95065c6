"""Attention over a sequence that is spread over ranks, each with all tokens of a few heads (DeepSpeed-Ulysses, arXiv 2309.14509).

Queries, keys and values are exchanged so that a rank has the tokens of the whole group of its own heads, it attends as if alone, and the
output is exchanged back. Heads need not divide by ranks, and there may be fewer key/value heads than ranks (parallel/head_plan.py).
With ``head_chunk`` only so many query heads of each rank are exchanged, attended and returned at a time (parallel/by_heads.py): buffers
shrink accordingly, and the next heads travel while these are computed. What is kept for backward are this rank's own q, k, v and output,
as for every other scheme, and backward exchanges them again, heads after heads: (3 Hq + 2 Hkv) in and (Hq + 2 Hkv) back of [n, D] values
where forward moves (Hq + 2 Hkv) and Hq. Where q, k and v are not kept but made again, ``by_stages`` lets each stage project its own.

Every rank of the group must call it together, forward and backward.

Legend: B batch row, H query heads, G key/value heads, n local tokens, T tokens of the group, D head size, h heads of one rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from models.attention import DEFAULT_CALL, KernelCall, LocalAttention, check_shapes, tile_limits
from models.attention_plan import Pair, plan_rows
from models.batch import Bounds
from parallel.by_heads import ByHeads, by_heads
from parallel.comm_dtypes import AS_COMPUTED, CommDtypes, checked_dtypes
from parallel.config import KVDtype, KVGradientDtype
from parallel.head_exchange import HeadExchange
from parallel.sequence import Layout, check_ranges
from parallel.sequence_mask import attend_public, checked_bounds, given_or_all
from parallel.visible import Planned


class UlyssesAttention:
    """``(q_BHnD, k_BGnD, v_BGnD, bounds) -> out_BHnD`` over all tokens of the group's sequence; differentiable.

    Args:
        group: the sequence-parallel process group.
        layout: how its ranks share the sequence; contiguous saves a copy of what arrives.
        window: tokens a query sees, its own included; None for all before it.
        head_chunk: query heads of one rank exchanged and attended at a time; None: all of them.
        call: what the kernels are told.
        comm: dtypes in which keys, values and their gradients travel.
    Raises (on call):
        UserError: when there are fewer query heads than ranks.
        ValueError: when tensors or bounds are not this rank's part of the sequence.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        layout: Layout,
        window: int | None,
        head_chunk: int | None = None,
        call: KernelCall = DEFAULT_CALL,
        comm: CommDtypes = AS_COMPUTED,
    ) -> None:
        self.window, self.head_chunk, self.call, self.comm = window, head_chunk, call, comm
        self.exchange = HeadExchange(group, layout)
        self._alone = LocalAttention(window, call, comm.keys)

    def __call__(self, q_BHnD: torch.Tensor, k_BGnD: torch.Tensor, v_BGnD: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        if self.exchange.size == 1:
            return self._alone(q_BHnD, k_BGnD, v_BGnD, bounds)
        return by_heads(q_BHnD, k_BGnD, v_BGnD, self._how(q_BHnD, k_BGnD, bounds))

    def by_stages(self, q_BHnD: torch.Tensor, k_BGnD: torch.Tensor, bounds: Bounds) -> ByHeads | None:
        """How heads that are projected in stages are attended with, or None where there are no stages. Of q and k only shape, dtype and
        device are looked at."""
        staged = self.exchange.size > 1 and self.head_chunk is not None
        return self._how(q_BHnD, k_BGnD, bounds) if staged else None

    def _how(self, q_BHnD: torch.Tensor, k_BGnD: torch.Tensor, bounds: Bounds) -> ByHeads:
        check_shapes(q_BHnD, k_BGnD, bounds)
        heads = (q_BHnD.shape[1], k_BGnD.shape[1])
        return ByHeads(self.exchange, self._inner(q_BHnD, bounds), *heads, self.head_chunk, self.comm)

    def _inner(self, q_BHnD: torch.Tensor, bounds: Bounds) -> Planned:
        """Attention of the whole sequence, planned once per micro-step."""
        limits = tile_limits(q_BHnD, self.window, self.call)
        key = ("ulysses", self.exchange.layout, self.window, self.exchange.size, limits)
        if key not in bounds._cache:
            check_ranges(bounds, self.exchange.layout, self.exchange.rank, self.exchange.size)
            whole = (0, bounds.seq_len)
            pairs = [Pair(whole, 0, whole, 0)]
            bounds._cache[key] = Planned(plan_rows(bounds.documents, pairs, self.window, limits, bounds.prefixes))
        return bounds._cache[key]


def ulysses_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: dist.ProcessGroup | None,
    causal: bool = True,
    window: int | None = None,
    document_ids: torch.Tensor | None = None,
    layout: Layout = "zigzag",
    kernel: str = "auto",
    prefix: torch.Tensor | None = None,
    scale: float | None = None,
    kv_dtype: KVDtype = "compute",
    kv_gradient_dtype: KVGradientDtype = "fp32",
    head_chunk: int | None = None,
    bounds: Bounds | None = None,
) -> torch.Tensor:
    """Attention with heads exchanged for tokens. All ranks of the group call it together; autograd works.

    Args:
        q: [B, T/cp, Hq, D], this rank's tokens (``parallel.sequence.shard_sequence``).
        k, v: [B, T/cp, Hkv, D]; Hq is a multiple of Hkv.
        group: the ranks that share the sequence; None: all ranks, or this process alone where there are no others.
        causal: False: every token sees all of its document.
        window: keys a query sees, its own included, on either side; None for all.
        document_ids: [B, T/cp] integers that never decrease along the sequence; tokens see their own document only. Padding is a
            document of its own.
        layout: which tokens are whose, ``zigzag`` or ``contiguous``.
        kernel: one of ``models.kernels.KERNELS``.
        prefix: [B, T/cp] booleans, True for the tokens that a document begins with and that all of its tokens see.
        scale: of the scores; None: 1/sqrt(D).
        kv_dtype: in which keys and values travel: ``compute`` (theirs), or ``fp32`` or ``bf16`` where that is narrower: they are rounded to
            it once, this rank's own too, so that the result is the same at any number of ranks, one included.
        kv_gradient_dtype: in which gradients of keys and values travel; ``compute`` (theirs) or ``bf16``: fewer bytes than ``fp32``.
        head_chunk: query heads of one rank exchanged and attended at a time; None: all of them.
        bounds: of this batch (``parallel.sequence_mask.sequence_bounds``), instead of causal, document_ids and prefix, which are
            otherwise gathered from all ranks at every call.
    Returns:
        [B, T/cp, Hq, D] in q's dtype.
    Raises:
        ValueError, UserError: for tensors, masks, heads or kernels that do not go together; see ``sequence_bounds``.
    """
    bounds = checked_bounds(
        (q, k, v), group, bounds, causal=causal, window=window, document_ids=document_ids, prefix=prefix, layout=layout, kernel=kernel
    )
    call, comm = KernelCall(kernel, scale), checked_dtypes(kv_dtype, kv_gradient_dtype, q.dtype)
    scheme = (
        LocalAttention(window, call, comm.keys)
        if bounds.local_len == bounds.seq_len
        else UlyssesAttention(given_or_all(group), layout, window, head_chunk, call, comm)
    )
    return attend_public(scheme, q, k, v, bounds)
