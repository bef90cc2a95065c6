"""What a method of updating matrices looks like to the driver: states by name and shape, and a step that says what it needs from the
other ranks instead of communicating itself.

A matrix [m, n] lies on its ranks by rows, as FSDP2 shards it. A step is a generator: it yields requests, gets their answers, and
returns the update. The driver runs the generators of all matrices side by side and answers all requests of one kind in one collective,
so a training step has as many collectives as its longest method has requests, not as many as there are matrices. One rank alone
answers itself.

Legend: m rows of the whole matrix, n columns, i rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The rows of a matrix that this rank holds: ``first`` to ``first + count`` of ``total``; ``count`` may be 0."""

    total: int
    first: int
    count: int
    ranks: int = 1
    """That share the matrix."""
    rank: int = 0
    """This one among them."""

    @staticmethod
    def whole(total: int) -> Rows:
        """Of a matrix that one rank holds."""
        return Rows(total, 0, total)

    @staticmethod
    def chunk(total: int, rank: int, ranks: int) -> Rows:
        """As FSDP2 and ``torch.chunk`` deal rows: equal parts, rounded up, the last ones shorter or empty."""
        size = -(-total // ranks)
        first = min(rank * size, total)
        return Rows(total, first, min(size, total - first), ranks, rank)

    @property
    def slice(self) -> slice:
        """Of dim 0 of the whole matrix."""
        return slice(self.first, self.first + self.count)

    def counts(self, start: int = 0, stop: int | None = None) -> tuple[int, ...]:
        """How many of the rows ``start`` to ``stop`` of the whole (None: the end) every rank holds."""
        stop = self.total if stop is None else stop
        dealt = [Rows.chunk(self.total, rank, self.ranks) for rank in range(self.ranks)]
        return tuple(max(0, min(rows.first + rows.count, stop) - max(rows.first, start)) for rows in dealt)

    def within(self, start: int, stop: int) -> slice:
        """Those of this rank's rows that are rows ``start`` to ``stop`` of the whole."""
        first = min(max(start - self.first, 0), self.count)
        return slice(first, max(first, min(stop - self.first, self.count)))


class Sum(NamedTuple):
    """The sum of ``tensor`` (float32, or float64 for small Gram matrices of a refresh) over the ranks that share the matrix; the answer
    has its shape and dtype and is the same on all."""

    tensor: Tensor


class SumRows(NamedTuple):
    """Of the sum over ranks of ``tensor`` [rows, ...] this rank's ``Rows.chunk`` of dim 0."""

    tensor: Tensor


class GatherRows(NamedTuple):
    """All ranks' ``tensor`` (each its ``Rows.chunk`` of ``total`` rows) put together along dim 0."""

    tensor: Tensor
    total: int


@dataclass(frozen=True)
class Dealt:
    """A tensor whose rows (dim 0) lie on the ranks in their order: ``counts[k]`` of them on rank k. ``row``: shape of one."""

    counts: tuple[int, ...]
    row: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return (sum(self.counts), *self.row)


class Job(NamedTuple):
    """Work that needs a whole matrix and that one rank does for all."""

    work: Callable[..., Sequence[Tensor]]
    """Of the whole inputs, each with a batch dim before its own, to the whole outputs with that dim. Jobs of equal work (``==``) and equal
    shapes may be done in one call."""
    inputs: tuple[Tensor, ...]
    """This rank's rows of each."""
    dealt: tuple[Dealt, ...]
    """How the inputs lie on all ranks."""
    outputs: tuple[Dealt, ...]
    """What comes back, and how it is dealt."""
    cost: float
    """Of the work, in any unit that all jobs share; by it jobs are dealt to ranks."""


class OnOwner(NamedTuple):
    """Every job done by one rank, its owner: the answer is, for each job, this rank's rows of its outputs."""

    jobs: tuple[Job, ...]


class Weight(NamedTuple):
    """This rank's rows of the parameter before the step [i, n], in any floating dtype: answered without communication."""


Request = Sum | SumRows | GatherRows | OnOwner | Weight
Steps = Generator[Request, Any, Any]
"""Yields requests, is sent their answers, returns the ``updates.Update`` [i, n] in the gradient's dtype (or, inside a method, a tensor)."""


@dataclass(frozen=True)
class StateSpec:
    """One state tensor of a matrix. ``rows``: dim 0 are the matrix's rows and lie where they lie; ``chunk``: dim 0 is dealt to the
    matrix's ranks by ``Rows.chunk``; ``whole``: the same on every rank."""

    shape: tuple[int, ...]
    placement: Literal["rows", "chunk", "whole"]
    dtype: torch.dtype = torch.float32
    codec: Literal["moment", "variance", "basis", "exact"] = "exact"
    """What the storage may do with it: ``moment`` signed and ``variance`` not negative may be kept in few bits, ``exact`` may not, and a
    ``basis`` is kept in groups of four bits. One that a step does not write keeps its bits."""


class Method(Protocol):
    """How a matrix is updated. Immutable; everything that changes is in the states.

    A method that renews something every ``gap`` steps says so by an attribute or property of that name: keys of the matrices it updates
    are then chosen so that their ``key % gap`` differ, or are spread evenly where there are more matrices than steps.
    """

    def states(self, shape: tuple[int, int]) -> Mapping[str, StateSpec]:
        """The states of a matrix of ``shape``, all zero at first."""
        ...

    def step(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        """One step on this rank's rows of the gradient (float32). ``states``: this rank's parts, written in place. ``step``: 1 in the
        first. ``key``: a number of the parameter's own that is the same on every mesh, for random bases.

        The generator returns an ``updates.Update`` (float32, [i, n]): the driver subtracts learning rate times it after weight decay.
        """
        ...


class Projecting(Method, Protocol):
    """A method that reads the gradient only through coordinates which are linear in it while the basis stays: gradients of several
    micro-batches can be summed there, in [long side, r] instead of [m, n] (``optim/fused_backward.py``)."""

    def renews(self, step: int, key: int) -> bool:
        """Whether step ``step`` may find a new basis, for which it needs the whole gradient."""
        ...

    def coordinates(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        """This rank's part of the coordinates, a tensor of its own; writes no state. Only for a step that does not renew."""
        ...

    def lifted(self, coordinates: Tensor, states: dict[str, Tensor], rows: Rows, columns: int, step: int, key: int) -> Steps:
        """``step`` from summed coordinates instead of the gradient. Only for a step that does not renew."""
        ...
