"""Attention whose keys and values wait in host memory and come to the device chunk by chunk: ``parallel.kv_residence: host``.

``leave`` takes the keys and values of a layer as they are made, sends them to a store in host memory, ``chunk`` tokens at a time, and
gives stand-ins that hold no memory: from then on the device holds the chunk that is computed with and the one that is on its way. With
several ranks a chunk goes around the ring while it is here (``ring_attention.attend_around``), so that messages, received keys and their
float32 gradients are as long as a chunk, and every chunk is read from the host once per pass. The gradients of a chunk are summed in
float32 and rounded once into those of the shard. (The double buffer is that of FPDT, arXiv 2408.16978, which keeps chunks of queries
apart too.)

The store is the caller's, ``memory_mgmt.offload.HostStore`` in training: on CUDA its copies run on two streams of their own from and to
page-locked memory, on the CPU they are plain ones.

Every rank of the group must call it together, forward and backward.

Legend: B batch row, H query heads, G key/value heads, T local tokens, S tokens of a chunk, D head size.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist

from models.attention import DEFAULT_CALL, KernelCall, check_shapes, empty_accumulators, new_gradient, tile_limits
from models.attention_plan import Pair, TileLimits, plan_rows
from models.batch import Bounds, Range
from parallel.comm_dtypes import AS_COMPUTED, CommDtypes, checked_dtypes
from parallel.config import KVDtype, KVGradientDtype
from parallel.ring_attention import attend_around, backward_around
from parallel.ring_links import Links
from parallel.ring_plan import RingPlan, any_sees, local_offsets
from parallel.sequence import Layout, check_ranges, ranges_for
from parallel.sequence_mask import attend_public, checked_bounds, given_or_all

DEFAULT_CHUNK = 65_536
"""Tokens of one rank, where ``parallel.kv_chunk`` is null."""
_STAND_IN = "_parked_keys"


class InHost(Protocol):
    """Handle of one tensor in host memory; losing it frees that memory."""

    def fetch(self) -> torch.Tensor:
        """The tensor on its device again."""
        ...

    def prefetch(self) -> None:
        """Start the copy back without waiting."""
        ...


class KeyStore(Protocol):
    """What is needed of a store in host memory (``memory_mgmt.offload.HostStore``)."""

    def park(self, tensor: torch.Tensor, slot: Hashable) -> InHost:
        """Start the copy of ``tensor`` to host memory; the caller may drop it at once."""
        ...

    def settle(self) -> None:
        """Let go of device memory whose copies are under way."""
        ...


class HostKeysAttention:
    """``(q_BHTD, k_BGTD, v_BGTD, bounds) -> out_BHTD`` over all tokens of the group's sequence; differentiable. ``k`` and ``v`` are what
    ``leave`` gave, or tensors, which leave first.

    Args:
        group: the sequence-parallel process group; None: this process holds the whole sequence.
        layout: how its ranks share the sequence.
        window: tokens a query sees, its own included; None for all before it.
        store: takes keys and values.
        chunk: tokens of a rank's keys and values on the device at a time.
        slot: names the layer to the store.
        call: what the kernels are told.
        comm: dtypes in which keys, values and their gradients travel.
    Raises (on call):
        ValueError: when tensors or bounds are not this rank's part of the sequence.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        layout: Layout,
        window: int | None,
        store: KeyStore,
        chunk: int = DEFAULT_CHUNK,
        slot: Hashable = 0,
        call: KernelCall = DEFAULT_CALL,
        comm: CommDtypes = AS_COMPUTED,
    ) -> None:
        if chunk < 1:
            raise ValueError(f"parallel.kv_chunk is {chunk}; at least 1 token's keys are on the device at a time")
        self.layout: Layout = layout
        self.group, self.window, self.store = group, window, store
        self.chunk, self.slot, self.call, self.comm = chunk, slot, call, comm
        self.cp_rank, self.cp_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    def __call__(self, q_BHTD: torch.Tensor, k_BGTD: torch.Tensor, v_BGTD: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        check_shapes(q_BHTD, k_BGTD, bounds)
        if not is_stand_in(k_BGTD):
            k_BGTD, v_BGTD = self.leave(k_BGTD, v_BGTD, bounds)
        plans = self._plans(bounds, tile_limits(q_BHTD, self.window, self.call))
        return _HostKeys.apply(q_BHTD, k_BGTD, v_BGTD, getattr(k_BGTD, _STAND_IN), plans, self.group)  # pyright: ignore[reportReturnType]

    def leave(self, k_BGTD: torch.Tensor, v_BGTD: torch.Tensor, bounds: Bounds) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values go to host memory; stand-ins of their shapes, which only this attention takes. Differentiable."""
        held: list[InHost] = []
        args = (self._spans(bounds.local_len), self.store, (("keys", self.slot), 0), held, self.comm)
        k, v = _ToHost.apply(k_BGTD, v_BGTD, *args)  # type: ignore[misc]
        setattr(k, _STAND_IN, held)
        return k, v

    def _spans(self, tokens: int) -> list[Range]:
        return [(first, min(first + self.chunk, tokens)) for first in range(0, tokens, self.chunk)]

    def _plans(self, bounds: Bounds, limits: TileLimits) -> list[RingPlan]:
        """By chunk, this rank's blocks at each hop; made once per micro-step and shared by all layers with the same window."""
        key = ("host keys", self.layout, self.window, self.cp_size, self.chunk, limits, self.comm)
        if key not in bounds._cache:
            check_ranges(bounds, self.layout, self.cp_rank, self.cp_size)
            held = [ranges_for(self.layout, bounds.seq_len, rank, self.cp_size, bounds.documents) for rank in range(self.cp_size)]
            spans = self._spans(bounds.local_len)
            plans = [plan_chunk(held, self.cp_rank, span, bounds, self.window, limits)._replace(comm=self.comm) for span in spans]
            bounds._cache[key] = plans
        return bounds._cache[key]


def is_stand_in(k_BGTD: torch.Tensor) -> bool:
    """Whether ``leave`` gave these keys."""
    return hasattr(k_BGTD, _STAND_IN)


def detached(k_BGTD: torch.Tensor) -> torch.Tensor:
    """The same stand-in outside of the graph."""
    k = k_BGTD.detach()
    setattr(k, _STAND_IN, getattr(k_BGTD, _STAND_IN))
    return k


def plan_chunk(
    held: Sequence[tuple[Range, ...]], cp_rank: int, span: Range, bounds: Bounds, window: int | None, limits: TileLimits
) -> RingPlan:
    """The blocks of ``cp_rank`` with tokens ``span`` (local indices) of each rank in turn, up to the last hop at which any rank has one.

    None of them is marked ``own``: another chunk may have come before. ``held[r]``: ranges of rank r. Pure integers.
    """
    size = len(held)
    masks = set(zip(bounds.documents, bounds.prefixes or [()] * len(bounds.documents), strict=True))
    chunks = [[piece for piece, _ in _within(ranges, span)] for ranges in held]
    seen = [hop for hop in range(size) if any(any_sees(held[r], chunks[(r - hop) % size], masks, window) for r in range(size))]
    plans = []
    for hop in range(max(seen, default=0) + 1):
        pairs = [
            Pair(q, q0, k, k0)
            for k, k0 in _within(held[(cp_rank - hop) % size], span)
            for q_range, q_first in local_offsets(held[cp_rank])
            for q, q0 in _cut(q_range, q_first, k)
        ]
        rows = plan_rows(bounds.documents, pairs, window, limits, bounds.prefixes)
        plans.append(tuple(group._replace(tiles=tuple(replace(tile, own=False) for tile in group.tiles)) for group in rows))
    return RingPlan(tuple(plans))


def _within(ranges: Sequence[Range], span: Range) -> list[tuple[Range, int]]:
    """What of a rank's ranges lies in its local ``span``, and where in that."""
    found = []
    for (start, end), offset in local_offsets(ranges):
        low, high = max(span[0], offset), min(span[1], offset + end - start)
        if low < high:
            found.append(((start + low - offset, start + high - offset), low - span[0]))
    return found


def _cut(q_range: Range, offset: int, k_range: Range) -> Iterator[tuple[Range, int]]:
    """Parts of a range of queries that equal a range of keys or do not touch it, with their local starts."""
    marks = sorted({*q_range, *(min(max(edge, q_range[0]), q_range[1]) for edge in k_range)})
    for start, end in pairwise(marks):
        yield (start, end), offset + start - q_range[0]


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k_BGTD, v_BGTD, spans, store, slot, held, comm):
        for start, end in spans:
            held.append(store.park(comm.both(k_BGTD[:, :, start:end], v_BGTD[:, :, start:end]), slot))
            store.settle()  # one chunk's copy at a time beside the keys
        return k_BGTD.new_zeros(()).expand(k_BGTD.shape), v_BGTD.new_zeros(()).expand(v_BGTD.shape)

    @staticmethod
    def backward(ctx, dk_BGTD, dv_BGTD):  # pyright: ignore[reportIncompatibleMethodOverride]
        return dk_BGTD, dv_BGTD, None, None, None, None, None


