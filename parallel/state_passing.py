"""Memory states across sequence shards: one exchange of affine summaries per layer, forward and backward.

Every token range j of the sequence has a summary S_out = M_j S_in + E_j. All ranks gather all (M_j, E_j) in one
collective and fold them in global order, so contiguous and zigzag layouts are the same code. Backward gathers the
gradients of the incoming states once and folds the transposed recurrence G_j = M_j^T G_{j+1} + dS_j. A transition that only
decays, S_out = a_j S_in + E_j elementwise, sends its few decays instead of a matrix and folds without products of matrices.

With ``parallel.memory_exchange: ring`` states go from rank to rank in columns instead (`parallel/state_ring.py`).

Everything runs in the dtype of the summaries (float32 or float64), never under autocast: errors of a product of many M
grow with their number. Every rank of the group joins every exchange, whatever its documents look like.

Legend: B row, H head, K key, V value, P ranks, R ranges per rank, J = P*R ranges of the sequence in global order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.batch import Bounds, Range
from models.memory.by_heads import Heads
from parallel.halo import exchange_halo
from parallel.memory_heads import HeadsOverRanks
from parallel.relay import arrive, pass_on
from parallel.sequence import Layout, check_ranges, part_of, ranges_for
from parallel.state_ring import ring_states, spread


class RingCarry:
    """`models.memory.protocol.Carry` over a sequence-parallel group. ``parts``: so many neighbours of it share what ``layout`` gives to one
    (the ranks of a tensor-parallel group, each with its tokens of the residual stream). ``ring``: states of `affine` and `diagonal` go from
    rank to rank in columns instead of being gathered; ``by_heads``: no state crosses, heads are exchanged (`parallel/memory_heads.py`)."""

    local = False

    def __init__(
        self, group: dist.ProcessGroup | None, layout: Layout, parts: int = 1, *, ring: bool = False, by_heads: bool = False
    ) -> None:
        self.group, self.parts, self.ring = group, parts, ring
        self.layout: Layout = layout
        self.ranks = dist.get_world_size(group)
        self.heads: Heads | None = HeadsOverRanks(group, layout, parts) if by_heads else None

    def held(self, bounds: Bounds) -> Bounds:
        """See `Carry.held`; the same object for all layers of a pass."""
        if self.parts == 1:
            return bounds
        key = ("part of the tokens", self.parts)
        if key not in bounds._cache:
            bounds._cache[key] = bounds.with_ranges(part_of(bounds.ranges, dist.get_rank(self.group) % self.parts, self.parts))
        return bounds._cache[key]

    def halo(self, x_BTC: Tensor, n: int, bounds: Bounds) -> list[Tensor]:
        """See `Carry.halo`; gradients flow to the rank that holds the token."""
        return exchange_halo(x_BTC, n, 1, bounds, self.layout, self.group, self.parts)

    def affine(
        self, transitions: Sequence[Tensor], updates: Sequence[Tensor], initial: Tensor, bounds: Bounds
    ) -> tuple[list[Tensor], Tensor]:
        """See `Carry.affine`. ``initial`` must be equal on all ranks; its gradient lands on one rank (the sum over ranks counts)."""
        order = self._places(bounds)
        with torch.autocast(initial.device.type, enabled=False):
            if self.ring:
                return ring_states(self.group, order, True, torch.stack(list(transitions)), torch.stack(list(updates)), initial)
            *incoming, final = _AffineExchange.apply(self.group, order, torch.stack(list(transitions)), torch.stack(list(updates)), initial)
        return incoming, final

    def diagonal(self, decays: Sequence[Tensor], updates: Sequence[Tensor], initial: Tensor, bounds: Bounds) -> tuple[list[Tensor], Tensor]:
        """See `Carry.diagonal`. ``initial`` as for `affine`."""
        order = self._places(bounds)
        with torch.autocast(initial.device.type, enabled=False):
            if self.ring:
                return ring_states(self.group, order, False, torch.stack(list(decays)), torch.stack(list(updates)), initial)
            *incoming, final = _DiagonalExchange.apply(self.group, order, torch.stack(list(decays)), torch.stack(list(updates)), initial)
        return incoming, final

    def everywhere(self, final: Tensor, bounds: Bounds) -> Tensor:
        """See `Carry.everywhere`; a broadcast where states went around the ring."""
        return spread(self.group, self._places(bounds)[-1][0], final) if self.ring else final

    def summary_bytes(self, transition: int, state: int) -> int:
        """See `Carry.summary_bytes`."""
        return state if self.ring else transition + state

    def tail(self, x_BTC: Tensor, n: int, bounds: Bounds) -> Tensor:
        """See `Carry.tail`; one exchange, gradients flow to the rank that holds the token."""
        return _GatherTail.apply(self.group, self._places(bounds), bounds, x_BTC, n)  # type: ignore[return-value]

    def arrive(self, initial: Tensor, anchor: Tensor) -> Tensor:
        """See `Carry.arrive`. ``initial`` as for `affine`."""
        return arrive(self.group, initial, anchor)

    def pass_on(self, state: Tensor, tied: Tensor) -> tuple[Tensor, Tensor]:
        """See `Carry.pass_on`."""
        return pass_on(self.group, state, tied)

    def holders(self, bounds: Bounds) -> tuple[int, list[tuple[Range, ...]]]:
        """See `Carry.holders`. Raises ValueError if ``bounds`` is not this rank's part."""
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        check_ranges(bounds, self.layout, rank, size, self.parts)
        return rank, [ranges_for(self.layout, bounds.seq_len, r, size, bounds.documents, parts=self.parts) for r in range(size)]

    def swap(self, x_nC: Tensor, given: Sequence[int], taken: Sequence[int]) -> Tensor:
        """See `Carry.swap`; one all-to-all."""
        arriving = x_nC.new_empty(sum(taken), x_nC.shape[1])
        dist.all_to_all_single(arriving, x_nC.contiguous(), list(taken), list(given), group=self.group)
        return arriving

    def stacked(self, x: Tensor) -> Tensor:
        """See `Carry.stacked`; one all-gather, backward one sum over ranks."""
        return _Stack.apply(self.group, x)  # type: ignore[return-value]

    def total(self, x: Tensor) -> Tensor:
        """See `Carry.total`; one all-reduce."""
        dist.all_reduce(x, group=self.group)
        return x

    def _places(self, bounds: Bounds) -> list[tuple[int, int]]:
        """(rank, local range) of every range of the sequence in global order. Raises ValueError if ``bounds`` is not this rank's part."""
        _, held = self.holders(bounds)
        return sorted(((r, i) for r in range(len(held)) for i in range(len(held[r]))), key=lambda place: held[place[0]][place[1]])


