"""A state that goes from rank to rank: each takes it from the rank before, works through its tokens, hands it to the next.

For memories whose next state is no affine function of the last one, so that nothing can be summed up ahead. A rank that has passed the
state of one layer on goes to the next layer while the next rank works on this one: a wavefront over (rank, layer), as far as nothing else
makes ranks wait for each other. Backward goes the other way.

Every rank of the group must call these, forward and backward, in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.outbox import leave

STATE_TAG, GRADIENT_TAG = 13, 14
"""Message tags, see ``parallel/halo.py``."""


def arrive(group: dist.ProcessGroup | None, initial: Tensor, anchor: Tensor) -> Tensor:
    """The state that the rank before passed on; ``initial`` on the first rank, whose gradient lands there.

    ``anchor``: a tensor that takes a gradient, so that the state's gradient goes back also where ``initial`` is a constant.
    """
    return _Arrive.apply(group, initial, anchor)  # type: ignore[return-value]


def pass_on(group: dist.ProcessGroup | None, state: Tensor, tied: Tensor) -> tuple[Tensor, Tensor]:
    """``state`` and ``tied`` as they are, after the state went to the next rank.

    The gradient of what was sent is awaited in backward after that of ``tied``: give it what this rank's own loss comes from.
    """
    return _PassOn.apply(group, state, tied)  # type: ignore[return-value]


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, initial: Tensor, anchor: Tensor) -> Tensor:
        ctx.group = group
        return initial.clone() if dist.get_rank(group) == 0 else _received(initial, -1, STATE_TAG, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        if dist.get_rank(ctx.group) == 0:
            return None, grads[0], None
        _send(grads[0], -1, GRADIENT_TAG, ctx.group)
        return None, torch.zeros_like(grads[0]), None


class _PassOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, state: Tensor, tied: Tensor) -> tuple[Tensor, Tensor]:
        ctx.group = group
        if not _is_last(group):
            _send(state, 1, STATE_TAG, group)
        return state.view_as(state), tied.view_as(tied)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        dstate, dtied = grads
        if not _is_last(ctx.group):
            dstate = dstate + _received(dstate, 1, GRADIENT_TAG, ctx.group)
        return None, dstate, dtied


def _is_last(group: Any) -> bool:
    return dist.get_rank(group) == dist.get_world_size(group) - 1


def _send(x: Tensor, step: int, tag: int, group: Any) -> None:
    """To the rank that is ``step`` further; it is not waited for."""
    message = x.clone(memory_format=torch.contiguous_format)
    for work in _posted(dist.isend, message, step, tag, group):
        leave(work, message)


def _received(like: Tensor, step: int, tag: int, group: Any) -> Tensor:
    """What the rank that is ``step`` further sent, shaped as ``like``."""
    message = torch.empty_like(like, memory_format=torch.contiguous_format)
    for work in _posted(dist.irecv, message, step, tag, group):
        work.wait()
    return message


def _posted(how: Any, x: Tensor, step: int, tag: int, group: Any) -> list[dist.Work]:
    op = dist.P2POp(how, x, group=group, tag=tag, group_peer=dist.get_rank(group) + step)
    return [work for work in dist.batch_isend_irecv([op]) if work is not None]
