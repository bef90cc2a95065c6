"""Which collectives a step takes, foretold: a method is run on a small matrix of the same kind, and asks there what it asks everywhere."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch

from optim.driver import ComposedOptimizer
from optim.elementwise import Rule
from optim.exchange import answered
from optim.methods import GatherRows, Method, OnOwner, Rows, Sum, SumRows, Weight
from optim.shampoo import Shampoo

COLLECTIVES: dict[type, tuple[str, ...]] = {
    Sum: ("all_reduce",),
    SumRows: ("reduce_scatter",),
    GatherRows: ("all_gather",),
    OnOwner: ("all_to_all", "all_to_all"),
}
"""That answer a kind of request."""
_SMALL, _LARGE = 6, 10
Asked = tuple[tuple[type, torch.dtype | None], ...]
"""Kind and dtype of the requests of a step; work of owners is one message whatever its dtypes."""


def requests_of(rule: Rule | Method, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The collectives of one matrix in a step that renews nothing, in order; elementwise rules have none."""
    return tuple(name for kind, _ in _asked(rule, _pattern(shape), _plain_step(rule), 0) for name in COLLECTIVES[kind])


def collectives_of_step(optimizer: ComposedOptimizer, step: int) -> int:
    """How many collectives step ``step`` of ``optimizer`` takes on this rank, all parameters having gradients. What different matrices ask
    for at once is one collective for each kind and dtype."""
    count = 0
    for group in optimizer.param_groups:
        for shard_group, some in optimizer.side_by_side(group):
            if shard_group is not None:
                count += _merged([_asked(lane.rule, _pattern(lane.placed.shape), step, lane.key) for lane in some])
                anew = [lane for lane in some if lane.redealt is not None]
                count += (2 if anew else 0) + sum(getattr(lane.rule, "scale_parameter", False) for lane in anew)  # weights, one by one
    return count


def _merged(sequences: list[Asked]) -> int:
    rounds = max((len(one) for one in sequences), default=0)
    at_once = [{one[i] for one in sequences if i < len(one)} for i in range(rounds)]
    return sum(len(COLLECTIVES[kind]) for kinds in at_once for kind, _ in kinds)


def _plain_step(rule: Any) -> int:
    """A step after the first, of a matrix of key 0, that renews nothing, if there is one."""
    own = getattr(rule, "refresh", None)
    refresh = own if own is not None else getattr(getattr(rule, "projector", None), "refresh", None)
    if refresh is not None:
        return next((step for step in range(2, refresh.gap + 2) if not refresh.due(step, 0)), 2)
    if not isinstance(rule, Shampoo):
        return 2
    first = rule.root_gap + rule.late + 1
    plain = (
        step for step in range(first, first + rule.statistics_gap) if step % rule.statistics_gap and (step - rule.late) % rule.root_gap
    )
    return next(plain, first)


def _pattern(shape: tuple[int, ...]) -> tuple[int, int]:
    """A small matrix that is as tall or wide."""
    if len(shape) != 2 or shape[0] == shape[1]:
        return (_SMALL, _SMALL)
    return (_LARGE, _SMALL) if shape[0] > shape[1] else (_SMALL, _LARGE)


@lru_cache(maxsize=4096)
def _asked(rule: Rule | Method, shape: tuple[int, int], step: int, key: int) -> Asked:
    if not hasattr(rule, "step"):
        return ()
    method = cast(Method, rule)
    states = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in method.states(shape).items()}
    found: list[tuple[type, torch.dtype | None]] = []
    for taken in sorted({1, step}):  # a later step goes on from a basis
        found = []
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(taken))
        running, answer = method.step(gradient.clone(), states, Rows.whole(shape[0]), taken, key), None
        while True:
            try:
                request = running.send(answer)
            except StopIteration:
                break
            if isinstance(request, Weight):
                answer = gradient
                continue
            found.append((type(request), None if isinstance(request, OnOwner) else request.tensor.dtype))
            (answer,) = answered([request], None)
    return tuple(found)
