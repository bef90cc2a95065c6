"""Attention over a sequence that is spread over ranks, with the keys of the whole sequence gathered a few heads at a time.

Queries stay. The keys and values of ``head_chunk`` key/value heads are gathered from all ranks (as Llama 3 does, arXiv 2407.21783), all
queries that read them attend in one call over all keys, and meanwhile the next heads are gathered. Backward gathers again and
reduce-scatters the float32 gradients. The blocks of a query range are one square and one rectangle whatever the number of ranks.

Every rank of the group must call it together, forward and backward.

Legend: B batch row, H query heads, G key/value heads, g of them at a time, n local tokens, T tokens of the sequence, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch
import torch.distributed as dist

from models.attention import DEFAULT_CALL, KernelCall, LocalAttention, check_shapes, tile_limits
from models.attention_plan import Pair, plan_rows
from models.batch import Bounds
from models.repeat import in_flight
from parallel.comm_dtypes import AS_COMPUTED, CommDtypes, checked_dtypes
from parallel.config import KVDtype, KVGradientDtype
from parallel.head_exchange import HeadExchange
from parallel.sequence import Layout, check_ranges
from parallel.sequence_mask import attend_public, checked_bounds, given_or_all
from parallel.visible import AnyMask, Planned, attended_by, check_mask


class AllGatherKVAttention:
    """``(q_BHnD, k_BGnD, v_BGnD, bounds) -> out_BHnD`` over all tokens of the group's sequence; differentiable.

    Args:
        group: the sequence-parallel process group.
        layout: how its ranks share the sequence; zigzag gives every rank the same work.
        window: tokens a query sees, its own included; None for all before it.
        head_chunk: key/value heads gathered and attended at a time.
        call: what the kernels are told.
        comm: dtypes in which keys, values and their gradients travel, and in which the latter are summed.
        mask: which tokens are seen, instead of ``window`` and what bounds say (parallel/visible.py).
    Raises (on call):
        ValueError: when tensors or bounds are not this rank's part of the sequence.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        layout: Layout,
        window: int | None,
        head_chunk: int = 1,
        call: KernelCall = DEFAULT_CALL,
        comm: CommDtypes = AS_COMPUTED,
        mask: AnyMask | None = None,
    ) -> None:
        if head_chunk < 1:
            raise ValueError(f"head_chunk is {head_chunk}; at least 1 key/value head is gathered at a time")
        self.window, self.head_chunk, self.call, self.comm = window, head_chunk, call, comm
        self.mask = mask
        self.exchange = HeadExchange(group, layout)
        self._alone = LocalAttention(window, call, comm.keys)

    def __call__(self, q_BHnD: torch.Tensor, k_BGnD: torch.Tensor, v_BGnD: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        if self.exchange.size == 1:
            if self.mask is not None:
                return attended_by(q_BHnD, k_BGnD, v_BGnD, self.mask, self.comm)
            return self._alone(q_BHnD, k_BGnD, v_BGnD, bounds)
        check_shapes(q_BHnD, k_BGnD, bounds)
        seen = self.mask or self._plan(q_BHnD, bounds)
        return _AllGatherKV.apply(q_BHnD, k_BGnD, v_BGnD, seen, self.exchange, self.head_chunk, self.comm)  # pyright: ignore[reportReturnType]

    def _plan(self, q_BHnD: torch.Tensor, bounds: Bounds) -> Planned:
        """This rank's queries against all keys, planned once per micro-step."""
        limits = tile_limits(q_BHnD, self.window, self.call)
        key = ("allgather kv", self.exchange.layout, self.window, self.exchange.size, limits)
        if key not in bounds._cache:
            check_ranges(bounds, self.exchange.layout, self.exchange.rank, self.exchange.size)
            pairs = []
            for held, offset in zip(bounds.ranges, accumulate((end - start for start, end in bounds.ranges), initial=0), strict=False):
                pairs.append(Pair(held, offset, held, held[0]))
                if held[0]:
                    pairs.append(Pair(held, offset, (0, held[0]), 0))
                if held[1] < bounds.seq_len:  # seen only where a prefix is
                    pairs.append(Pair(held, offset, (held[1], bounds.seq_len), held[1]))
            bounds._cache[key] = Planned(plan_rows(bounds.documents, pairs, self.window, limits, bounds.prefixes))
        return bounds._cache[key]


class _AllGatherKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHnD, k_BGnD, v_BGnD, seen, exchange, head_chunk, comm):
        out_BHnD = torch.empty_like(q_BHnD)
        lses = []
        for _, queries, k, v in _gathered(q_BHnD, k_BGnD, v_BGnD, exchange, comm, head_chunk, messages=1):
            out, lse = seen.forward(q_BHnD[:, queries], k, v)
            out_BHnD[:, queries].copy_(out)
            lses.append(lse)
        lse_BHn = lses[0] if len(lses) == 1 else torch.cat(lses, 1)
        ctx.args = (seen, exchange, head_chunk, comm)
        ctx.save_for_backward(q_BHnD, k_BGnD, v_BGnD, out_BHnD, lse_BHn)
        return out_BHnD

    @staticmethod
    def backward(ctx, dout_BHnD):  # pyright: ignore[reportIncompatibleMethodOverride]
        q_BHnD, k_BGnD, v_BGnD, out_BHnD, lse_BHn = ctx.saved_tensors
        seen, exchange, head_chunk, comm = ctx.args
        dq_BHnD, dk_BGnD, dv_BGnD = (torch.empty_like(x) for x in (q_BHnD, k_BGnD, v_BGnD))
        returning: _Scatter | None = None
        for heads, queries, k, v in _gathered(q_BHnD, k_BGnD, v_BGnD, exchange, comm, head_chunk, messages=2):
            dout, q, out, lse = (x[:, queries] for x in (dout_BHnD, q_BHnD, out_BHnD, lse_BHn))
            dq, dk, dv = seen.backward(dout, q, k, v, out, lse)
            dq_BHnD[:, queries].copy_(dq)
            if returning is not None:
                returning.put()
            with in_flight(2 if heads.stop < k_BGnD.shape[1] else 0):
                returning = _Scatter(dk, dv, exchange, (dk_BGnD[:, heads], dv_BGnD[:, heads]), comm.gradient(q_BHnD.dtype))
        if returning is not None:
            returning.put()
        return dq_BHnD, dk_BGnD, dv_BGnD, None, None, None, None


