"""The split of a sequence: every token once, in order, and never twice split."""

from __future__ import annotations

import pytest
import torch

from models.batch import Batch, Bounds
from models.errors import UserError
from parallel.sequence import ranges_for, shard_batch, zigzag_chunks


def _batch(seq_len: int = 16) -> Batch:
    tokens = torch.arange(2 * seq_len).reshape(2, seq_len)
    return Batch(tokens, tokens + 1, tokens + 2, Bounds(seq_len, ((0, seq_len),), ((0, 5), (0,))))


def test_zigzag_mirrors_head_and_tail() -> None:
    assert zigzag_chunks(cp_rank=3, cp_size=4) == [3, 4]
    assert zigzag_chunks(0, 3) == [0, 5]


def test_ranges_are_the_documented_chunks() -> None:
    assert ranges_for("contiguous", 12, 1, 3) == ((4, 8),)
    assert ranges_for("zigzag", 12, 1, 3) == ((2, 4), (8, 10))
    assert ranges_for("zigzag", 7, 0, 1) == ((0, 7),)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_every_token_is_held_exactly_once(layout: str, cp: int) -> None:
    held = [i for rank in range(cp) for start, end in ranges_for(layout, 24, rank, cp) for i in range(start, end)]  # type: ignore[arg-type]
    assert sorted(held) == list(range(24))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_shards_carry_tokens_labels_positions_and_global_bounds(layout: str) -> None:
    batch = _batch()
    for rank in range(2):
        shard = shard_batch(batch, layout, rank, 2)  # type: ignore[arg-type]
        index = [i for start, end in shard.bounds.ranges for i in range(start, end)]
        assert torch.equal(shard.tokens_BT, batch.tokens_BT[:, index])
        assert torch.equal(shard.labels_BT, batch.labels_BT[:, index])
        assert torch.equal(shard.positions_BT, batch.positions_BT[:, index])
        assert shard.bounds.documents == batch.bounds.documents and shard.bounds.seq_len == 16
        assert shard.bounds.local_len == shard.tokens_BT.shape[1] == 8


def test_a_split_batch_is_refused() -> None:
    shard = shard_batch(_batch(), "contiguous", 0, 2)
    with pytest.raises(UserError, match=r"already split.*data\.seq_len 16.*parallel\.cp 2"):
        shard_batch(shard, "contiguous", 0, 2)
    with pytest.raises(UserError, match="already split"):
        shard_batch(shard, "contiguous", 0, 1)


@pytest.mark.parametrize(("layout", "chunks"), [("contiguous", 3), ("zigzag", 6)])
def test_a_length_that_does_not_divide_names_both_settings(layout: str, chunks: int) -> None:
    with pytest.raises(UserError, match=rf"data\.seq_len 16 .*{chunks} equal chunks.*parallel\.cp 3"):
        shard_batch(_batch(), layout, 0, 3)  # type: ignore[arg-type]


def test_unknown_layout_and_rank_are_refused() -> None:
    with pytest.raises(ValueError, match="auto"):
        ranges_for("auto", 8, 0, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cp_rank 2"):
        ranges_for("zigzag", 8, 2, 2)
