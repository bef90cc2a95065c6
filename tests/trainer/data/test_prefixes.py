"""Prefixes from the data to the batch: in characters and tokens, through packing and streams, with labels as asked for."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from models.batch import IGNORE_INDEX
from models.errors import UserError
from tests.trainer.data.corpus import expected_sequence, run_config, texts
from tests.trainer.data.test_tokenizers import make_tokenizer
from trainer.config import RunConfig
from trainer.data.build import build_data, prepare
from trainer.data.packing import Packing, pack
from trainer.data.prefixes import Prefixes, PrefixUse, left_of
from trainer.data.tokenizers import ByteTokenizer, load_tokenizer

PAD = 9_999_999


def corpus(path: Path, values: list[Any] | None = None) -> Path:
    """``texts()`` with prefixes of no, some and all characters."""
    lines = []
    for i, text in enumerate(texts()):
        prefix = (0, 4, len(text), 11)[i % 4] if values is None else values[i % len(values)]
        lines.append(json.dumps({"text": text, "prompt": prefix}))
    path.write_text("\n".join(lines) + "\n")
    return path


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 45)), min_size=1, max_size=12), st.integers(1, 50), st.booleans())
def test_sequences_equal_a_token_by_token_twin(documents: list[tuple[int, int]], seq_len: int, mask: bool) -> None:
    lengths, prefixes = [n for n, _ in documents], [min(p, n - 1) for n, p in documents]
    packing = Packing(np.array(lengths), seq_len, 0, "none")
    stream = [[(1000 * d + j, d, j) for j in range(n)] for d, n in enumerate(lengths)]
    for i in range(packing.n_sequences):
        pieces = packing.pieces(i)
        fragments = [1000 * p.document + np.arange(p.start, p.stop) for p in pieces]
        left = [left_of(prefixes[p.document], p.start, p.stop) for p in pieces]
        tokens, labels, positions, starts = expected_sequence(stream, i, seq_len, mask, PAD)
        in_prefix = [token != PAD and token % 1000 < prefixes[token // 1000] for token in tokens.tolist()]
        ends = tuple(start + sum(in_prefix[start:end]) for start, end in zip(starts, (*starts[1:], seq_len), strict=True))
        for loss in (False, True):
            found = pack(fragments, seq_len, mask, PAD, left, PrefixUse(mask, loss))
            wanted = [IGNORE_INDEX if not loss and y >= 0 and y % 1000 < prefixes[y // 1000] else y for y in labels.tolist()]
            assert found.tokens_T.tolist() == tokens.tolist() and found.positions_T.tolist() == positions.tolist()
            assert found.labels_T.tolist() == wanted
            assert found.documents == starts
            assert (found.prefixes or starts) == (ends if mask else starts)
            assert not (found.prefixes and ends == starts), "costs nothing where no document has one"


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.data())
def test_characters_are_whole_for_bytes(text: str, data: st.DataObject) -> None:
    prefix = data.draw(st.integers(0, len(text)))
    size = len(text[:prefix].encode())
    assert Prefixes("p").measured(text, prefix, ByteTokenizer()) == (size, size)
    assert Prefixes("p", "tokens").measured(text, size, ByteTokenizer()) == (size, size)


def test_a_token_that_reaches_past_the_prefix_is_not_in_it(tmp_path: Path) -> None:
    tokenizer, text = load_tokenizer(str(make_tokenizer(tmp_path))), "the cat é and the hat"
    (ids,) = tokenizer.encode_batch([text])
    pieces = [tokenizer.decode([i]) for i in ids.tolist()]
    assert len(ids) < len(text) and max(map(len, pieces)) > 2, "tokens of several characters"
    assert pieces.count("�") == 2, "a character of two tokens"
    for prefix in range(len(text) + 1):
        tokens, size = Prefixes("p").measured(text, prefix, tokenizer)  # type: ignore[misc]
        held = tokenizer.decode(ids[:tokens].tolist())
        assert text[:prefix].startswith(held) and size == len(held.encode())
        following = tokenizer.decode(ids[: tokens + 1].tolist())
        assert tokens == len(ids) or not text[:prefix].startswith(following)
        assert Prefixes("p", "tokens").measured(text, tokens, tokenizer) == (tokens, size)


@pytest.mark.parametrize("mode", [{"shuffle": "none"}, {"shuffle": "none", "streaming": True}])
@pytest.mark.parametrize("loss", [False, True])
def test_batches_of_files_streams_and_resumed_runs(tmp_path: Path, mode: dict[str, Any], loss: bool) -> None:
    config = run_config(corpus(tmp_path / "a.jsonl"), tmp_path / "cache", prefix_key="prompt", prefix_loss=loss, grad_accum=2, **mode)
    stream, starts, prefixed = [], [], set()
    for i, text in enumerate(texts()):
        starts.append(len(stream))
        prefixed |= set(range(len(stream), len(stream) + len(text[: (0, 4, len(text), 11)[i % 4]].encode())))
        stream += [*text.encode(), 256]
    steps = []
    with build_data(config).train() as data:
        for batches, cursor in islice(data, 2 * (-(-len(stream) // 32))):
            steps.append((batches, json.loads(json.dumps(cursor))))
    first = 0
    for batch in (batch for batches, _ in steps for batch in batches):
        if first >= len(stream):
            break
        for t in range(min(16, len(stream) - first)):
            at, document = first + t, max(s for s in starts if s <= first + t)
            follows = at + 1 < len(stream) and at + 1 not in starts and (loss or at + 1 not in prefixed)
            assert int(batch.labels_BT[0, t]) == (stream[at + 1] if follows else IGNORE_INDEX)
            if batch.bounds.prefixes:
                (shown,), (begins,) = batch.bounds.prefixes, batch.bounds.documents
                here = begins.index(max(document - first, 0))
                assert (t < shown[here]) == (at in prefixed)
            else:
                assert at not in prefixed
        first += 16
    assert any(batch.bounds.prefixes for batches, _ in steps for batch in batches)
    for k in (1, 4):
        with build_data(config).train(steps[k][1]) as data:
            batches, cursor = next(data)
        assert cursor == steps[k + 1][1]
        for a, b in zip(batches, steps[k + 1][0], strict=True):
            assert a.bounds == b.bounds and a.labels_BT.equal(b.labels_BT) and a.tokens_BT.equal(b.tokens_BT)


def test_a_causal_prefix_is_only_left_out_of_the_loss(tmp_path: Path) -> None:
    path = corpus(tmp_path / "a.jsonl", [3, 5])
    kinds = [{}, {"prefix_key": "prompt", "prefix_mask": "causal"}, {"prefix_key": "prompt"}]
    plain, causal, both = (build_data(run_config(path, tmp_path / "cache", valid_fraction=0.3, **kind)) for kind in kinds)
    batches = [list(data.valid(99)) for data in (plain, causal, both)]
    assert not any(batch.bounds.prefixes for batch in (*batches[0], *batches[1])) and any(batch.bounds.prefixes for batch in batches[2])
    labels = [[y for batch in some for y in batch.labels_BT.flatten().tolist() if y != IGNORE_INDEX] for some in batches]
    assert labels[1] == labels[2] and len(labels[1]) < len(labels[0])
    for data in (causal, both):  # every label but the end token stands for one byte
        assert data.valid_bytes_per_label == 1 - labels[1].count(256) / len(labels[1])
    facts = plain.describe(), causal.describe()
    assert facts[0]["store"] != facts[1]["store"], "a store without prefixes is another one"


def test_tables_read_the_same(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in corpus(tmp_path / "a.jsonl").read_text().splitlines()]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    kinds = {kind: {"source": kind} for kind in ("jsonl", "parquet", "arrow")}
    found = []
    for kind, data in {**kinds, "streamed": {"source": "parquet", "streaming": True}}.items():
        path = tmp_path / f"a.{'parquet' if kind == 'streamed' else kind}"
        config = run_config(path, tmp_path / "cache", prefix_key="prompt", shuffle="none", **data)
        with build_data(config).train() as steps:
            found.append([(b.bounds, b.labels_BT.tolist()) for batches, _ in islice(steps, 20) for b in batches])
    assert all(one == found[0] for one in found)


BAD = [
    (-1, r"'prompt' \(data.prefix_key\) is -1, below 0"),
    (10**30, r"'prompt' \(data.prefix_key\) is 1000000000000000000000000000000, and the document has \d+ characters"),
    (3.0, r"'prompt' \(data.prefix_key\) is 3.0, not a number of characters"),
    (True, r"'prompt' \(data.prefix_key\) is True, not a number"),
    ("7", r"'prompt' \(data.prefix_key\) is '7', not a number"),
    (None, r"'prompt' \(data.prefix_key\) is missing"),
]


@pytest.mark.parametrize(("value", "words"), BAD)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_prefixes_name_file_row_and_key(tmp_path: Path, value: Any, words: str, streaming: bool) -> None:
    path = corpus(tmp_path / "a.jsonl", [0, 1, value])
    mode = {"prefix_key": "prompt", "shuffle": "none", "streaming": streaming}
    with pytest.raises(UserError, match=rf"a\.jsonl line 3: {words}.*\nrepair it, or set data\.on_bad_document=skip"):
        prepare(run_config(path, tmp_path / "cache", **mode, seq_len=512))
    data = build_data(run_config(path, tmp_path / "cache", **mode, on_bad_document="skip"))
    if not streaming:
        assert data.describe()["skipped"] == {"bad_prefix": 4}


def test_a_prefix_of_more_tokens_than_the_document_has_is_refused(tmp_path: Path) -> None:
    path, words = corpus(tmp_path / "a.jsonl", [0, 10_000]), r"a\.jsonl byte 37: 'prompt' .* is 10000, and the document has 24 tokens"
    for mode in ({}, {"shuffle": "none", "streaming": True}):
        with pytest.raises(UserError, match=words):
            prepare(run_config(path, tmp_path / "cache", prefix_key="prompt", prefix_unit="tokens", seq_len=256, **mode))


def test_a_table_without_the_column_or_with_text_in_it_is_refused(tmp_path: Path) -> None:
    table = pa.table({"text": ["one", "two"], "words": ["a", "b"]})
    pq.write_table(table, tmp_path / "a.parquet")
    for key, words in (("prompt", r"a\.parquet: no column 'prompt'"), ("words", r"a\.parquet row 0: 'words' .* is 'a', not a number")):
        with pytest.raises(UserError, match=words):
            prepare(run_config(tmp_path / "a.parquet", tmp_path / "cache", source="parquet", prefix_key=key))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data": {"prefix_loss": True}}, "prefix_loss is not read without data.prefix_key"),
        ({"data": {"prefix_key": "p"}}, "not read by source 'python_stdlib'"),
        ({"data": {"source": "synthetic/mqar", "prefix_key": "p"}}, "not read by source 'synthetic/mqar'"),
        ({"data": {"source": "jsonl", "prefix_key": "text"}}, "both name 'text'"),
        ({"data": {"source": "jsonl", "prefix_key": "p", "prefix_mask": "causal", "prefix_loss": True}}, "leave data.prefix_key out"),
        ({"data": {"source": "jsonl", "prefix_key": "p", "document_mask": False}}, "data.document_mask=true"),
        ({"model": {"layers": ["memory"]}}, "a layer of attention .*data.prefix_mask=causal"),
        ({"model": {"layers": ["swa", "memory"], "memory": {"kind": "titans", "attach": "mac"}}}, "attach mixer"),
        ({"model": {"layers": ["full"], "memory": {"kind": "rmt"}}}, "other than rmt"),
        ({"model": {"layers": ["swa"]}, "train": {"segment_tokens": 256}}, "train.segment_tokens null"),
        ({"memory": {"plan": "estimate"}}, "memory.plan trace"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings: dict[str, Any], words: str) -> None:
    data = {"path": "x", **settings.get("data", {"source": "jsonl", "prefix_key": "p"})}
    if data.get("source", "").startswith("synthetic"):
        del data["path"]
    with pytest.raises(ValidationError, match=words):
        RunConfig.model_validate({**settings, "data": data})
    if "data" not in settings:
        RunConfig.model_validate({**settings, "data": {**data, "prefix_mask": "causal"}})