def _gathered(
    q_BHnD: torch.Tensor,
    k_BGnD: torch.Tensor,
    v_BGnD: torch.Tensor,
    exchange: HeadExchange,
    comm: CommDtypes,
    head_chunk: int,
    messages: int,
) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
    """(key/value heads, their query heads, k_BgTD, v_BgTD in global order), chunk after chunk; the next is gathered during
    each, when ``messages`` are on their way."""
    n_kv_heads, per_kv = k_BGnD.shape[1], q_BHnD.shape[1] // k_BGnD.shape[1]
    chunks = [slice(first, min(first + head_chunk, n_kv_heads)) for first in range(0, n_kv_heads, head_chunk)]
    coming = _Gather(k_BGnD[:, chunks[0]], v_BGnD[:, chunks[0]], exchange, comm)
    for i, heads in enumerate(chunks):
        k, v = coming.wait()
        if i + 1 < len(chunks):
            with in_flight(messages):
                coming = _Gather(k_BGnD[:, chunks[i + 1]], v_BGnD[:, chunks[i + 1]], exchange, comm)
        yield heads, slice(heads.start * per_kv, heads.stop * per_kv), k, v


class _Gather:
    """Keys and values of a few heads, on their way from all ranks."""

    def __init__(self, k_BgnD: torch.Tensor, v_BgnD: torch.Tensor, exchange: HeadExchange, comm: CommDtypes) -> None:
        self._exchange, self._dtype = exchange, k_BgnD.dtype
        own_nBgD = torch.cat([comm.sent(x.permute(2, 0, 1, 3)) for x in (k_BgnD, v_BgnD)], 2)  # token after token
        self._all_PnBgD = own_nBgD.new_empty(exchange.size, *own_nBgD.shape)
        self._sent_nBgD: torch.Tensor | None = own_nBgD
        self._work = dist.all_gather(list(self._all_PnBgD.unbind(0)), own_nBgD, group=exchange.group, async_op=True)

    def wait(self) -> tuple[torch.Tensor, torch.Tensor]:
        """k_BgTD, v_BgTD in global order."""
        if self._work is not None:
            self._work.wait()
        self._work = self._sent_nBgD = None  # gone, and free
        k_TBgD, v_TBgD = self._exchange.in_global_order(self._all_PnBgD.flatten(0, 1), self._dtype).chunk(2, dim=2)
        return k_TBgD.permute(1, 2, 0, 3), v_TBgD.permute(1, 2, 0, 3)