class _AffineExchange(torch.autograd.Function):
    """(M_RBHKK, E_RBHKV, initial_BHKV) -> R incoming states and the final state."""

    @staticmethod
    def forward(
        ctx: Any, group: Any, order: list[tuple[int, int]], m_RBHKK: Tensor, e_RBHKV: Tensor, initial: Tensor
    ) -> tuple[Tensor, ...]:
        K = m_RBHKK.shape[-1]
        both_PR = _gather(torch.cat([m_RBHKK, e_RBHKV], dim=-1), group)  # [P, R, B, H, K, K + V]
        rank = dist.get_rank(group)
        mine: list[Tensor] = [initial] * len(m_RBHKK)
        state = initial
        for r, i in order:
            if r == rank:
                mine[i] = state.clone()
            state = torch.matmul(both_PR[r, i, ..., :K], state).add_(both_PR[r, i, ..., K:])
        ctx.group, ctx.order = group, order
        ctx.save_for_backward(both_PR[..., :K].contiguous(), *mine)
        return (*mine, state)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        m_PR, *mine = ctx.saved_tensors
        rank = dist.get_rank(ctx.group)
        with torch.autocast(m_PR.device.type, enabled=False):
            given_PR = _gather(torch.stack(grads), ctx.group)  # [P, R + 1, B, H, K, V]; the last is of the final state
            grad = given_PR[:, -1].sum(0)
            dm, de = [grad] * len(mine), [grad] * len(mine)
            for r, i in reversed(ctx.order):
                if r == rank:
                    de[i] = grad
                    dm[i] = torch.matmul(grad, mine[i].mT)
                grad = torch.matmul(m_PR[r, i].mT, grad).add_(given_PR[r, i])
        initial = grad if rank == 0 else torch.zeros_like(grad)
        return None, None, torch.stack(dm), torch.stack(de), initial


