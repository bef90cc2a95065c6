"""The tokens just before each local range, fetched from the ranks that hold them; differentiable, O(n) bytes per range.

Sliding windows and causal convolutions look back a fixed number of tokens. ``exchange_halo`` gives each local range the n
tokens that precede it in the global sequence, zeros where before index 0, from as many predecessor ranges as it takes; its
backward sends the gradients home. One message per pair of ranks and direction. ``start_halo`` and ``start_return`` are the
two halves for callers that compute while bytes travel (parallel/ring_attention.py).

Every rank of the group must call these together, forward and backward: on every rank ``x`` requires a gradient or on none,
and at least one of the returned halos takes part in the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.distributed as dist

from models.batch import Bounds
from parallel.outbox import leave
from parallel.sequence import Layout, check_ranges, ranges_for

HALO_TAG, RETURN_TAG = 11, 12
"""Message tags, so that a halo never meets another exchange between the same two ranks (gloo; NCCL keeps call order)."""


@dataclass(frozen=True, slots=True)
class Segment:
    """``length`` tokens at local index ``src_start`` of rank ``src`` that land at ``dst_start`` in halo ``dst_range`` of rank ``dst``."""

    src: int
    src_start: int
    dst: int
    dst_range: int
    dst_start: int
    length: int


@lru_cache(maxsize=256)
def halo_segments(n: int, layout: Layout, seq_len: int, cp_size: int, parts: int = 1) -> tuple[Segment, ...]:
    """Every piece of every rank's halos, in the order in which both ends pack their messages. Pure integers."""
    held = [ranges_for(layout, seq_len, rank, cp_size, parts=parts) for rank in range(cp_size)]
    segments = []
    for dst, dst_ranges in enumerate(held):
        for dst_range, (first, _) in enumerate(dst_ranges):
            for src, src_ranges in enumerate(held):
                local = 0
                for start, end in src_ranges:
                    low, high = max(start, first - n), min(end, first)
                    if low < high:
                        segments.append(Segment(src, local + low - start, dst, dst_range, low - (first - n), high - low))
                    local += end - start
    return tuple(segments)


def exchange_halo(
    x: torch.Tensor, n: int, dim: int, bounds: Bounds, layout: Layout, group: dist.ProcessGroup | None, parts: int = 1
) -> list[torch.Tensor]:
    """For each local range, the ``n`` tokens that precede it in the global sequence, zeros where before index 0.

    Args:
        x: the local shard, ranges concatenated along ``dim`` (length ``bounds.local_len``).
        n: tokens to look back, 0 or more; may exceed a shard.
        dim: the token dimension of ``x``.
        bounds: global coordinates; document bounds are *not* applied here.
        layout: how the ranks of ``group`` share the sequence.
        group: the sequence-parallel group; None means this process holds the whole sequence.
        parts: neighbours that share what ``layout`` gives to one rank (``ranges_for``).
    Returns:
        one tensor per range, shaped like ``x`` with ``n`` along ``dim``. Gradients flow to the rank that holds the token.
    Raises:
        ValueError: when ``bounds`` does not describe this rank's part in ``layout``.
    """
    return list(_ExchangeHalo.apply(x, n, dim % x.ndim, bounds, layout, group, parts))


class _ExchangeHalo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, n, dim, bounds, layout, group, parts):
        ctx.args = (n, dim, bounds, layout, group, parts)
        pending = start_halo(x, n, dim, bounds, layout, group, parts=parts)
        pending.works = _arriving(pending)
        return tuple(pending.wait())

    @staticmethod
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        n, dim, bounds, layout, group, parts = ctx.args
        shape = list(grads[0].shape)
        shape[dim] = bounds.local_len
        # Several halos may hand back the same token, so low precision is summed in fp32 and rounded once.
        dtype = torch.promote_types(grads[0].dtype, torch.float32)
        dx = grads[0].new_zeros(shape, dtype=dtype)
        pending = start_return(grads, n, dim, bounds, layout, group, parts=parts)
        pending.works = _arriving(pending)
        pending.add_to(dx)
        return dx.to(grads[0].dtype), None, None, None, None, None, None


@dataclass
class PendingHalo:
    """Halos on their way; ``wait`` returns them, one per local range."""

    halos: list[torch.Tensor]
    dim: int
    arrivals: list[tuple[torch.Tensor, list[Segment]]] = field(default_factory=list)
    works: list[dist.Work] = field(default_factory=list)
    in_flight: list[torch.Tensor] = field(default_factory=list)

    def wait(self) -> list[torch.Tensor]:
        """The halos, complete."""
        for work in self.works:
            work.wait()
        for message, segments in self.arrivals:
            for piece, s in zip(message.split([s.length for s in segments], self.dim), segments, strict=True):
                self.halos[s.dst_range].narrow(self.dim, s.dst_start, s.length).copy_(piece)
        return self.halos


