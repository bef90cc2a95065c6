"""Attention over a sequence that is spread over ranks, each with all tokens of a few heads (DeepSpeed-Ulysses, arXiv 2309.14509).

Queries, keys and values are exchanged so that a rank has the tokens of the whole group of its own heads, it attends as if alone, and the
output is exchanged back. Heads need not divide by ranks, and there may be fewer key/value heads than ranks (parallel/head_plan.py).
With ``head_chunk`` only so many query heads of each rank are exchanged, attended and returned at a time: buffers shrink accordingly,
and the next heads travel while these are computed. What is kept for backward are this rank's own q, k, v and output, as for every other
scheme, and backward exchanges them again, heads after heads: (3 Hq + 2 Hkv) in and (Hq + 2 Hkv) back of [n, D] values where forward
moves (Hq + 2 Hkv) and Hq.

What a rank does with its heads is its *inner* attention: of the whole sequence here, a ring of groups in parallel/hybrid.py.

Every rank of the group must call it together, forward and backward.

Legend: B batch row, H query heads, G key/value heads, n local tokens, T tokens of the group, D head size, h heads of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
import torch.distributed as dist

from models.attention import DEFAULT_CALL, KernelCall, LocalAttention, Plan, attend_all, attend_all_backward, check_shapes, tile_limits
from models.attention_plan import Pair, plan_rows
from models.batch import Bounds
from models.block import Gradients
from models.errors import UserError
from models.repeat import in_flight
from parallel.config import KVGradientDtype
from parallel.head_exchange import HeadExchange, Piece, ToHeads, ToTokens
from parallel.head_plan import Range, Stage, keys_are_shared, plan_stages, segments
from parallel.sequence import Layout, check_ranges
from parallel.sequence_mask import attend_public, checked_bounds, given_or_all

MESSAGES = 2
"""On their way at a time, with stages: the next heads in, and the last ones back."""
Target = tuple[torch.Tensor, bool]
"""x_BHnD that arriving heads are put into, and whether several ranks' parts of a head are added."""