class _DiagonalExchange(torch.autograd.Function):
    """(a_R..., E_R..., initial) -> R incoming states and the final state; a broadcasts to E."""

    @staticmethod
    def forward(ctx: Any, group: Any, order: list[tuple[int, int]], a_R: Tensor, e_R: Tensor, initial: Tensor) -> tuple[Tensor, ...]:
        sent = torch.cat([a_R.flatten(1), e_R.flatten(1)], dim=1)
        a_PR, e_PR = _gather(sent, group).split([a_R[0].numel(), e_R[0].numel()], dim=-1)
        a_PR, e_PR = a_PR.unflatten(-1, a_R.shape[1:]), e_PR.unflatten(-1, e_R.shape[1:])
        rank = dist.get_rank(group)
        mine: list[Tensor] = [initial] * len(a_R)
        state = initial
        for r, i in order:
            if r == rank:
                mine[i] = state.clone()
            state = torch.addcmul(e_PR[r, i], a_PR[r, i], state)
        ctx.group, ctx.order = group, order
        ctx.save_for_backward(a_PR.contiguous(), *mine)
        return (*mine, state)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a_PR, *mine = ctx.saved_tensors
        rank = dist.get_rank(ctx.group)
        given_PR = _gather(torch.stack(grads), ctx.group)  # [P, R + 1, ...]; the last is of the final state
        grad = given_PR[:, -1].sum(0)
        da, de = [grad] * len(mine), [grad] * len(mine)
        for r, i in reversed(ctx.order):
            if r == rank:
                de[i] = grad
                da[i] = (grad * mine[i]).sum_to_size(a_PR.shape[2:])
            grad = torch.addcmul(given_PR[r, i], a_PR[r, i], grad)
        initial = grad if rank == 0 else torch.zeros_like(grad)
        return None, None, torch.stack(da), torch.stack(de), initial


class _GatherTail(torch.autograd.Function):
    """The last n tokens of every range are gathered; the last n of all of them, in global order, are the tail."""

    @staticmethod
    def forward(ctx: Any, group: Any, order: list[tuple[int, int]], bounds: Bounds, x_BTC: Tensor, n: int) -> Tensor:
        B, _, C = x_BTC.shape
        length = bounds.ranges[0][1] - bounds.ranges[0][0]  # all ranges of a layout are equally long
        keep = min(n, length)
        ctx.group, ctx.order, ctx.length, ctx.keep, ctx.shape = group, order, length, keep, x_BTC.shape
        ends_RBkC = x_BTC.unflatten(1, (-1, length))[:, :, length - keep :].transpose(0, 1)
        ends_PR = _gather(ends_RBkC, group)
        joined = torch.cat([x_BTC.new_zeros(B, n, C), *(ends_PR[r, i] for r, i in order)], dim=1)
        return joined[:, joined.shape[1] - n :].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_BnC = _gather(grads[0].unsqueeze(0), ctx.group).sum((0, 1))
        rank, keep, end = dist.get_rank(ctx.group), ctx.keep, grad_BnC.shape[1]
        dx = grad_BnC.new_zeros(ctx.shape)
        ranges = dx.unflatten(1, (-1, ctx.length))
        for r, i in reversed(ctx.order):
            part = grad_BnC[:, max(0, end - keep) : max(0, end)]
            if r == rank:
                ranges[:, i, ctx.length - part.shape[1] :] = part
            end -= keep
        return None, None, None, dx, None


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, x: Tensor) -> Tensor:
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        total = grads[0].contiguous()
        dist.all_reduce(total, group=ctx.group)
        return None, total[dist.get_rank(ctx.group)]


def _gather(x: Tensor, group: Any) -> Tensor:
    """[P, *x.shape]: every rank's ``x``, in one collective."""
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather(list(out.unbind(0)), x.contiguous(), group=group)
    return out
