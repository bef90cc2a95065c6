"""Runs a method of updating matrices on W pretended ranks in one process: their generators in lock step, requests answered by plain
sums, chunks and concatenations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optim.methods import GatherRows, Method, OnOwner, Request, Rows, StateSpec, Sum, SumRows, Weight
from optim.updates import formed


def answers(requests: list[Request], rows: list[Rows], weights: list[Tensor]) -> list[Any]:
    """What each rank is sent; every rank must have asked for the same kind."""
    ranks = range(len(requests))
    kinds = {type(request) for request in requests}
    assert len(kinds) == 1, f"ranks ask for different things: {kinds}"
    if isinstance(requests[0], Weight):
        return [weights[rank] for rank in ranks]
    if isinstance(requests[0], OnOwner):
        return owned([request for request in requests if isinstance(request, OnOwner)])
    tensors = [request.tensor for request in requests if not isinstance(request, (OnOwner, Weight))]
    assert len({tensor.dtype for tensor in tensors}) == 1
    if isinstance(requests[0], GatherRows):
        total = requests[0].total
        for rank, tensor in enumerate(tensors):
            assert tensor.shape[0] == Rows.chunk(total, rank, len(tensors)).count
        return [torch.cat(tensors).clone() for _ in ranks]
    assert len({tuple(tensor.shape) for tensor in tensors}) == 1
    total_sum = torch.stack(tensors).sum(dim=0)
    if isinstance(requests[0], Sum):
        return [total_sum.clone() for _ in ranks]
    assert isinstance(requests[0], SumRows)
    return [total_sum[Rows.chunk(len(total_sum), rank, len(tensors)).slice].clone() for rank in ranks]


def owned(requests: list[OnOwner]) -> list[Any]:
    """Every job done once, on all rows, and dealt."""
    answers: list[list[list[Tensor]]] = [[] for _ in requests]
    for jobs in zip(*(request.jobs for request in requests), strict=True):
        first = jobs[0]
        for rank, job in enumerate(jobs):
            assert (job.work, job.dealt, job.outputs, job.cost) == (first.work, first.dealt, first.outputs, first.cost)
            for tensor, dealt in zip(job.inputs, job.dealt, strict=True):
                assert tensor.shape == (dealt.counts[rank], *dealt.row) and tensor.dtype == dealt.dtype
        done = first.work(*(torch.cat(parts)[None] for parts in zip(*(job.inputs for job in jobs), strict=True)))
        split = [output[0].split(dealt.counts) for output, dealt in zip(done, first.outputs, strict=True)]
        for rank, answer in enumerate(answers):
            answer.append([parts[rank].clone() for parts in split])
    return answers


@dataclass
class Simulator:
    """W ranks that share one matrix."""

    method: Method
    shape: tuple[int, int]
    ranks: int = 1
    key: int = 7
    requests: list[str] = field(default_factory=list)
    """Of the last step, by name."""

    def __post_init__(self) -> None:
        self.rows = [Rows.chunk(self.shape[0], rank, self.ranks) for rank in range(self.ranks)]
        self.specs = dict(self.method.states(self.shape))
        ranks = range(self.ranks)
        self.states = [
            {name: torch.zeros(self._local_shape(spec, rank), dtype=spec.dtype) for name, spec in self.specs.items()} for rank in ranks
        ]
        self.taken = 0

    def _local_shape(self, spec: StateSpec, rank: int) -> tuple[int, ...]:
        if spec.placement == "whole":
            return spec.shape
        count = self.rows[rank].count if spec.placement == "rows" else Rows.chunk(spec.shape[0], rank, self.ranks).count
        return (count, *spec.shape[1:])

    def step(self, gradient: Tensor, weight: Tensor | None = None) -> Tensor:
        """The whole update [m, n] of one step of all ranks."""
        self.taken += 1
        self.requests = []
        weights = [(gradient if weight is None else weight)[rows.slice] for rows in self.rows]
        running = [
            self.method.step(gradient[rows.slice].clone(), states, rows, self.taken, self.key)
            for rows, states in zip(self.rows, self.states, strict=True)
        ]
        sent: list[Any] = [None] * self.ranks
        while True:
            asked, done = [], []
            for generator, answer in zip(running, sent, strict=True):
                try:
                    asked.append(generator.send(answer))
                except StopIteration as stop:
                    done.append(stop.value)
            if done:
                assert not asked, "some ranks finish while others still ask"
                return torch.cat([formed(update) for update in done])
            self.requests.append(type(asked[0]).__name__)
            sent = list(answers(asked, self.rows, weights))

    def whole_states(self) -> dict[str, Tensor]:
        """The states put together; those that lie whole must be equal on all ranks."""
        whole = {}
        for name, spec in self.specs.items():
            parts = [states[name] for states in self.states]
            if spec.placement == "whole":
                assert all(torch.equal(parts[0], part) for part in parts), f"{name} differs between ranks"
                whole[name] = parts[0]
            else:
                whole[name] = torch.cat(parts)
            assert tuple(whole[name].shape) == spec.shape
        return whole

    def local_bytes(self) -> list[int]:
        """Of all states, by rank."""
        return [sum(state.nbytes for state in states.values()) for states in self.states]


def relative(actual: Tensor, expected: Tensor) -> float:
    """Distance by norms, in float64."""
    difference = actual.double() - expected.double()
    return float(difference.norm() / expected.double().norm().clamp(min=1e-30))
