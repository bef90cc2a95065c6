"""Memory states that go from rank to rank in columns: the exchange of affine summaries as a pipeline.

The state before token range j follows from the one before range j - 1, S_j = M_{j-1} S_{j-1} + E_{j-1} (`parallel/state_passing.py`).
Columns of S do not meet: each block of columns goes along the ranges by itself, and a rank that waits for its next block has handed on the
last one. M and E never leave their rank, and a rank keeps the states before its own ranges only: per range K (K + V) numbers of a head,
whatever the number of ranks. Backward the gradients go the other way, G_j = M_j^T G_{j+1} + dS_j. Transitions that only decay do the same.

A chain of J ranges and k blocks takes J + k - 2 turns, each a k-th of a state's bytes and products; one block would take J - 1 whole ones.
In the contiguous layout the chain visits the ranks in order; in the zigzag layout up and down again. What a rank sends in turn t its
neighbour takes in turn t: every rank does the messages of a turn together and turns in their order, so that no two wait for each other.

Every rank of the group must call these, forward and backward, in the same order.

Legend: B row, H head, K key, V value, R ranges of a rank, J ranges of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import state_blocks
from parallel.outbox import leave

STATE_TAG, GRADIENT_TAG = 15, 16
"""Message tags, see ``parallel/halo.py``."""


def hops_of(stops: Sequence[int]) -> int:
    """How often a state that visits the ranks ``stops`` goes over to another one."""
    return sum(a != b for a, b in pairwise(stops))


def ring_states(
    group: Any, order: Sequence[tuple[int, int]], dense: bool, transitions_R: Tensor, updates_R: Tensor, initial: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Each local range's incoming state, and the state after the sequence, on the rank that holds its end (elsewhere zeros).

    ``order``: (rank, local range) of all ranges in the order of the sequence. ``dense``: transitions are matrices [R, B, H, K, K], else
    factors that broadcast to the states. ``initial`` must be equal on all ranks; its gradient lands on the first one."""
    *incoming, final = _Ring.apply(group, list(order), dense, transitions_R, updates_R, initial)
    return incoming, final


def spread(group: Any, owner: int, x: Tensor) -> Tensor:
    """``x`` of rank ``owner`` on every rank; the gradients of all of them land there."""
    return _Spread.apply(group, owner, x)  # type: ignore[return-value]


