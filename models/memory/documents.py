"""Where documents begin inside one token range, in the forms that convolutions and chunked recurrences need.

Legend: B row, N chunk, C token in chunk, R token whose convolution window reaches over a document start.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.batch import Bounds, Range


@dataclass(frozen=True)
class DocumentPlan:
    """Document starts of one range on one device; members are None where there is nothing to cut."""

    segment_NBC: Tensor | None = None
    """Document starts in the token's chunk up to and including the token."""
    hidden_Bn1: Tensor | None = None
    """Which of the ``halo`` tokens before the range belong to an earlier document than its first token."""
    cut_rows_R: Tensor | None = None
    """Row of every token less than ``halo`` after a document start inside the range ..."""
    cut_tokens_R: Tensor | None = None
    """... its place in the range ..."""
    cut_ages_R: Tensor | None = None
    """... and its distance from the start of its document."""
    starts: tuple[tuple[int, ...], ...] = ()
    """Of every row the places in the range where documents start; empty where none does in any row."""
    kept: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """What others make of ``starts``, for all layers."""


def plan_documents(bounds: Bounds, span: Range, chunk: int, halo: int, device: torch.device) -> DocumentPlan:
    """The plan of the global token range ``span``, kept in ``bounds`` for all layers.

    Global index 0 is not counted as a start: what comes before it is the state handed in by the caller, or nothing.
    """
    key = ("documents", span, chunk, halo, device)
    if key not in bounds._cache:
        bounds._cache[key] = _plan(bounds, span, chunk, halo, device)
    return bounds._cache[key]


def _plan(bounds: Bounds, span: Range, chunk: int, halo: int, device: torch.device) -> DocumentPlan:
    start, end = span
    starts = [row[bisect_left(row, max(start, 1)) : bisect_left(row, end)] for row in bounds.documents]
    hidden = _hidden(bounds, start, halo)
    if not any(starts):
        return DocumentPlan(hidden_Bn1=None if hidden is None else hidden.to(device))
    n_chunks = -(-(end - start) // chunk)
    marks = torch.zeros(len(starts), n_chunks * chunk, dtype=torch.int32)
    cuts: list[tuple[int, int, int]] = []
    for row, row_starts in enumerate(starts):
        marks[row, [s - start for s in row_starts]] = 1
        for s, following in zip(row_starts, (*row_starts[1:], end), strict=False):
            if s > start:  # at the range's first token hiding the halo is enough
                cuts += [(row, t - start, t - s) for t in range(s, min(s + halo, following))]
    segment = marks.view(len(starts), n_chunks, chunk).cumsum(-1).transpose(0, 1)
    columns = torch.tensor(cuts, dtype=torch.int64).view(-1, 3).t().contiguous().to(device).unbind(0) if cuts else (None,) * 3
    places = tuple(tuple(s - start for s in row) for row in starts)
    return DocumentPlan(segment.to(device), None if hidden is None else hidden.to(device), *columns, starts=places)


def _hidden(bounds: Bounds, start: int, halo: int) -> Tensor | None:
    """Halo tokens that lie before the last document start up to the range's first token; None if there are none."""
    last = [_last_start(row, start, start - halo) for row in bounds.documents]
    counts = [min(max(halo - (start - s), 0), halo) for s in last]
    if not any(counts):  # of integers, not of a tensor: a traced step has no values to look at
        return None
    return (torch.arange(halo) < torch.tensor(counts).unsqueeze(-1)).unsqueeze(-1)


def _last_start(starts: tuple[int, ...], token: int, default: int) -> int:
    """The last document start in (0, token], or ``default``."""
    place = bisect_right(starts, token) - 1
    return starts[place] if place >= 0 and starts[place] > 0 else default
