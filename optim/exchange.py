"""Runs the steps of many matrices side by side and answers their requests, all of one kind in one collective."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from optim.methods import GatherRows, OnOwner, Request, Rows, Steps, Sum, SumRows, Weight
from optim.owners import done_by_owners

Communication = Sum | SumRows | GatherRows | OnOwner
"""Requests that other ranks take part in."""
Returned = TypeVar("Returned")


def run_together(steps: Sequence[Steps], group: dist.ProcessGroup | None) -> Iterator[tuple[int, Any]]:
    """(index, update) of every step as it ends. Requests for weights are answered before (``with_weight``). ``group``: the ranks that
    share the matrices; None: this rank answers itself.

    Every rank of the group must run the same steps in the same order.
    """
    waiting: list[tuple[int, Steps, Communication]] = []
    for i, step in enumerate(steps):
        try:
            waiting.append((i, step, cast(Communication, next(step))))
        except StopIteration as ended:
            yield i, ended.value
    while waiting:
        answers = answered([request for _, _, request in waiting], group)
        going_on: list[tuple[int, Steps, Communication]] = []
        for (i, step, _), answer in zip(waiting, answers, strict=True):
            try:
                going_on.append((i, step, cast(Communication, step.send(answer))))
            except StopIteration as ended:
                yield i, ended.value
        waiting = going_on


def alone(steps: Generator[Request, Any, Returned]) -> Returned:
    """What ``steps`` return on a rank that has whole matrices: requests of the others are answered by its own part."""
    answer = None
    while True:
        try:
            request = steps.send(answer)
        except StopIteration as ended:
            return ended.value
        answer = answered([cast(Communication, request)], None)[0]


def with_weight(steps: Steps, weight: Callable[[], Tensor]) -> Steps:
    """``steps`` whose requests for the weight are answered here."""
    answer: Tensor | None = None
    while True:
        try:
            request = steps.send(answer)  # pyright: ignore[reportArgumentType]  # None starts it
        except StopIteration as ended:
            return ended.value
        answer = weight() if isinstance(request, Weight) else (yield request)


def answered(requests: Sequence[Communication], group: dist.ProcessGroup | None) -> list[Any]:
    """The answers, one collective per kind and dtype of request (two for all work of owners)."""
    answers: list[Any] = [None] * len(requests)
    owned = [i for i, request in enumerate(requests) if isinstance(request, OnOwner)]
    if owned:
        done = iter(done_by_owners([job for i in owned for job in cast(OnOwner, requests[i]).jobs], group))
        for i in owned:
            answers[i] = [next(done) for _ in cast(OnOwner, requests[i]).jobs]
    others = [(i, request) for i, request in enumerate(requests) if not isinstance(request, OnOwner)]
    if group is None:
        for i, request in others:
            answers[i] = request.tensor
        return answers
    for kind, answer in _ANSWERS.items():
        of_kind = [(i, request) for i, request in others if isinstance(request, kind)]
        for dtype in sorted({request.tensor.dtype for _, request in of_kind}, key=str):
            some = [(i, request) for i, request in of_kind if request.tensor.dtype == dtype]
            for (i, _), tensor in zip(some, answer([request for _, request in some], group), strict=True):
                answers[i] = tensor
    return answers


def _sums(requests: Sequence[Sum], group: dist.ProcessGroup) -> list[Tensor]:
    flat = torch.cat([request.tensor.reshape(-1) for request in requests])
    dist.all_reduce(flat, group=group)
    parts = flat.split([request.tensor.numel() for request in requests])
    return [part.view(request.tensor.shape) for part, request in zip(parts, requests, strict=True)]


def _row_sums(requests: Sequence[SumRows], group: dist.ProcessGroup) -> list[Tensor]:
    """Every tensor's rows padded to equal chunks; the chunks of one rank from all tensors lie together."""
    ranks = group.size()
    chunks = [_padded(request.tensor, ranks).view(ranks, -1) for request in requests]
    everything = torch.cat(chunks, dim=1)  # [ranks, elements of all tensors' chunks]
    mine = torch.empty(everything.shape[1], dtype=everything.dtype, device=everything.device)
    dist.reduce_scatter_tensor(mine, everything.view(-1), group=group)
    answers = []
    for request, part in zip(requests, mine.split([chunk.shape[1] for chunk in chunks]), strict=True):
        rows = Rows.chunk(request.tensor.shape[0], group.rank(), ranks)
        answers.append(part.view(-1, *request.tensor.shape[1:])[: rows.count])
    return answers


def _gathered(requests: Sequence[GatherRows], group: dist.ProcessGroup) -> list[Tensor]:
    ranks = group.size()
    padded = []
    for request in requests:
        size = -(-request.total // ranks)
        missing = size - request.tensor.shape[0]
        padded.append(torch.cat([request.tensor, request.tensor.new_zeros((missing, *request.tensor.shape[1:]))]).reshape(-1))
    mine = torch.cat(padded)
    everything = torch.empty((ranks, len(mine)), dtype=mine.dtype, device=mine.device)
    dist.all_gather_into_tensor(everything.view(-1), mine, group=group)
    answers = []
    for request, part in zip(requests, everything.split([len(one) for one in padded], dim=1), strict=True):
        # [ranks, rows of a chunk x ...] -> the rows in order, without those that fill the last chunks
        answers.append(part.reshape(-1, *request.tensor.shape[1:])[: request.total])
    return answers


def _padded(tensor: Tensor, ranks: int) -> Tensor:
    size = -(-tensor.shape[0] // ranks)
    missing = size * ranks - tensor.shape[0]
    return torch.cat([tensor, tensor.new_zeros((missing, *tensor.shape[1:]))]) if missing else tensor.contiguous()


_ANSWERS: dict[type, Callable[[Any, dist.ProcessGroup], list[Tensor]]] = {Sum: _sums, SumRows: _row_sums, GatherRows: _gathered}
