"""Documents to sequences of equal length: index arithmetic, and the arrays of one sequence. Pure functions: no tensors, no files.

All documents of an epoch, in that epoch's order, form one stream of tokens; sequence i is its tokens [i T, (i + 1) T). So every
token is seen exactly once per epoch, long documents run through consecutive sequences, and the last sequence is filled up with
padding that no label asks for. Legend: T = tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from models.batch import IGNORE_INDEX
from trainer.data.clusters import stretches
from trainer.data.prefixes import CAUSAL, PrefixUse, ends_of
from trainer.data.shuffling import make_key, permutation, permuted

Shuffle = Literal["sequences", "documents", "none"]


class Piece(NamedTuple):
    """Tokens [start, stop) of a document."""

    document: int
    start: int
    stop: int


class PackedSequence(NamedTuple):
    """One sequence, ready to be stacked: int64 arrays of T, and the starts of its document fragments."""

    tokens_T: np.ndarray
    labels_T: np.ndarray
    positions_T: np.ndarray
    documents: tuple[int, ...]
    prefixes: tuple[int, ...] = ()
    """Where the prefix of each of these fragments ends; empty when none has one, or none is to be seen."""
    clusters: tuple[tuple[int, int], ...] = ()
    """(first token, cluster) of the stretches of one cluster each; empty where documents have none."""
    continued: bool = False
    """Whether the first token follows the last one of the sequence one step earlier in this one's lane."""