def start_halo(
    x: torch.Tensor,
    n: int,
    dim: int,
    bounds: Bounds,
    layout: Layout,
    group: dist.ProcessGroup | None,
    tag: int = HALO_TAG,
    parts: int = 1,
) -> PendingHalo:
    """Begin an exchange (see ``exchange_halo``; no gradient here). Exchanges in flight together need different tags."""
    rank, segments = _segments(n, bounds, layout, group, parts)
    shape = list(x.shape)
    shape[dim] = n
    pending = PendingHalo([x.new_zeros(shape) for _ in bounds.ranges], dim)
    outgoing: dict[int, list[Segment]] = {}
    incoming: dict[int, list[Segment]] = {}
    for s in segments:
        if s.src == s.dst == rank:
            pending.halos[s.dst_range].narrow(dim, s.dst_start, s.length).copy_(x.narrow(dim, s.src_start, s.length))
        elif s.src == rank:
            outgoing.setdefault(s.dst, []).append(s)
        elif s.dst == rank:
            incoming.setdefault(s.src, []).append(s)
    messages = {peer: torch.cat([x.narrow(dim, s.src_start, s.length) for s in part], dim) for peer, part in outgoing.items()}
    buffers = {peer: _empty_message(x, dim, part) for peer, part in incoming.items()}
    pending.arrivals = [(buffers[peer], incoming[peer]) for peer in incoming]
    pending.works, pending.in_flight = _post(messages, buffers, tag, group)
    return pending


@dataclass
class PendingReturn:
    """Halo gradients on their way home; ``add_to`` adds them to the owner's gradient."""

    dim: int
    local: list[tuple[torch.Tensor, Segment]] = field(default_factory=list)
    arrivals: list[tuple[torch.Tensor, list[Segment]]] = field(default_factory=list)
    works: list[dist.Work] = field(default_factory=list)
    in_flight: list[torch.Tensor] = field(default_factory=list)

    def add_to(self, dx: torch.Tensor) -> None:
        """Wait, then add every returned piece to ``dx`` (local shard, accumulator dtype)."""
        for work in self.works:
            work.wait()
        for piece, s in self.local:
            dx.narrow(self.dim, s.src_start, s.length).add_(piece)
        for message, segments in self.arrivals:
            for piece, s in zip(message.split([s.length for s in segments], self.dim), segments, strict=True):
                dx.narrow(self.dim, s.src_start, s.length).add_(piece)


def start_return(
    grads: Sequence[torch.Tensor],
    n: int,
    dim: int,
    bounds: Bounds,
    layout: Layout,
    group: dist.ProcessGroup | None,
    tag: int = RETURN_TAG,
    parts: int = 1,
) -> PendingReturn:
    """Begin to send gradients of the halos (one per local range) to the ranks that hold the tokens."""
    rank, segments = _segments(n, bounds, layout, group, parts)
    pending = PendingReturn(dim)
    outgoing: dict[int, list[Segment]] = {}
    incoming: dict[int, list[Segment]] = {}
    for s in segments:
        if s.src == s.dst == rank:
            pending.local.append((grads[s.dst_range].narrow(dim, s.dst_start, s.length), s))
        elif s.dst == rank:
            outgoing.setdefault(s.src, []).append(s)
        elif s.src == rank:
            incoming.setdefault(s.dst, []).append(s)
    messages = {
        peer: torch.cat([grads[s.dst_range].narrow(dim, s.dst_start, s.length) for s in part], dim) for peer, part in outgoing.items()
    }
    buffers = {peer: _empty_message(grads[0], dim, part) for peer, part in incoming.items()}
    pending.arrivals = [(buffers[peer], incoming[peer]) for peer in incoming]
    pending.works, pending.in_flight = _post(messages, buffers, tag, group)
    return pending


def _segments(n: int, bounds: Bounds, layout: Layout, group: dist.ProcessGroup | None, parts: int) -> tuple[int, tuple[Segment, ...]]:
    """This rank and the pieces of the whole exchange, after a check that ``bounds`` is this rank's part."""
    if n < 0:
        raise ValueError(f"a halo of {n} tokens makes no sense; n must be 0 or more")
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    check_ranges(bounds, layout, rank, size, parts)
    return rank, halo_segments(n, layout, bounds.seq_len, size, parts)


def _empty_message(like: torch.Tensor, dim: int, segments: list[Segment]) -> torch.Tensor:
    shape = list(like.shape)
    shape[dim] = sum(s.length for s in segments)
    return like.new_empty(shape)


def _arriving(pending: PendingHalo | PendingReturn) -> list[dist.Work]:
    """The works to wait for: those of what arrives. What was sent goes by itself, where every message has a work of its own (gloo)."""
    sent = pending.in_flight
    if len(pending.works) != len(sent) + len(pending.arrivals):
        return pending.works
    for work, message in zip(pending.works, sent, strict=False):
        leave(work, message)
    return pending.works[len(sent) :]


def _post(
    messages: dict[int, torch.Tensor], buffers: dict[int, torch.Tensor], tag: int, group: dist.ProcessGroup | None
) -> tuple[list[dist.Work], list[torch.Tensor]]:
    """Post all sends and receives at once (one alone can hang); returns the works and the sent tensors, to be kept alive."""
    sent = {peer: message.contiguous() for peer, message in messages.items()}
    ops = [dist.P2POp(dist.isend, message, group=group, tag=tag, group_peer=peer) for peer, message in sent.items()]
    ops += [dist.P2POp(dist.irecv, buffer, group=group, tag=tag, group_peer=peer) for peer, buffer in buffers.items()]
    works = [work for work in dist.batch_isend_irecv(ops) if work is not None] if ops else []
    return works, list(sent.values())
