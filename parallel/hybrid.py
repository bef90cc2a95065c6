"""Ulysses inside groups of neighbouring ranks, a ring across the groups (USP, arXiv 2405.07719; LoongTrain, arXiv 2406.18485).

``cp`` = ring x ulysses. Neighbouring ranks, on one node, exchange heads against tokens; then each holds a stretch of the sequence that
is ``ulysses`` times as long, of its own heads, and passes its keys around the ring of ranks with the same heads. In both layouts the
tokens of a group are one such stretch of a ring of ``cp / ulysses`` members, so that every token stays where ``parallel/sequence.py`` puts
it. The degree of Ulysses is bounded by the query heads, that of the ring by nothing.

Every rank must call it together, forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from models.attention import DEFAULT_CALL, KernelCall, check_shapes, tile_limits
from models.batch import Bounds
from models.block import Gradients
from parallel.by_heads import ByHeads, by_heads
from parallel.comm_dtypes import AS_COMPUTED, CommDtypes, checked_dtypes
from parallel.config import KVDtype, KVGradientDtype
from parallel.head_exchange import HeadExchange
from parallel.ring_attention import ring_backward, ring_forward
from parallel.ring_links import Links
from parallel.ring_plan import RingPlan, plan_ring
from parallel.sequence import Layout, check_ranges, ranges_for
from parallel.sequence_mask import attend_public, checked_bounds


@dataclass(frozen=True)
class RingOfGroups:
    """A ring over the ranks that have the same heads of other stretches."""

    plan: RingPlan
    group: dist.ProcessGroup

    def forward(self, q_BhTD: torch.Tensor, k_BgTD: torch.Tensor, v_BgTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``parallel.by_heads.InnerAttention``."""
        return ring_forward(q_BhTD, k_BgTD, v_BgTD, self.plan, Links(self.group))

    def backward(
        self,
        dout_BhTD: torch.Tensor,
        q_BhTD: torch.Tensor,
        k_BgTD: torch.Tensor,
        v_BgTD: torch.Tensor,
        out_BhTD: torch.Tensor,
        lse_BhT: torch.Tensor,
    ) -> Gradients:
        """See ``parallel.by_heads.InnerAttention``."""
        return ring_backward(dout_BhTD, q_BhTD, k_BgTD, v_BgTD, out_BhTD, lse_BhT, self.plan, Links(self.group))


class HybridAttention:
    """``(q_BHnD, k_BGnD, v_BGnD, bounds) -> out_BHnD`` over all tokens of the ring's groups; differentiable.

    Args:
        ulysses_group: neighbouring ranks that exchange heads.
        ring_group: the ranks with this one's place in the other groups.
        layout: how all ranks share the sequence.
        window: tokens a query sees, its own included; None for all before it.
        head_chunk: query heads of one rank exchanged and attended at a time; None: all of them.
        call: what the kernels are told.
        comm: dtypes in which keys, values and their gradients travel.
    Raises (on call):
        UserError: when there are fewer query heads than ranks in a Ulysses group.
        ValueError: when tensors or bounds are not this rank's part of the sequence.
    """

    def __init__(
        self,
        ulysses_group: dist.ProcessGroup,
        ring_group: dist.ProcessGroup,
        layout: Layout,
        window: int | None,
        head_chunk: int | None = None,
        call: KernelCall = DEFAULT_CALL,
        comm: CommDtypes = AS_COMPUTED,
    ) -> None:
        self.layout: Layout = layout
        self.window, self.head_chunk, self.call, self.comm = window, head_chunk, call, comm
        self.exchange, self.ring_group = HeadExchange(ulysses_group, layout), ring_group
        self.ring_rank, self.ring_size = dist.get_rank(ring_group), dist.get_world_size(ring_group)

    def __call__(self, q_BHnD: torch.Tensor, k_BGnD: torch.Tensor, v_BGnD: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """See the class."""
        return by_heads(q_BHnD, k_BGnD, v_BGnD, self._how(q_BHnD, k_BGnD, bounds))

    def by_stages(self, q_BHnD: torch.Tensor, k_BGnD: torch.Tensor, bounds: Bounds) -> ByHeads | None:
        """See ``UlyssesAttention.by_stages``."""
        return self._how(q_BHnD, k_BGnD, bounds) if self.head_chunk is not None else None

    def _how(self, q_BHnD: torch.Tensor, k_BGnD: torch.Tensor, bounds: Bounds) -> ByHeads:
        check_shapes(q_BHnD, k_BGnD, bounds)
        heads = (q_BHnD.shape[1], k_BGnD.shape[1])
        return ByHeads(self.exchange, self._inner(q_BHnD, bounds), *heads, self.head_chunk, self.comm)

    def _inner(self, q_BHnD: torch.Tensor, bounds: Bounds) -> RingOfGroups:
        """The ring of this rank's group, planned once per micro-step."""
        limits = tile_limits(q_BHnD, self.window, self.call)
        key = ("hybrid", self.layout, self.window, self.ring_size, self.exchange.size, limits, self.comm)
        if key not in bounds._cache:
            cp_rank, cp_size = self.ring_rank * self.exchange.size + self.exchange.rank, self.ring_size * self.exchange.size
            check_ranges(bounds, self.layout, cp_rank, cp_size)
            held = [ranges_for(self.layout, bounds.seq_len, member, self.ring_size) for member in range(self.ring_size)]
            plan = plan_ring(held, self.ring_rank, bounds.documents, self.window, limits, bounds.prefixes)
            bounds._cache[key] = RingOfGroups(plan._replace(comm=self.comm), self.ring_group)
        return bounds._cache[key]


def hybrid_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    ring_group: dist.ProcessGroup,
    ulysses_group: dist.ProcessGroup,
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
    """Attention with heads exchanged among neighbours and keys passed around a ring of such groups. All ranks call it together.

    Args:
        q: [B, T/cp, Hq, D], this rank's tokens (``parallel.sequence.shard_sequence``).
        k, v: [B, T/cp, Hkv, D]; Hq is a multiple of Hkv.
        ring_group: the ranks with this one's place in the other Ulysses groups.
        ulysses_group: neighbouring ranks, whose tokens are next to one another in the ring: place in the sequence is
            (rank in the ring) * (ranks of a Ulysses group) + (rank in the Ulysses group).
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
        (q, k, v),
        (ulysses_group, ring_group),
        bounds,
        causal=causal,
        window=window,
        document_ids=document_ids,
        prefix=prefix,
        layout=layout,
        kernel=kernel,
    )
    call, comm = KernelCall(kernel, scale), checked_dtypes(kv_dtype, kv_gradient_dtype, q.dtype)
    scheme = HybridAttention(ulysses_group, ring_group, layout, window, head_chunk, call, comm)
    return attend_public(scheme, q, k, v, bounds)
