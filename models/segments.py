"""How a sequence is read segment after segment: which tokens each row gives to each step, as plain integers.

Segments are counted from a document's start, so that packed documents mean what they mean alone. A sequence may end, and a state be
handed on, inside a segment: the tokens of the unfinished one then travel with the state and are read again before those that follow, so
that a text may be cut anywhere without changing what it means.

    before 0, size 4, documents at 0 and 6, tokens 0..9:     [0 1 2 3] [4 5] | [6 7 8 9]
    the same, 3 tokens before:                        [. . . 0] [1 2 3 4] [5] | [6 7 8 9]

Legend: B row, T token, w most new tokens of a row in a step, s most tokens of a row in a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest

import torch
from torch import Tensor

from models.batch import Bounds

NO_PREFIX = "a segment does not see the later ones, so that no document can have a prefix that all its tokens see"


@dataclass(frozen=True)
class Part:
    """What one row gives to one step: its new tokens [start, end), by their place in the whole sequence."""

    start: int
    end: int
    before: int = 0
    """Tokens of the same segment that come with the state; only in a row's first part."""
    begins: bool = False
    """A document starts here: the memory is as before the first token."""
    closes: bool = False
    """The segment is whole, or its document ends: the memory is written. Else the segment's tokens go on with the state."""

    @property
    def new(self) -> int:
        """New tokens; 0 where the row has nothing left to read."""
        return self.end - self.start

    @property
    def length(self) -> int:
        """Tokens of the segment so far."""
        return self.before + self.new


@dataclass(frozen=True)
class Step:
    """One segment of every row."""

    parts: tuple[Part, ...]
    first: int
    """Place in the whole sequence of the first token held."""
    pending: bool
    """After it some row waits inside an unfinished segment."""
    cache: dict = field(compare=False, repr=False, hash=False)
    """Scratch shared by the steps of a sequence."""

    @property
    def even(self) -> bool:
        """All rows give the same tokens of segments that begin with them."""
        return all(part == self.parts[0] for part in self.parts) and not self.parts[0].before and self.parts[0].new > 0

    @property
    def width(self) -> int:
        """w, at least 1"""
        return max(1, *(part.new for part in self.parts))

    def mask(self, which: str, device: torch.device) -> Tensor | None:
        """[B] of the parts' ``which`` (a flag of `Part`) on ``device``; None where it is false for all."""
        flags = tuple(getattr(part, which) for part in self.parts)
        if not any(flags):
            return None
        key = (flags, device)
        if key not in self.cache:
            self.cache[key] = torch.tensor(flags, device=device)
        return self.cache[key]

    def take(self, x_BT: Tensor, fill: float = 0) -> Tensor:
        """[B, w, ...] of the tokens held here ``x_BT``: each row's new tokens, then ``fill``."""
        if self.even:
            return x_BT[:, self.parts[0].start - self.first : self.parts[0].end - self.first]
        return padded([x_BT[b, part.start - self.first : part.end - self.first] for b, part in enumerate(self.parts)], self.width, fill)


@dataclass(frozen=True)
class Segment:
    """One step of a sequence to run, from ``state`` (None: the first step's). An object and no tuple: what shards a model's parameters
    waits for the gradients of its inputs, and those of a state come at different times on different ranks."""

    step: Step
    state: dict[str, Tensor] | None
    loss: bool = True
    """False: only the state after it is wanted, and no loss is made."""


def padded(rows: Sequence[Tensor], length: int, fill: float = 0) -> Tensor:
    """[B, length, ...] of rows [at most length, ...], filled up at the end. Differentiable."""
    ends = [row.new_full((length - len(row), *row.shape[1:]), fill) for row in rows]
    return torch.stack([torch.cat(pair) for pair in zip(rows, ends, strict=True)])


def put_together(pieces: Sequence[Tensor], steps: Sequence[Step]) -> Tensor:
    """[B, T, ...] in the order of the tokens, from what each step gave for its new tokens [B, w, ...]. Differentiable."""
    if all(step.even for step in steps):
        return torch.cat(list(pieces), 1)
    rows = range(len(steps[0].parts))
    found = [[piece[b, : step.parts[b].new] for piece, step in zip(pieces, steps, strict=True)] for b in rows]
    return torch.stack([torch.cat(row) for row in found])


def joined(steps: Sequence[Step], size: int, n: int) -> list[Step]:
    """Up to ``n`` steps that follow each other in one, where all rows give the same whole segments of ``size`` tokens of one document."""
    found: list[Step] = []
    room = 0
    for step in steps:
        part = step.parts[0]
        whole = step.even and part.closes and part.new == size and not step.pending
        if whole and room and not part.begins:
            before = found[-1].parts[0]
            parts = (Part(before.start, part.end, 0, before.begins, True),) * len(step.parts)
            found[-1] = Step(parts, step.first, False, step.cache)
            room -= 1
        else:
            found.append(step)
            room = n - 1 if whole else 0
    return found


def with_idle(steps: list[Step], n: int) -> list[Step]:
    """The steps and, up to ``n``, some in which no row has anything to read."""
    last = steps[-1]
    end = max(part.end for part in last.parts)
    return steps + [Step((Part(end, end),) * len(last.parts), last.first, last.pending, last.cache)] * (n - len(steps))


def plan_segments(bounds: Bounds, size: int, before: Sequence[int], whole: bool = False) -> list[Step]:
    """The steps of the tokens that ``bounds`` holds, in segments of ``size`` tokens, ``before`` of which per row come with the state.

    ``whole``: nobody goes on from here, so that the last segment is closed however short. Global index 0 is not counted as a document's
    start: what comes before it is the state, or nothing. Raises ValueError where the tokens are not one stretch.
    """
    if len(bounds.ranges) != 1:
        raise ValueError(f"segments follow one another, and ranges {bounds.ranges} are not one stretch of tokens; set parallel.cp=1")
    if bounds.prefixes:
        raise ValueError(NO_PREFIX)
    ((first, last),) = bounds.ranges
    rows = [_row(set(starts), first, last, size, had, whole) for starts, had in zip(bounds.documents, before, strict=True)]
    idle, cache, steps, pending = Part(last, last), {}, [], False
    for parts in zip_longest(*rows, fillvalue=idle):
        pending = pending or any(part.new and not part.closes for part in parts)
        steps.append(Step(parts, first, pending, cache))
    return steps


def plan_stretches(bounds: Bounds, size: int) -> list[Step]:
    """The tokens that ``bounds`` holds in stretches of ``size``, the same for all rows whatever documents they hold.

    Raises ValueError where they are not the whole sequence in order, or a document has a prefix that all its tokens see.
    """
    if bounds.ranges != ((0, bounds.seq_len),):
        raise ValueError(f"segments follow one another, and ranges {bounds.ranges} are not the whole sequence; set parallel.cp=1")
    if bounds.prefixes:
        raise ValueError(NO_PREFIX)
    cache: dict = {}
    edges = [*range(0, bounds.seq_len, size), bounds.seq_len]
    return [Step((Part(start, end, closes=True),) * len(bounds.documents), 0, False, cache) for start, end in pairwise(edges)]


def _row(starts: set[int], first: int, last: int, size: int, before: int, whole: bool) -> list[Part]:
    edges = [first, *sorted(start for start in starts if first < start < last), last]
    parts = []
    for start, end in pairwise(edges):
        begins = start > 0 and start in starts
        had = 0 if begins else before
        while start < end:
            stop = min(end, start + size - had)
            parts.append(Part(start, stop, had, begins, closes=whole or stop < last or had + stop - start == size))
            start, had, begins, before = stop, 0, False, 0
    return parts
