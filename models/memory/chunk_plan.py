"""Chunks of a fast-weight memory over a token range, and which tokens of every chunk each rank works on.

Such a memory reads and takes its gradients at the weights of the last chunk start. Chunks are counted from the start of a token's
document, so that a document means the same wherever it was packed, and from global index 0 where a sequence goes on from a given state.
A range that begins inside a chunk continues it: any split of a sequence gives the same result.

A *stream* is a chain of chunks that are worked on in order; streams are independent. There is one per row, or with a reset period one per
period. Over ranks every chunk is sliced: rank r of P has tokens [r L / P, (r + 1) L / P) of a chunk of L, and step n of the scan adds up
what all of them contribute. Plain integers on the host, the same on every rank.

Legend: S streams, N steps (chunks of the longest stream), p tokens of one rank per chunk, c all chunks, T tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.batch import Bounds, Range

_Ints = np.ndarray


@dataclass(frozen=True)
class Chunks:
    """All chunks of the global range ``span``; members with ``_c`` have one entry per chunk."""

    span: Range
    n_rows: int
    n_steps: int
    n_streams: int
    step_c: _Ints
    """Place in its stream."""
    stream_c: _Ints
    row_c: _Ints
    start_c: _Ints
    """First token, global."""
    length_c: _Ints
    closes_c: _Ints
    """Its last token is the last one of a full chunk, which may have begun before the range."""
    fresh_NS: _Ints
    """The chunk begins with the initial weights: a document or a reset period starts."""
    begins_NS: _Ints
    """A chunk begins here: not the rest of one, and not past the end of its stream."""
    open_S: _Ints
    """The stream's first chunk is the rest of one that began before the range."""
    last_S: _Ints
    """Step of the stream's last chunk."""
    row_S: _Ints
    last_stream_B: _Ints
    """The stream that holds the last token of each row."""


def plan_chunks(bounds: Bounds, span: Range, chunk: int, reset_every: int = 0, from_start: bool = False) -> Chunks:
    """The chunks of ``span``, kept in ``bounds`` for all layers. ``reset_every``: tokens of a reset period, 0 for none. ``from_start``: a
    chunk inside which the range begins is taken from its own first token on; the chunks' ``span`` then begins with the earliest of them."""
    key = ("chunks", span, chunk, reset_every, from_start)
    if key not in bounds._cache:
        bounds._cache[key] = _plan(bounds, span, chunk, reset_every, from_start)
    return bounds._cache[key]


def _plan(bounds: Bounds, span: Range, chunk: int, reset_every: int, from_start: bool) -> Chunks:
    steps, streams, rows, starts, lengths, closes, fresh, first_open = [], [], [], [], [], [], [], []
    n_streams, row_of, last_of_row = 0, [], []
    spans = [(_chunk_start(row, span[0], chunk) if from_start else span[0], span[1]) for row in bounds.documents]
    for row, documents in enumerate(bounds.documents):
        start_c, length_c, closes_c, fresh_c, is_open = _row_chunks(documents, spans[row], chunk, reset_every)
        heads = np.flatnonzero(fresh_c) if reset_every else np.array([], dtype=np.int64)
        cuts = np.unique(np.concatenate([[0], heads])).astype(np.int64)
        stream_c = np.searchsorted(cuts, np.arange(len(start_c)), side="right") - 1
        steps.append(np.arange(len(start_c)) - cuts[stream_c])
        streams.append(stream_c + n_streams)
        rows.append(np.full(len(start_c), row))
        starts.append(start_c)
        lengths.append(length_c)
        closes.append(closes_c)
        fresh.append(fresh_c)
        first_open += [is_open] + [False] * (len(cuts) - 1)
        row_of += [row] * len(cuts)
        n_streams += len(cuts)
        last_of_row.append(n_streams - 1)
    step_c, stream_c, fresh_c = np.concatenate(steps), np.concatenate(streams), np.concatenate(fresh)
    n_steps, open_S = int(step_c.max()) + 1, np.array(first_open)
    fresh_NS = np.zeros((n_steps, n_streams), dtype=bool)
    fresh_NS[step_c, stream_c] = fresh_c
    begins_NS = np.zeros_like(fresh_NS)
    begins_NS[step_c, stream_c] = True
    begins_NS[0] &= ~open_S
    last_S = np.zeros(n_streams, dtype=np.int64)
    np.maximum.at(last_S, stream_c, step_c)
    return Chunks(
        span=min(spans),
        n_rows=len(bounds.documents),
        n_steps=n_steps,
        n_streams=n_streams,
        step_c=step_c,
        stream_c=stream_c,
        row_c=np.concatenate(rows),
        start_c=np.concatenate(starts),
        length_c=np.concatenate(lengths),
        closes_c=np.concatenate(closes),
        fresh_NS=fresh_NS,
        begins_NS=begins_NS,
        open_S=open_S,
        last_S=last_S,
        row_S=np.array(row_of),
        last_stream_B=np.array(last_of_row),
    )


def _chunk_start(documents: Sequence[int], token: int, chunk: int) -> int:
    """The first token of the chunk that holds ``token``."""
    place = max(bisect_right(documents, token) - 1, 0)
    origin = documents[place] if documents else 0
    return origin + (token - origin) // chunk * chunk


