"""Batches of one data-parallel rank, and the cursor that says how far the data has been consumed.

The sequences of a run are counted 0, 1, 2, ... over all ranks and epochs. A step takes the next ``per_step`` of them, whatever the
topology: micro-step m of rank r holds rows (m dp_size + r) micro_batch_size and on. So dp=2 x accum=1 and dp=1 x accum=2 train
on the same sequences, ranks are disjoint, and a cursor from one topology continues on another. Sequence-parallel ranks
share a dp_rank and get equal batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from models.batch import Batch, Bounds
from trainer.data.clusters import NONE
from trainer.data.packing import PackedSequence, Packing, Shuffle, pack, padding_sequence
from trainer.data.prefixes import CAUSAL, PrefixUse, left_of
from trainer.data.streaming import Place
from trainer.data.token_store import TokenStore

Cursor = dict[str, Any]
"""JSON-able position in the data: ``sequences`` consumed by all ranks, ``epoch``, and what the position is valid for."""

Step = tuple[list[Batch], Cursor]
"""The micro-batches of one optimizer step, and the cursor to go on from after it."""


@dataclass(frozen=True)
class Share:
    """Which rows of a step one data-parallel rank takes."""

    dp_rank: int
    dp_size: int
    micro_batch_size: int
    grad_accum: int

    def __post_init__(self) -> None:
        if not 0 <= self.dp_rank < self.dp_size:
            raise ValueError(f"dp_rank {self.dp_rank} is not in 0..{self.dp_size - 1}")

    @property
    def per_step(self) -> int:
        """Sequences of one optimizer step over all ranks."""
        return self.dp_size * self.micro_batch_size * self.grad_accum

    def rows(self, micro_step: int) -> range:
        """Rows of this rank's micro-step, counted from the first sequence of the step."""
        first = (micro_step * self.dp_size + self.dp_rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)


class NumberedSequences(Protocol):
    """Sequences that can be had in any order, epoch after epoch."""

    pad_id: int

    @property
    def seq_len(self) -> int: ...

    def __len__(self) -> int:
        """Sequences of one epoch."""
        ...

    def __getitem__(self, n: int) -> PackedSequence:
        """Sequence ``n`` of the run."""
        ...


class StoredSequences:
    """Packed sequences of some documents of a token store, by number."""

    def __init__(
        self,
        store: TokenStore,
        documents: np.ndarray,
        *,
        seq_len: int,
        seed: int,
        shuffle: Shuffle,
        document_mask: bool,
        pad_id: int,
        lanes: int = 0,
        prefix_use: PrefixUse = CAUSAL,
    ) -> None:
        self.store = store
        self.documents = documents
        self.document_mask = document_mask
        self.pad_id = pad_id
        self.prefix_use = prefix_use
        self.packing = Packing(store.documents["tokens"][documents], seq_len, seed, shuffle, lanes)

    @property
    def seq_len(self) -> int:
        """Tokens of a sequence."""
        return self.packing.seq_len

    def __len__(self) -> int:
        """Sequences of one epoch."""
        return self.packing.n_sequences

    def __getitem__(self, n: int) -> PackedSequence:
        """Sequence ``n`` of the run."""
        pieces = self.packing.pieces(n)
        fragments = [self.store.read(int(self.documents[piece.document]), piece.start, piece.stop) for piece in pieces]
        known, at = self.store.prefixes, [int(self.documents[piece.document]) for piece in pieces]
        prefixes = () if known is None else [left_of(int(known["tokens"][i]), p.start, p.stop) for i, p in zip(at, pieces, strict=True)]
        clusters = () if self.store.clusters is None else self.store.clusters[at].tolist()
        packed = pack(fragments, self.packing.seq_len, self.document_mask, self.pad_id, prefixes, self.prefix_use, clusters)
        return packed._replace(continued=True) if self.packing.continues(n) else packed


def make_batch(rows: Sequence[PackedSequence]) -> Batch:
    """Stack sequences; the batch holds the whole of each (``shard_batch`` splits it over sequence-parallel ranks)."""
    seq_len = len(rows[0].tokens_T)
    tokens_BT, labels_BT, positions_BT = (
        torch.from_numpy(np.stack(arrays, dtype=np.int32, casting="same_kind"))
        for arrays in ([row.tokens_T for row in rows], [row.labels_T for row in rows], [row.positions_T for row in rows])
    )
    # One row's padding or documents without prefixes: their prefixes end where they begin.
    prefixes = tuple(row.prefixes or row.documents for row in rows) if any(row.prefixes for row in rows) else ()
    clusters = tuple(row.clusters or ((0, NONE),) for row in rows) if any(row.clusters for row in rows) else ()
    bounds = Bounds(seq_len, ((0, seq_len),), tuple(row.documents for row in rows), prefixes, clusters)
    return Batch(tokens_BT, labels_BT, positions_BT, bounds, tuple(row.continued for row in rows))


def stored_steps(sequences: NumberedSequences, share: Share, consumed: int, plan: dict[str, Any]) -> Iterator[Step]:
    """Steps for ever, from ``consumed`` sequences on; what a step reads depends on nothing that came before it."""
    while True:
        micro_batches = [make_batch([sequences[consumed + row] for row in share.rows(m)]) for m in range(share.grad_accum)]
        consumed += share.per_step
        yield micro_batches, {"plan": plan, "sequences": consumed, "epoch": consumed // len(sequences)}


def streamed_steps(
    stream: Iterator[tuple[Callable[[], PackedSequence], Place]],
    share: Share,
    plan: dict[str, Any],
) -> Iterator[Step]:
    """Steps of a sequential stream. Every rank reads all of it and packs only its own rows, which is what makes the position
    exact for any number of ranks; the price is that each rank tokenises for all."""
    owner = {row: m for m in range(share.grad_accum) for row in share.rows(m)}
    while True:
        micro_rows: list[list[PackedSequence]] = [[] for _ in range(share.grad_accum)]
        place = Place()
        for row in range(share.per_step):
            make, place = next(stream)
            if row in owner:
                micro_rows[owner[row]].append(make())
        yield [make_batch(rows) for rows in micro_rows], {"plan": plan, **place.to_cursor()}


def held_out_batches(sequences: NumberedSequences, n_sequences: int, share: Share) -> Iterator[Batch]:
    """``n_sequences`` sequences spread evenly over the held-out text (all of it when there are fewer), in a fixed order.

    Every rank gets the same number of batches; rows beyond the last sequence hold padding without labels.
    """
    n = min(n_sequences, len(sequences))
    chosen = [i * len(sequences) // n for i in range(n)]
    filler = padding_sequence(sequences.seq_len, sequences.pad_id)
    rows_per_round = share.dp_size * share.micro_batch_size
    for first in range(0, n, rows_per_round):
        rows = [first + row for row in share.rows(0)]
        yield make_batch([sequences[chosen[row]] if row < n else filler for row in rows])