class _HostKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHTD, k_BGTD, v_BGTD, held, plans, group):
        out_BHTD, lse_BHT = empty_accumulators(q_BHTD)
        for i, plan in enumerate(plans):
            attend_around(q_BHTD, _fetch(held, i), plan, Links(group), out_BHTD, lse_BHT)
        out_BHTD = out_BHTD.to(q_BHTD.dtype)
        ctx.args = (held, plans, group, k_BGTD.shape)
        ctx.save_for_backward(q_BHTD, out_BHTD, lse_BHT)
        return out_BHTD

    @staticmethod
    def backward(ctx, dout_BHTD):  # pyright: ignore[reportIncompatibleMethodOverride]
        q_BHTD, out_BHTD, lse_BHT = ctx.saved_tensors
        held, plans, group, shape = ctx.args
        dq_BHTD = new_gradient(q_BHTD)
        dk_BGTD, dv_BGTD = (q_BHTD.new_empty(shape) for _ in range(2))
        first = 0
        for i, plan in enumerate(plans):
            k_BGSD, v_BGSD = _fetch(held, i)
            grads = backward_around(dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD, lse_BHT, plan, Links(group), dq_BHTD)
            for whole, grad in zip((dk_BGTD, dv_BGTD), grads, strict=True):
                whole.narrow(2, first, grad.shape[2]).copy_(grad)
            first += k_BGSD.shape[2]
            del k_BGSD, v_BGSD, grads, grad  # the next chunk takes their place
        return dq_BHTD.to(q_BHTD.dtype), dk_BGTD, dv_BGTD, None, None, None


