"""Which tokens of a sequence a sequence-parallel rank holds, and the only place that cuts a batch accordingly.

``contiguous``: rank r of P holds the r-th of P equal chunks. ``zigzag``: the sequence has 2P chunks and rank r holds
chunks r and 2P-1-r, so that causal attention costs every rank the same. ``per_document``: the same for every packed document
(``parallel/document_layout.py``), which the ring alone serves. The arithmetic is pure (a given rank, no process
group). Try alone: ``python -c "from parallel.sequence import ranges_for; print(ranges_for('zigzag', 32, 1, 4))"``.

Legend: B batch row, T tokens of the whole sequence or of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from models.batch import Batch, Bounds, Range
from models.errors import UserError
from parallel.document_layout import document_ranges

Layout = Literal["contiguous", "zigzag", "per_document"]
"""How the tokens of one sequence are spread over the cp ranks."""


def zigzag_chunks(cp_rank: int, cp_size: int) -> list[int]:
    """Chunks (of 2 * cp_size) that a rank holds: one from the head of the sequence and its mirror from the tail."""
    _check_rank(cp_rank, cp_size)
    return [cp_rank, 2 * cp_size - 1 - cp_rank]


def ranges_for(
    layout: Layout, seq_len: int, cp_rank: int, cp_size: int, parts: int = 1, documents: Sequence[tuple[int, ...]] | None = None
) -> tuple[Range, ...]:
    """Half-open global token ranges held by ``cp_rank``, in local order; ``((0, seq_len),)`` when cp_size is 1.

    ``parts``: so many neighbours among the ranks share what ``layout`` gives to one, in equal parts (``part_of``).
    ``documents``: where they begin in every row, for ``per_document``. Raises ValueError for an unknown layout or rank and where a scheme
    does not know documents, UserError when the length cannot be divided evenly or rows differ in their documents.
    """
    _check_rank(cp_rank, cp_size)
    if parts > 1:
        return part_of(ranges_for(layout, seq_len, cp_rank // parts, cp_size // parts, documents=documents), cp_rank % parts, parts)
    if layout not in ("contiguous", "zigzag", "per_document"):
        raise ValueError(
            f"layout is {layout!r}; it must be 'contiguous', 'zigzag' or 'per_document' ('auto' is resolved before this point)"
        )
    if cp_size == 1:
        return ((0, seq_len),)
    n_chunks = 2 * cp_size if layout == "zigzag" else cp_size
    chunk, rest = divmod(seq_len, n_chunks)
    if rest or chunk == 0:
        raise UserError(
            f"data.seq_len {seq_len} cannot be split into {n_chunks} equal chunks (parallel.cp {cp_size}, layout {layout}); "
            f"set data.seq_len to a multiple of {n_chunks}, e.g. {max(chunk, 1) * n_chunks}, or change parallel.cp"
        )
    if layout == "per_document":
        if documents is None:
            raise ValueError("layout 'per_document' is served by the ring alone, with bounds that say where documents begin")
        if len(set(documents)) > 1:
            raise UserError(
                f"parallel.layout per_document: the {len(documents)} rows of a batch have different documents, and a rank holds the same "
                "tokens of every row; set train.micro_batch_size=1"
            )
        return document_ranges(documents[0], seq_len, cp_rank, cp_size)
    held = [cp_rank] if layout == "contiguous" else zigzag_chunks(cp_rank, cp_size)
    return tuple((i * chunk, (i + 1) * chunk) for i in held)


def part_of(ranges: Sequence[Range], part: int, parts: int) -> tuple[Range, ...]:
    """Of the tokens of ``ranges`` in their order, cut into ``parts`` equal parts, those of ``part``. Raises UserError where they do not
    divide."""
    total = sum(end - start for start, end in ranges)
    if total % parts:
        raise UserError(f"data.seq_len: the {total} tokens of a rank cannot be split into {parts} equal parts; change data.seq_len")
    low, high, offset, found = part * total // parts, (part + 1) * total // parts, 0, []
    for start, end in ranges:
        first, last = max(low, offset), min(high, offset + end - start)
        if first < last:
            found.append((start + first - offset, start + last - offset))
        offset += end - start
    return tuple(found)


def shard_sequence(
    x: torch.Tensor, dim: int, cp_rank: int, cp_size: int, layout: Layout, documents: Sequence[tuple[int, ...]] | None = None
) -> torch.Tensor:
    """The tokens that ``cp_rank`` of ``cp_size`` ranks holds of ``x``, whose dimension ``dim`` is the whole sequence. A copy, unless
    there is one rank; differentiable. ``documents``: of ``per_document``. Raises UserError when the length cannot be divided evenly."""
    ranges = ranges_for(layout, x.shape[dim], cp_rank, cp_size, documents=documents)
    return torch.cat([x.narrow(dim, start, end - start) for start, end in ranges], dim) if cp_size > 1 else x


def unshard_sequence(
    shards: Sequence[torch.Tensor], dim: int, layout: Layout, documents: Sequence[tuple[int, ...]] | None = None
) -> torch.Tensor:
    """The whole sequence, from what ``shard_sequence`` gave to all ranks, in the order of the ranks. A copy, differentiable.

    Raises ValueError when the shards are not equally long.
    """
    lengths = [shard.shape[dim] for shard in shards]
    if len(set(lengths)) != 1:
        raise ValueError(f"shards of one sequence are equally long, not {lengths} tokens")
    size = len(shards)
    pieces: list[tuple[int, torch.Tensor]] = []
    for rank, shard in enumerate(shards):
        offset = 0
        for start, end in ranges_for(layout, lengths[0] * size, rank, size, documents=documents):
            pieces.append((start, shard.narrow(dim, offset, end - start)))
            offset += end - start
    return torch.cat([piece for _, piece in sorted(pieces, key=lambda piece: piece[0])], dim)


def check_ranges(bounds: Bounds, layout: Layout, cp_rank: int, cp_size: int, parts: int = 1) -> None:
    """Raise ValueError unless ``bounds`` holds what ``layout`` gives this rank; ``parts`` as for ``ranges_for``."""
    expected = ranges_for(layout, bounds.seq_len, cp_rank, cp_size, parts, bounds.documents)
    if bounds.ranges != expected:
        raise ValueError(f"cp rank {cp_rank} got ranges {bounds.ranges}; layout {layout!r} gives it {expected}")


def shard_batch(batch: Batch, layout: Layout, cp_rank: int, cp_size: int) -> Batch:
    """The part of a whole batch that ``cp_rank`` computes; positions, labels and document bounds stay global.

    This is the only place that splits a sequence. Raises UserError when the batch was already split (two layers that
    each split would silently train on 1/cp of the data) or when the length does not divide.
    """
    bounds = batch.bounds
    held = batch.tokens_BT.shape[1]
    if bounds.ranges != ((0, bounds.seq_len),) or held != bounds.seq_len:
        raise UserError(
            f"this batch is already split: it holds ranges {bounds.ranges} ({held} tokens) of data.seq_len {bounds.seq_len}; "
            f"parallel.cp {cp_size} may split a sequence only once"
        )
    ranges = ranges_for(layout, bounds.seq_len, cp_rank, cp_size, documents=bounds.documents)
    if cp_size == 1:
        return batch
    return replace(
        batch,
        tokens_BT=_take(batch.tokens_BT, ranges),
        labels_BT=_take(batch.labels_BT, ranges),
        positions_BT=_take(batch.positions_BT, ranges),
        bounds=bounds.with_ranges(ranges),
    )


def _take(x_BT: torch.Tensor, ranges: tuple[Range, ...]) -> torch.Tensor:
    return torch.cat([x_BT[:, start:end] for start, end in ranges], dim=1)


def _check_rank(cp_rank: int, cp_size: int) -> None:
    if not 0 <= cp_rank < cp_size:
        raise ValueError(f"cp_rank {cp_rank} is not in 0..{cp_size - 1}")