class InnerAttention(Protocol):
    """What a rank computes with its own heads; the backward takes the merged out and log-sum-exp of the forward."""

    def forward(self, q_BhTD: torch.Tensor, k_BgTD: torch.Tensor, v_BgTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(out in q's dtype, lse_BhT)"""
        ...

    def backward(
        self,
        dout_BhTD: torch.Tensor,
        q_BhTD: torch.Tensor,
        k_BgTD: torch.Tensor,
        v_BgTD: torch.Tensor,
        out_BhTD: torch.Tensor,
        lse_BhT: torch.Tensor,
    ) -> Gradients:
        """(dq, dk, dv), in float32 or q's dtype"""
        ...


@dataclass(frozen=True)
class WholeSequence:
    """Attention as if alone: this rank has every token of its heads."""

    plan: Plan

    def forward(self, q_BhTD: torch.Tensor, k_BgTD: torch.Tensor, v_BgTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``InnerAttention``."""
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
        """See ``InnerAttention``."""
        return attend_all_backward(dout_BhTD, q_BhTD, k_BgTD, v_BgTD, out_BhTD, lse_BhT, self.plan)


class UlyssesAttention:
    """``(q_BHnD, k_BGnD, v_BGnD, bounds) -> out_BHnD`` over all tokens of the group's sequence; differentiable.

    Args:
        group: the sequence-parallel process group.
        layout: how its ranks share the sequence; contiguous saves a copy of what arrives.
        window: tokens a query sees, its own included; None for all before it.
        head_chunk: query heads of one rank exchanged and attended at a time; None: all of them.
        call: what the kernels are told.
        narrow: gradients of keys and values that several ranks have parts of travel in their own dtype instead of float32.
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
        narrow: bool = False,
    ) -> None:
        self.window, self.head_chunk, self.call, self.narrow = window, head_chunk, call, narrow
        self.exchange = HeadExchange(group, layout)
        self._alone = LocalAttention(window, call)

    def __call__(self, q_BHnD: torch.Tensor, k_BGnD: torch.Tensor, v_BGnD: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        if self.exchange.size == 1:
            return self._alone(q_BHnD, k_BGnD, v_BGnD, bounds)
        check_shapes(q_BHnD, k_BGnD, bounds)
        return by_heads(q_BHnD, k_BGnD, v_BGnD, self.exchange, self._inner(q_BHnD, bounds), self.head_chunk, self.narrow)

    def _inner(self, q_BHnD: torch.Tensor, bounds: Bounds) -> WholeSequence:
        """Attention of the whole sequence, planned once per micro-step."""
        limits = tile_limits(q_BHnD, self.window, self.call)
        key = ("ulysses", self.exchange.layout, self.window, self.exchange.size, limits)
        if key not in bounds._cache:
            check_ranges(bounds, self.exchange.layout, self.exchange.rank, self.exchange.size)
            whole = (0, bounds.seq_len)
            pairs = [Pair(whole, 0, whole, 0)]
            bounds._cache[key] = WholeSequence(plan_rows(bounds.documents, pairs, self.window, limits, bounds.prefixes))
        return bounds._cache[key]


def check_heads(n_heads: int, size: int) -> None:
    """Raise UserError when ``size`` ranks cannot each get a query head."""
    if n_heads < size:
        raise UserError(
            f"parallel.sequence: a Ulysses group of {size} ranks needs at least {size} query heads and model.n_heads is {n_heads}; "
            f"use parallel.sequence=ring or allgather_kv, or ring_x_ulysses with parallel.ulysses at most {n_heads}"
        )


def by_heads(
    q_BHnD: torch.Tensor,
    k_BGnD: torch.Tensor,
    v_BGnD: torch.Tensor,
    exchange: HeadExchange,
    inner: InnerAttention,
    head_chunk: int | None,
    narrow: bool = False,
) -> torch.Tensor:
    """``inner`` attention of each rank's heads over the tokens of the exchange's group; differentiable. out_BHnD in q's dtype."""
    check_heads(q_BHnD.shape[1], exchange.size)
    return _ByHeads.apply(q_BHnD, k_BGnD, v_BGnD, exchange, inner, head_chunk, narrow)  # pyright: ignore[reportReturnType]


@lru_cache(maxsize=64)
def _stages(n_heads: int, n_kv_heads: int, size: int, head_chunk: int | None) -> tuple[Stage, ...]:
    return plan_stages(n_heads, n_kv_heads, size, head_chunk)


@dataclass
class _Keys:
    """Key/value heads from ``first`` on that are here, and their gradients once there are some."""

    first: int
    k_BgTD: torch.Tensor
    v_BgTD: torch.Tensor
    dk_BgTD: torch.Tensor | None = None
    dv_BgTD: torch.Tensor | None = None

    def only(self, heads: Range) -> list[_Keys]:
        """The part that holds ``heads``; nothing where they are not here."""
        low, high = max(heads[0], self.first) - self.first, min(heads[1], self.first + self.k_BgTD.shape[1]) - self.first
        tensors = (self.k_BgTD, self.v_BgTD, self.dk_BgTD, self.dv_BgTD)
        return [_Keys(self.first + low, *(x if x is None else x[:, low:high] for x in tensors))] if high > low else []  # type: ignore[arg-type]

    def detached(self) -> _Keys:
        """A copy of the keys, so that the message that they came in can be let go."""
        return _Keys(self.first, self.k_BgTD.clone(), self.v_BgTD.clone(), self.dk_BgTD, self.dv_BgTD)


class _Turn:
    """One rank's stage: its query heads, and which keys serve them."""

    def __init__(self, stage: Stage, rank: int, per_kv: int) -> None:
        self.kv, self.arriving = stage.kv[rank], stage.arriving[rank]
        carried = self.kv[1] - self.kv[0] - (self.arriving[1] - self.arriving[0])
        self.segments = segments(stage.q[rank], self.kv, per_kv, carried)

    def keys(self, here: Sequence[_Keys], kv: Range) -> _Keys:
        """The keys of a segment."""
        (found,) = (part for keys in here for part in keys.only((self.kv[0] + kv[0], self.kv[0] + kv[1])))
        return found


class _ByHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHnD, k_BGnD, v_BGnD, exchange, inner, head_chunk, narrow):
        stages = _stages(q_BHnD.shape[1], k_BGnD.shape[1], exchange.size, head_chunk)
        per_kv = q_BHnD.shape[1] // k_BGnD.shape[1]
        out_BHnD = torch.empty_like(q_BHnD)
        lses: list[torch.Tensor] = []
        here: list[_Keys] = []
        coming = _start([q_BHnD], k_BGnD, v_BGnD, stages[0], exchange)
        returning: ToTokens | None = None
        for i, stage in enumerate(stages):
            q, k, v = coming.wait()
            if i + 1 < len(stages):
                with in_flight(MESSAGES):  # the next heads travel while these are computed
                    coming = _start([q_BHnD], k_BGnD, v_BGnD, stages[i + 1], exchange)
            turn = _Turn(stage, exchange.rank, per_kv)
            here.append(_Keys(turn.arriving[0], k, v))
            out, lse = _attend(q, here, turn, inner)
            _collect(returning, [(out_BHnD, False)])
            with in_flight(MESSAGES if i + 1 < len(stages) else 0):
                returning = exchange.start_to_tokens([Piece([out], stage.q)], q_BHnD.shape[2])
            lses.append(lse)
            here = _kept(here, turn.kv, stage.leaving[exchange.rank])
        _collect(returning, [(out_BHnD, False)])
        ctx.args = (exchange, inner, stages, narrow)
        lse_BhT = lses[0] if len(lses) == 1 else torch.cat(lses, 1)
        ctx.save_for_backward(q_BHnD, k_BGnD, v_BGnD, out_BHnD, lse_BhT)
        return out_BHnD

    @staticmethod
    def backward(ctx, dout_BHnD):  # pyright: ignore[reportIncompatibleMethodOverride]
        q_BHnD, k_BGnD, v_BGnD, out_BHnD, lse_BhT = ctx.saved_tensors
        exchange, inner, stages, narrow = ctx.args
        lses = lse_BhT.split([last - first for first, last in (stage.q[exchange.rank] for stage in stages)], dim=1)
        n, per_kv = q_BHnD.shape[2], q_BHnD.shape[1] // k_BGnD.shape[1]
        shared = keys_are_shared(q_BHnD.shape[1], k_BGnD.shape[1], exchange.size)
        dq_BHnD = torch.empty_like(q_BHnD)
        # Parts of one head's gradient that come from several ranks are added in float32, and unless ``narrow`` rounded once.
        wide = torch.promote_types(k_BGnD.dtype, torch.float32) if shared else k_BGnD.dtype
        dk_BGnD, dv_BGnD = (torch.zeros_like(x, dtype=wide) if shared else torch.empty_like(x) for x in (k_BGnD, v_BGnD))
        here: list[_Keys] = []
        queries = [q_BHnD, out_BHnD, dout_BHnD]
        coming = _start(queries, k_BGnD, v_BGnD, stages[0], exchange)
        targets = [(dq_BHnD, False), (dk_BGnD, shared), (dv_BGnD, shared)]
        returning: list[tuple[ToTokens, list[Target]]] = []
        for i, stage in enumerate(stages):
            q, out, dout, k, v = coming.wait()
            if i + 1 < len(stages):
                with in_flight(MESSAGES):
                    coming = _start(queries, k_BGnD, v_BGnD, stages[i + 1], exchange)
            turn = _Turn(stage, exchange.rank, per_kv)
            here.append(_Keys(turn.arriving[0], k, v))
            dq = _attend_backward(dout, q, out, lses[i], here, turn, inner)
            leaving = [part for keys in here for part in keys.only(stage.leaving[exchange.rank])]
            here = _kept(here, turn.kv, stage.leaving[exchange.rank])
            for message, into in returning:
                _collect(message, into)
            nothing = k.new_empty(k[:, :0].shape, dtype=k.dtype if narrow else wide)
            with in_flight(MESSAGES if i + 1 < len(stages) else 0):
                returning = _return(dq, leaving, nothing, stage, exchange, n, targets)
        for message, into in returning:
            _collect(message, into)
        return dq_BHnD, dk_BGnD.to(k_BGnD.dtype), dv_BGnD.to(v_BGnD.dtype), None, None, None, None


def _start(queries: Sequence[torch.Tensor], k_BGnD: torch.Tensor, v_BGnD: torch.Tensor, stage: Stage, exchange: HeadExchange) -> ToHeads:
    """Send a stage's heads of ``queries``, and the keys that are not there yet."""
    pieces = [Piece([x_BHnD], stage.q) for x_BHnD in queries]
    return exchange.start_to_heads([*pieces, Piece([k_BGnD], stage.arriving), Piece([v_BGnD], stage.arriving)])


def _attend(q_BhTD: torch.Tensor, here: Sequence[_Keys], turn: _Turn, inner: InnerAttention) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a stage's heads."""
    found = []
    for (first, last), kv in turn.segments:
        keys = turn.keys(here, kv)
        found.append(inner.forward(q_BhTD[:, first:last], keys.k_BgTD, keys.v_BgTD))
    if not found:
        return torch.empty_like(q_BhTD), q_BhTD.new_empty(q_BhTD.shape[:3], dtype=torch.promote_types(q_BhTD.dtype, torch.float32))
    if len(found) == 1:
        return found[0]
    return torch.cat([out for out, _ in found], 1), torch.cat([lse for _, lse in found], 1)


def _attend_backward(
    dout_BhTD: torch.Tensor,
    q_BhTD: torch.Tensor,
    out_BhTD: torch.Tensor,
    lse_BhT: torch.Tensor,
    here: Sequence[_Keys],
    turn: _Turn,
    inner: InnerAttention,
) -> torch.Tensor:
    """dq of a stage's heads in q's dtype; dk and dv are left with the keys in ``here``."""
    dqs = [torch.empty_like(q_BhTD[:, :0])]
    for keys in here:
        if keys.dk_BgTD is None:
            wide = torch.promote_types(q_BhTD.dtype, torch.float32)
            keys.dk_BgTD, keys.dv_BgTD = (torch.zeros_like(x, dtype=wide) for x in (keys.k_BgTD, keys.v_BgTD))
    for (first, last), kv in turn.segments:
        keys = turn.keys(here, kv)
        heads = slice(first, last)
        of_queries = (x[:, heads] for x in (out_BhTD, lse_BhT))
        dq, dk, dv = inner.backward(dout_BhTD[:, heads], q_BhTD[:, heads], keys.k_BgTD, keys.v_BgTD, *of_queries)
        assert keys.dk_BgTD is not None and keys.dv_BgTD is not None
        keys.dk_BgTD += dk
        keys.dv_BgTD += dv
        dqs.append(dq.to(q_BhTD.dtype))
    return dqs[1] if len(dqs) == 2 else torch.cat(dqs, 1)


def _kept(here: Sequence[_Keys], kv: Range, leaving: Range) -> list[_Keys]:
    """The keys that the next stage reads too: of this stage's heads the last one at most."""
    if leaving[1] - leaving[0] == kv[1] - kv[0]:
        return []
    return [part.detached() for keys in here for part in keys.only((kv[1] - 1, kv[1]))]


def _return(
    dq_BhTD: torch.Tensor,
    leaving: Sequence[_Keys],
    nothing_BgTD: torch.Tensor,
    stage: Stage,
    exchange: HeadExchange,
    n: int,
    targets: list[Target],
) -> list[tuple[ToTokens, list[Target]]]:
    """Send dq and the finished dk, dv home: in one message, or in two where they differ in dtype. ``nothing``: no heads, in dk's dtype."""
    dtype = nothing_BgTD.dtype
    parts = [[x.to(dtype) for keys in leaving if (x := of(keys)) is not None] for of in (lambda k: k.dk_BgTD, lambda k: k.dv_BgTD)]
    dq_piece = Piece([dq_BhTD], stage.q)
    dkv_pieces = [Piece(part or [nothing_BgTD], stage.leaving) for part in parts]
    if dtype == dq_BhTD.dtype:
        return [(exchange.start_to_tokens([dq_piece, *dkv_pieces], n), targets)]
    first = (exchange.start_to_tokens([dq_piece], n), targets[:1])
    if not any(high > low for low, high in stage.leaving):
        return [first]
    return [first, (exchange.start_to_tokens(dkv_pieces, n), targets[1:])]


def _collect(message: ToTokens | None, targets: Sequence[Target]) -> None:
    """Put what arrives into ``targets``."""
    if message is None:
        return
    for (target_BHnD, add), parts in zip(targets, message.wait(), strict=True):
        for (low, high), values_BhnD in parts:
            into_BhnD = target_BHnD[:, low:high]
            into_BhnD.add_(values_BhnD) if add else into_BhnD.copy_(values_BhnD)


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
        kv_gradient_dtype: in which gradients of keys and values travel; ``compute``: theirs, half of fp32's bytes in bf16.
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
    call = KernelCall(kernel, scale)
    scheme = (
        LocalAttention(window, call)
        if bounds.local_len == bounds.seq_len
        else UlyssesAttention(given_or_all(group), layout, window, head_chunk, call, kv_gradient_dtype == "compute")
    )
    return attend_public(scheme, q, k, v, bounds)