@dataclass(frozen=True)
class _Chain:
    """The ranks that a block of columns visits, in order. Stop j is done with block b in turn j + b."""

    group: Any
    rank: int
    stops: tuple[int, ...]
    columns: tuple[slice, ...]
    tag: int

    @staticmethod
    def of(group: Any, stops: Sequence[int], state: Tensor, tag: int) -> _Chain:
        """For states like ``state``."""
        blocks = state_blocks.column_blocks(state.numel() * state.element_size(), state.shape[-1], hops_of(stops))
        ends = [state.shape[-1] * b // blocks for b in range(blocks + 1)]
        columns = tuple(slice(a, b) for a, b in pairwise(ends))
        return _Chain(group, dist.get_rank(group), tuple(stops), columns, tag)

    def run(self, first: Tensor, moved: Callable[[int, slice, Tensor], Tensor]) -> None:
        """``moved(stop, columns, block)`` is what goes on from a stop of this rank, given what arrives; ``first`` arrives at stop 0."""
        mine = [stop for stop, rank in enumerate(self.stops) if rank == self.rank]
        blocks, here = len(self.columns), dict[tuple[int, int], Tensor]()
        if self.stops[0] == self.rank:
            here |= {(0, b): first[..., columns] for b, columns in enumerate(self.columns)}
        for turn in range(len(self.stops) + blocks - 1):
            sent: list[tuple[int, Tensor]] = []
            for stop in mine:
                if not 0 <= turn - stop < blocks:
                    continue
                block = moved(stop, self.columns[turn - stop], here.pop((stop, turn - stop)))
                if stop + 1 == len(self.stops):
                    continue
                if self.stops[stop + 1] == self.rank:
                    here[stop + 1, turn - stop] = block
                else:
                    sent.append((self.stops[stop + 1], block.contiguous()))
            due = [stop for stop in mine if stop and self.stops[stop - 1] != self.rank and 0 <= turn - stop + 1 < blocks]
            taken = [(self.stops[stop - 1], first.new_empty(first[..., self.columns[turn - stop + 1]].shape)) for stop in due]
            self._exchange(sent, taken)
            here |= {(stop, turn - stop + 1): block for stop, (_, block) in zip(due, taken, strict=True)}

    def _exchange(self, sent: list[tuple[int, Tensor]], taken: list[tuple[int, Tensor]]) -> None:
        """One turn's messages, (other rank, tensor) each. What arrives is waited for; what is sent goes by itself where it has a work of
        its own (gloo)."""
        if not sent and not taken:
            return
        ops = [dist.P2POp(dist.isend, x, group=self.group, tag=self.tag, group_peer=peer) for peer, x in sent]
        ops += [dist.P2POp(dist.irecv, x, group=self.group, tag=self.tag, group_peer=peer) for peer, x in taken]
        works = [work for work in dist.batch_isend_irecv(ops) if work is not None]
        if len(works) == len(ops):
            for work, (_, x) in zip(works, sent, strict=False):
                leave(work, x)
            works = works[len(sent) :]
        for work in works:
            work.wait()


class _Ring(torch.autograd.Function):
    """(transitions_R, E_R, initial) -> R incoming states and the final state."""

    @staticmethod
    def forward(
        ctx: Any, group: Any, order: list[tuple[int, int]], dense: bool, transitions_R: Tensor, updates_R: Tensor, initial: Tensor
    ) -> tuple[Tensor, ...]:
        mine = [torch.empty_like(initial, memory_format=torch.contiguous_format) for _ in updates_R]
        final = torch.zeros_like(initial)
        chain = _Chain.of(group, [rank for rank, _ in order], initial, STATE_TAG)

        def moved(stop: int, columns: slice, block: Tensor) -> Tensor:
            i = order[stop][1]
            mine[i][..., columns] = block
            update = updates_R[i][..., columns]
            if dense:
                after = torch.matmul(transitions_R[i], block).add_(update)
            else:
                after = torch.addcmul(update, _of_columns(transitions_R[i], columns), block)
            if stop + 1 == len(order):
                final[..., columns] = after
            return after

        chain.run(initial, moved)
        ctx.group, ctx.order, ctx.dense = group, order, dense
        ctx.save_for_backward(transitions_R, *mine)
        return (*mine, final)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        transitions_R, *mine = ctx.saved_tensors
        *given, final = grads
        order, dense = list(reversed(ctx.order)), ctx.dense
        de = torch.stack([torch.empty_like(state) for state in mine])
        initial = torch.zeros_like(mine[0])

        def moved(stop: int, columns: slice, block: Tensor) -> Tensor:
            i = order[stop][1]
            de[i][..., columns] = block
            through = given[i][..., columns]
            if dense:
                before = torch.matmul(transitions_R[i].mT, block).add_(through)
            else:
                before = torch.addcmul(through, _of_columns(transitions_R[i], columns), block)
            if stop + 1 == len(order):
                initial[..., columns] = before
            return before

        with torch.autocast(initial.device.type, enabled=False):
            _Chain.of(ctx.group, [rank for rank, _ in order], initial, GRADIENT_TAG).run(final, moved)
            # Products over all columns, once the blocks have gone on: nobody waits for them.
            if dense:
                dm = torch.stack([torch.matmul(g, state.mT) for g, state in zip(de, mine, strict=True)])
            else:
                dm = torch.stack([(g * state).sum_to_size(transitions_R.shape[1:]) for g, state in zip(de, mine, strict=True)])
        return None, None, None, dm, de, initial


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, owner: int, x: Tensor) -> Tensor:
        ctx.group, ctx.owner = group, owner
        out = x.clone(memory_format=torch.contiguous_format)
        dist.broadcast(out, group=group, group_src=owner)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return None, None, total if dist.get_rank(ctx.group) == ctx.owner else torch.zeros_like(total)


def _of_columns(factors: Tensor, columns: slice) -> Tensor:
    """Of factors that broadcast to a state those of its ``columns``."""
    return factors if factors.shape[-1] == 1 else factors[..., columns]