def _fetch(held: Sequence[InHost], i: int) -> torch.Tensor:
    """kv_2BGSD of a chunk, as it travels; the copy of the next one is started."""
    kv_2BGSD = held[i].fetch()
    if i + 1 < len(held):
        held[i + 1].prefetch()
    return kv_2BGSD


def host_keys_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: dist.ProcessGroup | None,
    store: KeyStore,
    kv_chunk: int = DEFAULT_CHUNK,
    causal: bool = True,
    window: int | None = None,
    document_ids: torch.Tensor | None = None,
    layout: Layout = "zigzag",
    kernel: str = "auto",
    prefix: torch.Tensor | None = None,
    scale: float | None = None,
    kv_dtype: KVDtype = "compute",
    kv_gradient_dtype: KVGradientDtype = "fp32",
    bounds: Bounds | None = None,
) -> torch.Tensor:
    """Ring attention of keys and values that wait in host memory. All ranks of the group call it together; autograd works.

    Between forward and backward the device holds no keys and values but those of the caller. Arguments that are not here are those of
    ``parallel.ring_attention.ring_attention``; what is returned and raised too.

    Args:
        q: [B, T/cp, Hq, D], this rank's tokens.
        k, v: [B, T/cp, Hkv, D].
        store: in host memory, e.g. ``memory_mgmt.offload.HostStore(device)``.
        kv_chunk: tokens of a rank's keys and values on the device at a time.
    """
    bounds = checked_bounds(
        (q, k, v), group, bounds, causal=causal, window=window, document_ids=document_ids, prefix=prefix, layout=layout, kernel=kernel
    )
    ring = None if bounds.local_len == bounds.seq_len else given_or_all(group)
    comm = checked_dtypes(kv_dtype, kv_gradient_dtype, q.dtype)
    scheme = HostKeysAttention(ring, layout, window, store, kv_chunk, "", KernelCall(kernel, scale), comm)
    return attend_public(scheme, q, k, v, bounds)