class _Scatter:
    """Gradients of a few heads' keys and values of all tokens, on their way home to be summed in ``dtype``."""

    def __init__(
        self,
        dk_BgTD: torch.Tensor,
        dv_BgTD: torch.Tensor,
        exchange: HeadExchange,
        targets: tuple[torch.Tensor, torch.Tensor],
        dtype: torch.dtype,
    ) -> None:
        both_TBgD = torch.cat([x.permute(2, 0, 1, 3).to(dtype) for x in (dk_BgTD, dv_BgTD)], 2)
        by_rank = list(exchange.by_rank(both_TBgD).unflatten(0, (exchange.size, -1)).unbind(0))
        self._sent: list[torch.Tensor] | None = by_rank
        self._own_nBgD = torch.empty_like(by_rank[0])
        self._targets = targets
        self._work = dist.reduce_scatter(self._own_nBgD, by_rank, group=exchange.group, async_op=True)

    def put(self) -> None:
        """Wait, and write this rank's tokens' sums into the targets, rounded once."""
        if self._work is not None:
            self._work.wait()
        self._work = self._sent = None
        for target_BgnD, own_nBgD in zip(self._targets, self._own_nBgD.chunk(2, dim=2), strict=True):
            target_BgnD.copy_(own_nBgD.permute(1, 2, 0, 3))


def allgather_kv_attention(
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
    head_chunk: int = 1,
    mask: torch.Tensor | None = None,
    bounds: Bounds | None = None,
) -> torch.Tensor:
    """Attention with keys and values gathered a few heads at a time. All ranks of the group call it together; autograd works.

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
        head_chunk: key/value heads gathered and attended at a time.
        mask: [B or 1, T/cp, T] booleans, True where one of this rank's tokens sees a token of the whole sequence (in its order, whatever
            the layout), instead of all else that says so: any mask, at the cost of all scores. Tokens that see nothing get 0.
        bounds: of this batch (``parallel.sequence_mask.sequence_bounds``), instead of causal, document_ids and prefix, which are
            otherwise gathered from all ranks at every call.
    Returns:
        [B, T/cp, Hq, D] in q's dtype.
    Raises:
        ValueError, UserError: for tensors, masks, heads or kernels that do not go together; see ``sequence_bounds``.
    """
    given = bounds
    bounds = checked_bounds(
        (q, k, v), group, bounds, causal=causal, window=window, document_ids=document_ids, prefix=prefix, layout=layout, kernel=kernel
    )
    call, comm = KernelCall(kernel, scale), checked_dtypes(kv_dtype, kv_gradient_dtype, q.dtype)
    seen = None
    if mask is not None:
        said = {"window": window, "document_ids": document_ids, "prefix": prefix, "bounds": given, "causal=False": None if causal else True}
        check_mask(mask, q.shape[0], q.shape[1], bounds.seq_len, **said)
        seen = AnyMask(mask, call)
    scheme = (
        LocalAttention(window, call, comm.keys)
        if bounds.local_len == bounds.seq_len
        else AllGatherKVAttention(given_or_all(group), layout, window, head_chunk, call, comm, seen)
    )
    if seen is not None and bounds.local_len == bounds.seq_len:
        return attended_by(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen, comm).transpose(1, 2)
    return attend_public(scheme, q, k, v, bounds)
