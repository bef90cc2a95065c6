import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.batch import IGNORE_INDEX
from tests.trainer.data.corpus import expected_sequence
from trainer.data.packing import PackedSequence, Packing, Shuffle, pack, padding_sequence

PAD = 9_999_999

lengths_of = st.lists(st.integers(1, 40), min_size=1, max_size=12)
shuffles = st.sampled_from(["sequences", "documents", "none"])


def fetch(packing: Packing, n: int, mask: bool) -> PackedSequence:
    """Sequence n of documents whose token j of document d is 1000 d + j."""
    fragments = [1000 * p.document + np.arange(p.start, p.stop) for p in packing.pieces(n)]
    return pack(fragments, packing.seq_len, mask, PAD)


@settings(max_examples=150, deadline=None)
@given(lengths_of, st.integers(1, 50), st.integers(0, 2**63 - 1), shuffles, st.integers(0, 3), st.booleans())
def test_every_token_is_seen_once_per_epoch(lengths: list[int], seq_len: int, seed: int, shuffle: Shuffle, epoch: int, mask: bool) -> None:
    packing = Packing(np.array(lengths), seq_len, seed, shuffle)
    first = epoch * packing.n_sequences
    rows = [fetch(packing, n, mask) for n in range(first, first + packing.n_sequences)]
    seen = sorted(token for row in rows for token in row.tokens_T.tolist() if token != PAD)
    assert seen == [1000 * d + j for d, n in enumerate(lengths) for j in range(n)]
    labels = sorted(label for row in rows for label in row.labels_T.tolist() if label != IGNORE_INDEX)
    if mask:  # every token but a document's first is asked for exactly once
        assert labels == [1000 * d + j for d, n in enumerate(lengths) for j in range(1, n)]
    else:  # every token but the stream's first
        assert len(labels) == sum(lengths) - 1
        assert set(labels) <= set(seen)
        assert len(set(labels)) == len(labels)


@settings(max_examples=150, deadline=None)
@given(lengths_of, st.integers(1, 50), st.booleans())
def test_arrays_equal_a_token_by_token_twin(lengths: list[int], seq_len: int, mask: bool) -> None:
    packing = Packing(np.array(lengths), seq_len, 0, "none")
    stream = [[(1000 * d + j, d, j) for j in range(n)] for d, n in enumerate(lengths)]
    for i in range(packing.n_sequences):
        found = fetch(packing, i, mask)
        for got, want in zip(found[:4], expected_sequence(stream, i, seq_len, mask, PAD), strict=True):
            np.testing.assert_array_equal(got, want)
        assert not found.continued  # who knows the step says otherwise
        assert all(array.dtype == np.int64 for array in found[:3])


@settings(max_examples=60, deadline=None)
@given(lengths_of, st.integers(1, 30), st.integers(0, 100), shuffles)
def test_documents_stay_whole_in_order(lengths: list[int], seq_len: int, seed: int, shuffle: Shuffle) -> None:
    """Sequences put back in stream order hold each document contiguously: it is split, never interleaved."""
    packing = Packing(np.array(lengths), seq_len, seed, shuffle)
    stream_of_sequence = {}
    for n in range(packing.n_sequences):
        pieces = packing.pieces(n)
        stream_of_sequence[(pieces[0].document, pieces[0].start)] = [
            t for p in pieces for t in range(1000 * p.document + p.start, 1000 * p.document + p.stop)
        ][:seq_len]
    documents, starts = packing._order(0)
    begin_of = {(int(d), int(k)): int(s) + int(k) for d, s in zip(documents, starts, strict=True) for k in range(lengths[int(d)])}
    in_order = [stream_of_sequence[key] for key in sorted(stream_of_sequence, key=begin_of.__getitem__)]
    assert [token for sequence in in_order for token in sequence] == [1000 * int(d) + j for d in documents for j in range(lengths[int(d)])]


def test_order_changes_with_epoch_and_seed_only_when_shuffled() -> None:
    lengths = np.arange(5, 45)
    order = {
        (shuffle, seed, epoch): [tuple(p) for n in range(m) for p in Packing(lengths, 16, seed, shuffle).pieces(n + epoch * m)]
        for shuffle in ("sequences", "documents", "none")
        for seed in (0, 1)
        for epoch in (0, 1)
        for m in [Packing(lengths, 16, seed, shuffle).n_sequences]
    }
    for shuffle, different in (("sequences", 4), ("documents", 4), ("none", 1)):
        assert len({str(v) for k, v in order.items() if k[0] == shuffle}) == different
    assert sorted(order["sequences", 0, 0]) == sorted(order["documents", 0, 0])
    assert order["sequences", 0, 0] != order["documents", 0, 0]


def test_one_document_of_a_million_tokens_is_one_fragment() -> None:
    packing = Packing(np.array([3 * 2**20 + 5]), 2**20, 0, "none")
    assert packing.pieces(1) == [(0, 2**20, 2**21 + 1)]
    row = pack([np.arange(2**20, 2**21 + 1)], 2**20, True, PAD)
    assert row.documents == (0,)
    assert row.labels_T[-1] == 2**21
    assert (row.positions_T == np.arange(2**20)).all()


def test_empty_documents_are_refused() -> None:
    for lengths in ([], [3, 0]):
        with pytest.raises(ValueError, match="no empty ones"):
            Packing(np.array(lengths), 8, 0, "none")


def test_padding_sequence_asks_for_nothing() -> None:
    row = padding_sequence(8, PAD)
    assert set(row.labels_T.tolist()) == {IGNORE_INDEX}
    assert set(row.tokens_T.tolist()) == {PAD}
