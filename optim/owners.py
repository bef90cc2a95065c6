"""Work on whole matrices that one rank does for all: rows go to the matrix's owner and come back, for all matrices in one all-to-all
each way. An owner holds whole matrices only of its own share of the work, so about as much as it sent.

Knows nothing of what the work is (``methods.Job``). Try alone: tests/optim/test_owners.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from optim.methods import Dealt, Job

ALIGNMENT = 8
"""Bytes: every tensor in a message begins at a multiple, so that it can be read in place in any dtype."""
STACKED_ELEMENTS = 1 << 22
"""Of the inputs of equal jobs that are done in one call: more gains nothing and costs memory."""


def owners(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank of each job: the dearest first, each to the rank that has least to do (Graham 1969: at most a third above the best). The
    same on every rank; equal costs are dealt round robin."""
    load = [0.0] * ranks
    chosen = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        chosen[job] = min(range(ranks), key=lambda rank: load[rank])
        load[chosen[job]] += costs[job]
    return chosen


def done_by_owners(jobs: Sequence[Job], group: dist.ProcessGroup | None) -> list[list[Tensor]]:
    """This rank's rows of every job's outputs. ``group``: the ranks that share all the matrices, None: this rank has them. Every rank must
    bring the same jobs in the same order."""
    if group is None:
        return _worked([(job, [*job.inputs]) for job in jobs])
    rank, ranks = group.rank(), group.size()
    owner = owners([job.cost for job in jobs], ranks)
    mine = [job for job, its_owner in zip(jobs, owner, strict=True) if its_owner == rank]
    theirs = [[job for job, its_owner in zip(jobs, owner, strict=True) if its_owner == other] for other in range(ranks)]
    arrived = all_to_all(
        [[tensor for job in jobs_there for tensor in job.inputs] for jobs_there in theirs],
        [[_part(dealt, source) for job in mine for dealt in job.dealt] for source in range(ranks)],
        group,
    )
    whole = iter([torch.cat(parts) for parts in zip(*arrived, strict=True)])
    done = _worked([(job, [next(whole) for _ in job.dealt]) for job in mine])
    split = [
        output.split(dealt.counts)
        for job, outputs in zip(mine, done, strict=True)
        for output, dealt in zip(outputs, job.outputs, strict=True)
    ]
    returned = all_to_all(
        [[parts[target] for parts in split] for target in range(ranks)],
        [[_part(dealt, rank) for job in jobs_there for dealt in job.outputs] for jobs_there in theirs],
        group,
    )
    coming = [iter(tensors) for tensors in returned]
    return [[next(coming[its_owner]) for _ in job.outputs] for job, its_owner in zip(jobs, owner, strict=True)]


def _part(dealt: Dealt, rank: int) -> tuple[tuple[int, ...], torch.dtype]:
    return (dealt.counts[rank], *dealt.row), dealt.dtype


def _worked(jobs: Sequence[tuple[Job, list[Tensor]]]) -> list[list[Tensor]]:
    """The outputs of every job; equal ones are stacked."""
    alike: dict[tuple[Callable, tuple], list[int]] = {}
    for i, (job, inputs) in enumerate(jobs):
        alike.setdefault((job.work, tuple(tensor.shape for tensor in inputs)), []).append(i)
    done: list[list[Tensor]] = [[] for _ in jobs]
    for (work, shapes), members in alike.items():
        size = max(1, STACKED_ELEMENTS // max(1, sum(shape.numel() for shape in shapes)))
        for first in range(0, len(members), size):
            some = members[first : first + size]
            columns = zip(*(jobs[i][1] for i in some), strict=True)
            outputs = work(*(tensors[0].unsqueeze(0) if len(some) == 1 else torch.stack(tensors) for tensors in columns))
            for place, i in enumerate(some):
                done[i] = [output[place] for output in outputs]
                _check(done[i], jobs[i][0].outputs)
    return done


def _check(outputs: Sequence[Tensor], expected: Sequence[Dealt]) -> None:
    """Raises ValueError unless the work made what its job said: other ranks would read other bytes."""
    made = [(tuple(output.shape), output.dtype) for output in outputs]
    said = [(dealt.shape, dealt.dtype) for dealt in expected]
    if made != said:
        raise ValueError(f"work returned {made} where {said} was said")


def all_to_all(
    sent: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[tuple[tuple[int, ...], torch.dtype]]], group: dist.ProcessGroup
) -> list[list[Tensor]]:
    """``sent[k]`` to rank k; what came from rank k, which has the shapes ``expected[k]``. One message of bytes to each rank."""
    device = next((tensor.device for tensors in sent for tensor in tensors), torch.device("cpu"))
    outgoing = [_bytes(tensors, device) for tensors in sent]
    sizes = [[_padded(math.prod(shape) * dtype.itemsize) for shape, dtype in tensors] for tensors in expected]
    lengths = [sum(of_rank) for of_rank in sizes]
    incoming = torch.empty(sum(lengths), dtype=torch.uint8, device=device)
    dist.all_to_all_single(incoming, torch.cat(outgoing), lengths, [len(message) for message in outgoing], group=group)
    received, start = [], 0
    for of_rank, tensors in zip(sizes, expected, strict=True):
        found = []
        for size, (shape, dtype) in zip(of_rank, tensors, strict=True):
            used = incoming[start : start + math.prod(shape) * dtype.itemsize]
            found.append(used.view(dtype).view(shape))
            start += size
        received.append(found)
    return received


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _bytes(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The tensors' bytes one after the other, each filled up to ``ALIGNMENT``."""
    parts = []
    for tensor in tensors:
        # A single element may call itself contiguous with any stride, and is then not seen as bytes.
        flat = tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        parts.append(flat)
        if missing := _padded(len(flat)) - len(flat):
            parts.append(flat.new_zeros(missing))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)