def _row_chunks(documents: Sequence[int], span: Range, chunk: int, reset_every: int) -> tuple[_Ints, _Ints, _Ints, _Ints, bool]:
    """(starts, lengths, whether each ends a full chunk, whether it begins with the initial weights, whether the first one began before the
    range) of one row."""
    first, end = span
    place = max(bisect_right(documents, first) - 1, 0)
    origins = [documents[place] if documents else 0, *(s for s in documents[place + 1 :] if s < end)]
    starts, closes, fresh, is_open = [], [], [], False
    for i, (origin, until) in enumerate(zip(origins, [*origins[1:], end], strict=True)):
        begin = max(origin, first)
        grid = origin + chunk * np.arange((begin - origin) // chunk, -(-(until - origin) // chunk))
        begins_new = (grid == origin) & (origin > 0)
        if reset_every:
            begins_new |= ((grid - origin) % reset_every == 0) & (grid > 0)
        if grid[0] < begin:
            grid[0], begins_new[0] = begin, False
            is_open = is_open or i == 0
        starts.append(grid)
        closes.append((np.append(grid[1:], until) - origin) % chunk == 0)
        fresh.append(begins_new)
    start_c = np.concatenate(starts)
    return start_c, np.diff(np.append(start_c, end)), np.concatenate(closes), np.concatenate(fresh), is_open


@dataclass(frozen=True)
class Share:
    """One rank's part of all chunks and how tokens get there. Slots are [N, S, p], flattened."""

    rank: int
    held: int
    """Tokens [B * T] that this rank holds; those that belong to no chunk are not given away."""
    shape: tuple[int, int, int]
    mask_NSp: Tensor
    """Slots that hold a token."""
    first_NSp: Tensor
    """The first token of a chunk that begins here."""
    close_NSp: Tensor
    """The last token of a full chunk."""
    any_close: tuple[bool, ...]
    """By step: whether there is one, on this rank."""
    give_T: Tensor
    """This rank's own tokens [B * T] in the order in which they are given away, rank after rank ..."""
    take_T: Tensor
    """... and the slots of those that arrive, in their order."""
    given: tuple[int, ...]
    """Tokens given to each rank."""
    taken: tuple[int, ...]
    """Tokens that come from each rank."""


def share_of(chunks: Chunks, held: Sequence[Sequence[Range]], rank: int, device: torch.device) -> Share:
    """The share of ``rank`` where rank r holds the global ranges ``held[r]``, in this local order, of every row."""
    first, end = chunks.span
    owner_T, local_T = np.full(end - first, -1), np.zeros(end - first, dtype=np.int64)
    for r, ranges in enumerate(held):
        offset = 0
        for start, stop in ranges:
            owner_T[start - first : stop - first] = r
            local_T[start - first : stop - first] = offset + np.arange(stop - start)
            offset += stop - start
    n_local = sum(stop - start for start, stop in held[rank])
    width = -(-int(chunks.length_c.max()) // len(held))
    give, given = [], []
    for r in range(len(held)):
        row, token, _, _ = _slots(chunks, r, len(held), width)
        mine = owner_T[token - first] == rank
        give.append(row[mine] * n_local + local_T[token[mine] - first])
        given.append(int(mine.sum()))
    _, token, slot, leads = _slots(chunks, rank, len(held), width)
    origin = owner_T[token - first]
    shape = (chunks.n_steps, chunks.n_streams, width)
    mask, leading = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    mask.reshape(-1)[slot] = True
    leading.reshape(-1)[slot[leads]] = True
    closing = _closing(chunks, rank, len(held), shape)

    def on_device(values: _Ints) -> Tensor:
        return torch.tensor(values).to(device)

    return Share(
        rank=rank,
        held=chunks.n_rows * n_local,
        shape=shape,
        mask_NSp=on_device(mask),
        first_NSp=on_device(leading & chunks.begins_NS[..., None]),
        close_NSp=on_device(closing),
        any_close=tuple(bool(step.any()) for step in closing),
        give_T=on_device(np.concatenate(give)),
        take_T=on_device(slot[np.argsort(origin, kind="stable")]),
        given=tuple(given),
        taken=tuple(int((origin == r).sum()) for r in range(len(held))),
    )


def _slots(chunks: Chunks, rank: int, size: int, width: int) -> tuple[_Ints, _Ints, _Ints, _Ints]:
    """Of every token that ``rank`` works on, chunk after chunk: row, global index, slot, whether it is its chunk's first."""
    low_c = chunks.length_c * rank // size
    count_c = chunks.length_c * (rank + 1) // size - low_c
    of_chunk = np.repeat(np.arange(len(count_c)), count_c)
    inside = np.arange(len(of_chunk)) - np.repeat(np.cumsum(count_c) - count_c, count_c)
    token = (chunks.start_c + low_c)[of_chunk] + inside
    slot = ((chunks.step_c * chunks.n_streams + chunks.stream_c) * width)[of_chunk] + inside
    return chunks.row_c[of_chunk], token, slot, (low_c[of_chunk] + inside) == 0


def _closing(chunks: Chunks, rank: int, size: int, shape: tuple[int, int, int]) -> _Ints:
    """[N, S, p]: slots with the last token of a full chunk, which every chunk leaves to the last rank."""
    closing = np.zeros(shape, dtype=bool)
    if rank == size - 1:
        slot_c = chunks.length_c - 1 - chunks.length_c * rank // size
        of = chunks.closes_c
        closing[chunks.step_c[of], chunks.stream_c[of], slot_c[of]] = True
    return closing