class Packing:
    """Where the tokens of every sequence of every epoch stand: a pure function of (lengths, T, seed, shuffle).

    ``lengths`` are the documents' tokens, end token included. ``shuffle``: ``sequences`` draws the order of documents and then of
    sequences anew each epoch, ``documents`` only that of documents, ``none`` keeps both.

    ``lanes`` above 0: the stream of an epoch is cut into so many runs of consecutive sequences, and sequence n is the next one of run
    n % lanes: with as many lanes as a step has rows, a row reads on where it stood in the step before. Order among sequences is then
    not drawn.
    """

    def __init__(self, lengths: np.ndarray, seq_len: int, seed: int, shuffle: Shuffle, lanes: int = 0) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if len(self.lengths) == 0 or self.lengths.min() < 1:
            raise ValueError("packing needs at least one document, and no empty ones")
        self.seq_len = seq_len
        self.seed = seed
        self.shuffle = shuffle
        self.lanes = lanes
        if lanes and shuffle == "sequences":
            raise ValueError("sequences that follow one another in lanes cannot be shuffled")
        self.n_tokens = int(self.lengths.sum())
        self.n_sequences = -(-self.n_tokens // seq_len)
        self._order = lru_cache(maxsize=2)(self._draw_order)  # two: a step may reach into the next epoch

    def pieces(self, n: int) -> list[Piece]:
        """Pieces of sequence ``n`` counted from the start of the run (epoch n // n_sequences).

        They cover T + 1 tokens, the last one being the label of token T - 1; fewer at the end of an epoch.
        """
        epoch, i = divmod(n, self.n_sequences)
        if self.shuffle == "sequences":
            i = permuted(i, self.n_sequences, make_key("sequences", self.seed, epoch))
        elif self.lanes:
            i = self._in_lane(i)
        return self._stream_pieces(epoch, i * self.seq_len, min((i + 1) * self.seq_len + 1, self.n_tokens))

    def _in_lane(self, i: int) -> int:
        """Where the ``i``-th sequence of an epoch stands in its stream; the first lanes are longer by one where they do not divide it."""
        turn, lane = divmod(i, self.lanes)
        each, longer = divmod(self.n_sequences, self.lanes)
        return lane * each + min(lane, longer) + turn

    def continues(self, n: int) -> bool:
        """Whether sequence ``n`` goes on with the document in which sequence ``n - lanes`` ended."""
        in_lane = self.lanes > 0 and n % self.n_sequences >= self.lanes
        return in_lane and self.pieces(n)[0].start > 0

    def _stream_pieces(self, epoch: int, begin: int, end: int) -> list[Piece]:
        """The pieces that make up tokens [begin, end) of an epoch's stream."""
        documents, starts = self._order(epoch)
        first = int(np.searchsorted(starts, begin, side="right")) - 1
        last = int(np.searchsorted(starts, end, side="left"))
        found = []
        for at in range(first, last):
            document, start = int(documents[at]), int(starts[at])
            found.append(Piece(document, max(begin - start, 0), min(end - start, int(self.lengths[document]))))
        return found

    def _draw_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents in the epoch's order, and where each begins in the stream."""
        n = len(self.lengths)
        documents = np.arange(n) if self.shuffle == "none" else permutation(n, make_key("documents", self.seed, epoch))
        starts = np.zeros(n, dtype=np.int64)
        np.cumsum(self.lengths[documents][:-1], out=starts[1:])
        return documents, starts


def pack(
    fragments: Sequence[np.ndarray],
    seq_len: int,
    document_mask: bool,
    pad_id: int,
    prefixes: Sequence[int] = (),
    use: PrefixUse = CAUSAL,
    clusters: Sequence[int] = (),
) -> PackedSequence:
    """The arrays of one sequence from the fragments of documents in it (up to T + 1 tokens in all, the last a mere label).

    ``labels_T[t]`` is the token after t. With ``document_mask`` the end token of a document has no label (what follows is another
    text); without, it is the first token of the next document. The end of an epoch and padding have none.

    ``positions_T`` count from the start of a fragment with ``document_mask``, else from 0 to T - 1. A document that runs through
    several sequences begins again at position 0 in each: nothing is carried between sequences (with shuffling they are not
    even neighbours), so the model sees a text that starts there, and positions never exceed T - 1.

    ``documents`` are the fragments' starts, the padding's included, with ``document_mask``; else (0,). ``prefixes``: how many tokens each
    fragment begins with that are of its document's prefix; ``use`` says whether they are labels and whether all of the fragment sees them.
    ``clusters``: of each fragment's document, whatever the mask; empty where documents have none.
    """
    stream = np.concatenate(fragments).astype(np.int64, copy=False)
    n = min(len(stream), seq_len)
    starts = np.cumsum([0] + [len(fragment) for fragment in fragments])  # of each fragment, and of what follows them
    tokens_T = np.full(seq_len, pad_id, dtype=np.int64)
    tokens_T[:n] = stream[:n]
    labels_T = np.full(seq_len, IGNORE_INDEX, dtype=np.int64)
    labels_T[: len(stream) - 1] = stream[1:]
    if prefixes and not use.loss:
        for start, prefix in zip(starts.tolist(), prefixes, strict=False):  # a token's label is the one after it
            labels_T[max(start - 1, 0) : max(start + prefix - 1, 0)] = IGNORE_INDEX
    of_clusters = stretches(starts.tolist(), clusters, seq_len) if clusters else ()
    if not document_mask:
        return PackedSequence(tokens_T, labels_T, np.arange(seq_len), (0,), (), of_clusters)
    ends = starts[1:-1]  # every fragment but the last ends its document inside the stream
    labels_T[ends - 1] = IGNORE_INDEX
    documents = starts[starts < seq_len]
    positions_T = np.arange(seq_len) - np.repeat(documents, np.diff(documents, append=seq_len))
    shown = ends_of(documents.tolist(), prefixes, seq_len) if use.mask else ()
    return PackedSequence(tokens_T, labels_T, positions_T, tuple(documents.tolist()), shown, of_clusters)


def padding_sequence(seq_len: int, pad_id: int) -> PackedSequence:
    """A sequence without any label, for a rank that has fewer rows than others."""
    return PackedSequence(np.full(seq_len, pad_id), np.full(seq_len, IGNORE_INDEX), np.arange(seq_len), (0,))
