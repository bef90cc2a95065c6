"""Exact attention over a sequence that is spread over ranks: the seam ``Attention.inner_attention`` filled by parallel.

Keys and values travel, queries stay (Liu et al. 2023, arXiv 2310.01889): while a rank computes with the keys it has, the
next ones are on their way. Blocks are merged in float32, so that the error does not grow with the number of ranks. In the
backward pass keys and values travel again, and their float32 gradients follow one hop behind and return home while a rank computes
with its own keys, which come last there. A window not longer than a shard moves only the tokens it needs (parallel/halo.py). Which
blocks exist comes from models/attention_plan.py: documents, prefixes and windows are exact in every case, and hops that no rank needs
are not made.

Every rank of the group must call it together, forward and backward.

Legend: B batch row, H query heads, G key/value heads, T local tokens, S received tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from models.attention import (
    DEFAULT_CALL,
    KernelCall,
    LocalAttention,
    Plan,
    attend,
    attend_backward,
    calls_of,
    check_shapes,
    new_accumulators,
    new_gradient,
    tile_limits,
)
from models.attention_plan import TileLimits
from models.batch import Bounds
from models.block import Gradients
from models.repeat import turns
from parallel.comm_dtypes import AS_COMPUTED, CommDtypes, checked_dtypes
from parallel.config import KVDtype, KVGradientDtype
from parallel.halo import start_halo, start_return
from parallel.ring_links import KEY_TAG, VALUE_TAG, Links, Transfer, Travelling
from parallel.ring_plan import HaloPlan, RingPlan, fits_halo, plan_halo, plan_ring
from parallel.sequence import Layout, check_ranges, ranges_for
from parallel.sequence_mask import attend_public, checked_bounds, given_or_all


class RingAttention:
    """``(q_BHTD, k_BGTD, v_BGTD, bounds) -> out_BHTD`` over all tokens of the group's sequence; differentiable.

    Args:
        group: the sequence-parallel process group.
        layout: how its ranks share the sequence.
        window: tokens a query sees, its own included; None for all before it.
        call: what the kernels are told.
        comm: dtypes in which keys, values and their gradients travel.
        rings: for a double ring (inner, outer): neighbouring ranks of ``group``, and those with this one's place among theirs.
    Raises (on call):
        ValueError: when tensors or bounds are not this rank's part of the sequence.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        layout: Layout,
        window: int | None,
        call: KernelCall = DEFAULT_CALL,
        comm: CommDtypes = AS_COMPUTED,
        rings: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None,
    ) -> None:
        self.group = group
        self.links = Links(group, *(rings or ()))
        self.layout: Layout = layout
        self.window, self.call, self.comm = window, call, comm
        self.cp_rank, self.cp_size = dist.get_rank(group), dist.get_world_size(group)
        self._alone = LocalAttention(window, call, comm.keys)

    def __call__(self, q_BHTD: torch.Tensor, k_BGTD: torch.Tensor, v_BGTD: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        if self.cp_size == 1:
            return self._alone(q_BHTD, k_BGTD, v_BGTD, bounds)
        check_shapes(q_BHTD, k_BGTD, bounds)
        plan = self._plan(bounds, tile_limits(q_BHTD, self.window, self.call))._replace(comm=self.comm)
        if isinstance(plan, HaloPlan):
            return _HaloAttention.apply(q_BHTD, k_BGTD, v_BGTD, plan, bounds, self.layout, self.group)  # pyright: ignore[reportReturnType]
        return _RingAttention.apply(q_BHTD, k_BGTD, v_BGTD, plan, self.links)  # pyright: ignore[reportReturnType]

    def _plan(self, bounds: Bounds, limits: TileLimits) -> RingPlan | HaloPlan:
        """The plan of this rank, made once per micro-step and shared by all layers with the same window."""
        key = ("ring attention", self.layout, self.window, self.cp_size, self.links.width, limits)
        if key not in bounds._cache:
            check_ranges(bounds, self.layout, self.cp_rank, self.cp_size)
            held = [ranges_for(self.layout, bounds.seq_len, r, self.cp_size, bounds.documents) for r in range(self.cp_size)]
            if fits_halo(self.window, bounds) and self.layout != "per_document":
                assert self.window is not None
                bounds._cache[key] = plan_halo(held, self.cp_rank, bounds.documents, self.window, limits)
            else:
                width = self.links.width
                bounds._cache[key] = plan_ring(held, self.cp_rank, bounds.documents, self.window, limits, bounds.prefixes, width)
        return bounds._cache[key]


def _hops(plan: RingPlan, x: torch.Tensor, alone: int, width: int) -> Iterator[int]:
    """All hops; of equal ones in a row only some where ``x`` has no values (``models/repeat.py``). The last, the first ``alone`` and the
    edges of a turn of the inner ring are like no other."""
    last = len(plan.hops) - 1
    return turns(range(last + 1), x, lambda hop: (plan.hops[hop], min(hop, alone), hop == last, hop % width == 0, (hop + 1) % width == 0))


def ring_forward(
    q_BHTD: torch.Tensor, k_BGTD: torch.Tensor, v_BGTD: torch.Tensor, plan: RingPlan, links: Links
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out_BHTD in q's dtype, lse_BHT)`` over the keys of all hops; the next keys are on their way while a hop computes."""
    out_BHTD, lse_BHT = new_accumulators(q_BHTD)
    attend_around(q_BHTD, plan.comm.both(k_BGTD, v_BGTD), plan, links, out_BHTD, lse_BHT)
    return out_BHTD.to(q_BHTD.dtype), lse_BHT


def attend_around(
    q_BHTD: torch.Tensor, kv_2BGSD: torch.Tensor, plan: RingPlan, links: Links, out_BHTD: torch.Tensor, lse_BHT: torch.Tensor
) -> None:
    """Merge the keys and values of all hops into the accumulators, in place. ``kv``: the own ones, as they travel."""
    last_hop = len(plan.hops) - 1
    travelling = Travelling(links, last_hop)
    for hop in _hops(plan, q_BHTD, 1, links.width):
        if hop:
            kv_2BGSD = travelling.wait(hop)
        travelling.start(kv_2BGSD, hop)
        read_2BGSD = kv_2BGSD.to(q_BHTD.dtype)
        attend(q_BHTD, read_2BGSD[0], read_2BGSD[1], plan.hops[hop], out_BHTD, lse_BHT)
        del read_2BGSD


def ring_backward(
    dout_BHTD: torch.Tensor,
    q_BHTD: torch.Tensor,
    k_BGTD: torch.Tensor,
    v_BGTD: torch.Tensor,
    out_BHTD: torch.Tensor,
    lse_BHT: torch.Tensor,
    plan: RingPlan,
    links: Links,
) -> Gradients:
    """``(dq_BHTD, dk_BGTD, dv_BGTD)`` in float32 (float64 for float64), for what ``ring_forward`` gave."""
    dq_BHTD = new_gradient(q_BHTD)
    return dq_BHTD, *backward_around(dout_BHTD, q_BHTD, k_BGTD, v_BGTD, out_BHTD, lse_BHT, plan, links, dq_BHTD)


def backward_around(
    dout_BHTD: torch.Tensor,
    q_BHTD: torch.Tensor,
    k_BGTD: torch.Tensor,
    v_BGTD: torch.Tensor,
    out_BHTD: torch.Tensor,
    lse_BHT: torch.Tensor,
    plan: RingPlan,
    links: Links,
    dq_BHTD: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(dk_BGTD, dv_BGTD)`` of these keys of this rank (as they were made, or as they travel), for what ``attend_around`` gave; adds to
    ``dq_BHTD``."""
    comm = plan.comm
    last_hop = len(plan.hops) - 1
    followers = None  # gradients of the keys in hand, from the ranks that had them before; one hop behind the keys
    travelling = Travelling(links, last_hop)
    if last_hop:
        travelling.start(comm.both(k_BGTD, v_BGTD), 0)
    for hop in _hops(plan, q_BHTD, 2, links.width):  # gradients follow from the second hop on
        if hop == 0:
            continue
        # The keys in hand are an argument of each step, never what was saved: those are this rank's own, at every hop.
        kv_2BGSD = travelling.wait(hop)
        travelling.start(kv_2BGSD, hop)
        kv_2BGSD = kv_2BGSD.to(q_BHTD.dtype)
        sums = _Sums(kv_2BGSD.shape, q_BHTD, plan.hops[hop], followers)
        followers = None
        attend_backward(dout_BHTD, q_BHTD, kv_2BGSD[0], kv_2BGSD[1], out_BHTD, lse_BHT, plan.hops[hop], dq_BHTD, sums.own)
        del kv_2BGSD
        dkv_2BGSD = sums.whole()
        followers = links.gradients(dkv_2BGSD.to(comm.gradient(q_BHTD.dtype)), hop, last_hop)
        del dkv_2BGSD, sums
    # The own keys come last: their gradients take no room before, and the others' way home is hidden behind them.
    k_BGTD, v_BGTD = (comm.read(x, q_BHTD.dtype) for x in (k_BGTD, v_BGTD))
    sums = _Sums(torch.Size((2, *k_BGTD.shape)), q_BHTD, plan.hops[0], followers)
    del followers
    attend_backward(dout_BHTD, q_BHTD, k_BGTD, v_BGTD, out_BHTD, lse_BHT, plan.hops[0], dq_BHTD, sums.own)
    dk_BGTD, dv_BGTD = sums.whole()
    return dk_BGTD, dv_BGTD


class _Sums:
    """dkv_2BGSD of the keys in hand, in float32 (float64 for float64): what this rank finds, and what ``arriving`` brings.

    What a single call of a kernel finds is added to what has arrived by then; several calls begin with zeros, so that none but the last
    waits for a message.
    """

    def __init__(self, shape: torch.Size, q_BHTD: torch.Tensor, plan: Plan, arriving: Transfer | None) -> None:
        self._arriving, self._dtype = arriving, torch.promote_types(q_BHTD.dtype, torch.float32)
        later = arriving is not None and calls_of(plan) <= 1
        self._found = None if later else q_BHTD.new_zeros(shape, dtype=self._dtype)

    def own(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(dk, dv) for this rank to add to."""
        if self._found is None:
            assert self._arriving is not None
            self._found, self._arriving = self._arriving.wait().to(self._dtype), None
        return self._found[0], self._found[1]

    def whole(self) -> torch.Tensor:
        """With what arrived; once."""
        self.own()
        assert self._found is not None
        if self._arriving is not None:
            self._found += self._arriving.wait()
            self._arriving = None
        return self._found


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHTD, k_BGTD, v_BGTD, plan, links):
        out_BHTD, lse_BHT = ring_forward(q_BHTD, k_BGTD, v_BGTD, plan, links)
        ctx.plan, ctx.links = plan, links
        ctx.save_for_backward(q_BHTD, k_BGTD, v_BGTD, out_BHTD, lse_BHT)
        return out_BHTD

    @staticmethod
    def backward(ctx, dout_BHTD):  # pyright: ignore[reportIncompatibleMethodOverride]
        q_BHTD, k_BGTD, v_BGTD, out_BHTD, lse_BHT = ctx.saved_tensors
        grads = ring_backward(dout_BHTD, q_BHTD, k_BGTD, v_BGTD, out_BHTD, lse_BHT, ctx.plan, ctx.links)
        return *(_laid_out(grad, x) for grad, x in zip(grads, (q_BHTD, k_BGTD, v_BGTD), strict=True)), None, None


def _laid_out(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """In the dtype of what it is the gradient of, and with its values in the same order, token after token: so the projections read it."""
    return grad.to(like.dtype) if grad.stride() == like.stride() else torch.empty_like(like).copy_(grad)


class _HaloAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHTD, k_BGTD, v_BGTD, plan, bounds, layout, group):
        sent, dtype = [plan.comm.sent(x) for x in (k_BGTD, v_BGTD)], q_BHTD.dtype
        pending = [start_halo(x, plan.n, 2, bounds, layout, group, tag) for x, tag in zip(sent, (KEY_TAG, VALUE_TAG), strict=True)]
        out_BHTD, lse_BHT = new_accumulators(q_BHTD)
        attend(q_BHTD, sent[0].to(dtype), sent[1].to(dtype), plan.own, out_BHTD, lse_BHT)
        k_halos, v_halos = (p.wait() for p in pending)
        for blocks, k_halo, v_halo in zip(plan.halos, k_halos, v_halos, strict=True):
            attend(q_BHTD, k_halo.to(dtype), v_halo.to(dtype), blocks, out_BHTD, lse_BHT)
        out_BHTD = out_BHTD.to(q_BHTD.dtype)
        ctx.plan, ctx.exchange = plan, (bounds, layout, group)
        ctx.save_for_backward(q_BHTD, k_BGTD, v_BGTD, out_BHTD, lse_BHT, *k_halos, *v_halos)
        return out_BHTD

    @staticmethod
    def backward(ctx, dout_BHTD):  # pyright: ignore[reportIncompatibleMethodOverride]
        q_BHTD, k_BGTD, v_BGTD, out_BHTD, lse_BHT, *halos = ctx.saved_tensors
        plan, (bounds, layout, group) = ctx.plan, ctx.exchange
        comm, dtype = plan.comm, q_BHTD.dtype
        halos = [x.to(dtype) for x in halos]
        k_halos, v_halos = halos[: len(plan.halos)], halos[len(plan.halos) :]
        dq_BHTD, dk_BGTD, dv_BGTD = (new_gradient(x) for x in (q_BHTD, k_BGTD, v_BGTD))
        dk_halos, dv_halos = [new_gradient(x) for x in k_halos], [new_gradient(x) for x in v_halos]
        for i, blocks in enumerate(plan.halos):
            sums = (dk_halos[i], dv_halos[i])
            attend_backward(dout_BHTD, q_BHTD, k_halos[i], v_halos[i], out_BHTD, lse_BHT, blocks, dq_BHTD, lambda sums=sums: sums)
        dk_halos, dv_halos = ([x.to(comm.gradient(dtype)) for x in halos] for halos in (dk_halos, dv_halos))
        pending = [start_return(x, plan.n, 2, bounds, layout, group, tag) for x, tag in ((dk_halos, KEY_TAG), (dv_halos, VALUE_TAG))]
        own_k, own_v = (comm.read(x, dtype) for x in (k_BGTD, v_BGTD))
        attend_backward(dout_BHTD, q_BHTD, own_k, own_v, out_BHTD, lse_BHT, plan.own, dq_BHTD, lambda: (dk_BGTD, dv_BGTD))
        pending[0].add_to(dk_BGTD)
        pending[1].add_to(dv_BGTD)
        grads = (dq_BHTD.to(q_BHTD.dtype), dk_BGTD.to(k_BGTD.dtype), dv_BGTD.to(v_BGTD.dtype))
        return *grads, None, None, None, None


def ring_attention(
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
    rings: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None,
    bounds: Bounds | None = None,
) -> torch.Tensor:
    """Attention with keys and values passed around a ring of ranks. All ranks of the group call it together; autograd works.

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
        rings: for a double ring (inner, outer): groups of neighbouring ranks, and of the ranks with this one's place among theirs.
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
        else RingAttention(given_or_all(group), layout, window, call, comm, rings)
    )
    return attend_public(scheme, q, k, v, bounds)
