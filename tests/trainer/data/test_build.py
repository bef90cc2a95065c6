"""The facade: what each rank reads at each step, resume, held-out data, and what is refused before anything starts."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.batch import IGNORE_INDEX, Batch
from models.errors import RunFailed, UserError
from tests.trainer.data.corpus import run_config, texts, tokens_of, write_jsonl
from tests.trainer.data.test_tokenizers import make_tokenizer
from trainer.config import DataSection, ModelConfig, RunConfig
from trainer.data.build import Data, build_data, prepare
from trainer.data.loader import Cursor

STREAM = {"streaming": True, "shuffle": "none"}
MODES = [{}, {"shuffle": "documents"}, {"shuffle": "none"}, STREAM]

Row = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files, so that a stream crosses parts."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(3):
        write_jsonl(folder / f"{i}.jsonl", texts()[i::3])
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def rows(batch: Batch) -> list[Row]:
    columns = (batch.tokens_BT.tolist(), batch.labels_BT.tolist(), batch.positions_BT.tolist(), batch.bounds.documents)
    return [(tuple(t), tuple(y), tuple(p), d) for t, y, p, d in zip(*columns, strict=True)]


def steps_of(data: Data, n: int, cursor: Cursor | None = None) -> list[tuple[list[list[Row]], Cursor]]:
    """(rows of each micro-batch, cursor) of n steps."""
    with data.train(cursor) as steps:
        return [([rows(batch) for batch in batches], after) for batches, after in islice(steps, n)]


def global_steps(config: RunConfig, dp: int, n: int, cursor: Cursor | None = None) -> list[list[Row]]:
    """All rows of each of n steps, over all ranks."""
    ranks = [steps_of(build_data(config, rank, dp), n, cursor) for rank in range(dp)]
    assert all(rank[i][1] == ranks[0][i][1] for rank in ranks for i in range(n)), "all ranks hold the same cursor"
    accum = len(ranks[0][0][0])
    return [[row for m in range(accum) for rank in ranks for row in rank[i][0][m]] for i in range(n)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", [True, False])
def test_any_topology_reads_the_same_sequences_per_step(corpus: Path, cache: Path, mode: dict[str, Any], mask: bool) -> None:
    def config(micro: int, accum: int) -> RunConfig:
        return run_config(corpus, cache, micro_batch_size=micro, grad_accum=accum, document_mask=mask, **mode)

    want = global_steps(config(1, 4), 1, 6)
    for dp, micro, accum in ((2, 1, 2), (4, 1, 1), (1, 2, 2), (2, 2, 1), (1, 4, 1)):
        found = global_steps(config(micro, accum), dp, 6)
        assert found == want, (dp, micro, accum)


@pytest.mark.parametrize("mode", MODES)
def test_an_epoch_is_seen_once_over_all_ranks(corpus: Path, cache: Path, mode: dict[str, Any]) -> None:
    config = run_config(corpus, cache, **mode)
    n = -(-sum(len(tokens_of(text)) for text in texts()) // 16)
    assert n % 3, "so that epochs end inside a step"
    steps = global_steps(config, 3, n)
    everything = [row for step in steps for row in step][: 2 * n]
    for epoch in (everything[:n], everything[n:]):
        seen = sorted(token for row in epoch for token in row[0] if token != 257)
        assert seen == sorted(token for text in texts() for token in tokens_of(text))
    assert (everything[:n] == everything[n:]) == (mode.get("shuffle") == "none")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prefetch", [0, 3])
def test_resume_from_every_cursor_equals_the_uninterrupted_run(corpus: Path, cache: Path, mode: dict[str, Any], prefetch: int) -> None:
    config = run_config(corpus, cache, grad_accum=2, prefetch_batches=prefetch, **mode)
    data = build_data(config)
    whole = steps_of(data, 25)  # two and a half epochs
    for k in range(24):
        cursor = json.loads(json.dumps(whole[k][1]))
        assert steps_of(data, min(5, 24 - k), cursor) == whole[k + 1 : k + 6]
        one = steps_of(build_data(config, 1, 2), 2, cursor)
        wide = global_steps(
            run_config(corpus, cache, prefetch_batches=prefetch, **mode), 2, min(5, 24 - k), cursor
        )  # dp 1 x accum 2 -> dp 2
        assert wide == [[row for batch in batches for row in batch] for batches, _ in whole[k + 1 : k + 6]]
        assert one[0][1]["sequences"] == cursor["sequences"] + 4


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 3])), min_size=1, max_size=5), mode=st.sampled_from(MODES))
def test_many_interrupts_with_changing_topology_lose_and_double_nothing(
    corpus: Path, cache: Path, cuts: list[tuple[int, int]], mode: dict[str, Any]
) -> None:
    """The quick interrupts on which streaming libraries lose rows (fault matrix row 28)."""
    config = run_config(corpus, cache, prefetch_batches=2, **mode)
    got, cursor = [], None
    for n, dp in cuts:
        got += [row for step in global_steps(config, dp, n, cursor) for row in step]
        cursor = steps_of(build_data(config, 0, dp), n, cursor)[-1][1]
    want = [row for step in global_steps(config, 1, len(got)) for row in step]
    assert got == want


def test_stream_equals_the_store_in_file_order(corpus: Path, cache: Path) -> None:
    for mask in (True, False):
        for seq_len in (1, 7, 16, 500, 4096):
            stored = run_config(corpus, cache, shuffle="none", document_mask=mask, seq_len=seq_len)
            streamed = run_config(corpus, cache, document_mask=mask, seq_len=seq_len, **STREAM)
            assert global_steps(stored, 1, 12) == global_steps(streamed, 1, 12)


def test_seed_and_epoch_decide_the_order(corpus: Path, cache: Path) -> None:
    first = global_steps(run_config(corpus, cache, seed=1), 1, 20)
    assert first == global_steps(run_config(corpus, cache, seed=1), 1, 20)
    assert first != global_steps(run_config(corpus, cache, seed=2), 1, 20)


def test_batches_are_what_the_model_expects(corpus: Path, cache: Path) -> None:
    config = run_config(corpus, cache, micro_batch_size=3, grad_accum=2)
    with build_data(config).train() as steps:
        batches, cursor = next(steps)
    assert len(batches) == 2
    for batch in batches:
        for tensor in (batch.tokens_BT, batch.labels_BT, batch.positions_BT):
            assert (tensor.shape, tensor.dtype) == ((3, 16), torch.int32)
        assert batch.bounds.ranges == ((0, 16),)
        assert len(batch.bounds.documents) == 3
        assert all(starts[0] == 0 for starts in batch.bounds.documents)
    assert (cursor["sequences"], cursor["epoch"]) == (6, 0)


@pytest.mark.parametrize(
    "change", [{"seq_len": 32}, {"shuffle": "none"}, {"seed": 1}, {"valid_fraction": 0.3}, STREAM, {"tokenizer": "hf"}]
)
def test_cursor_of_another_data_order_is_refused(corpus: Path, cache: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    cursor = steps_of(build_data(run_config(corpus, cache)), 2)[-1][1]
    if "tokenizer" in change:
        change = {"tokenizer": str(make_tokenizer(tmp_path / "tok"))}
    with pytest.raises(UserError, match="start a new run") as error:
        build_data(run_config(corpus, cache, **change)).train(cursor)
    assert any(key in str(error.value) for key in change) or "data.tokenizer, data.valid_*" in str(error.value)


@pytest.mark.parametrize("damage", [{}, {"plan": None}, {"sequences": "x"}, {"unit": None}])
def test_damaged_cursor_is_refused(corpus: Path, cache: Path, damage: dict[str, Any]) -> None:
    data = build_data(run_config(corpus, cache, **STREAM))
    cursor = steps_of(data, 1)[-1][1]
    with pytest.raises(UserError, match="damaged"):
        data.train({**cursor, **damage} if damage else {})


def test_changed_streamed_source_is_refused(tmp_path: Path, cache: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts())
    cursor = steps_of(build_data(run_config(path, cache, **STREAM)), 2)[-1][1]
    write_jsonl(path, texts(13))
    with pytest.raises(UserError, match="data.path"):
        build_data(run_config(path, cache, **STREAM)).train(cursor)


# Held-out data -------------------------------------------------------------------------------------------------------


def held_out_and_training(config: RunConfig) -> tuple[set[str], set[str]]:
    data = build_data(config)

    def read(sequences: Any) -> set[str]:
        lengths = sequences.store.documents["tokens"]
        return {bytes(sequences.store.read(d, 0, lengths[d] - 1).astype("u1")).decode() for d in sequences.documents.tolist()}

    return read(data.held_out), read(data.training)


@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.3, 0.9])
def test_held_out_documents_are_never_trained_on(tmp_path: Path, cache: Path, fraction: float) -> None:
    documents = [f"text number {i}" for i in range(200)]
    path = write_jsonl(tmp_path / "a.jsonl", documents + documents[:50])  # copies must fall on the same side
    held, trained = held_out_and_training(run_config(path, cache, valid_fraction=fraction))
    assert not held & trained
    assert held | trained == set(documents)
    assert max(1, 200 * fraction - 30) <= len(held) <= max(1, 200 * fraction + 30)
    more = write_jsonl(tmp_path / "more.jsonl", [*documents, *(f"new {i}" for i in range(20))])
    if fraction > 0.01:
        assert held <= held_out_and_training(run_config(more, cache, valid_fraction=fraction))[0], "more documents move none"


def test_held_out_path_and_copies_in_training(corpus: Path, cache: Path, tmp_path: Path) -> None:
    valid = write_jsonl(tmp_path / "valid.jsonl", ["something else", texts()[3], texts()[4]])
    for mode in ({}, STREAM):
        config = run_config(corpus, cache, valid_path=str(valid), **mode)
        facts = prepare(config)
        assert (facts["valid_documents"], facts["copies_left_out"]) == (3, 0 if mode else 2)
    held, trained = held_out_and_training(run_config(corpus, cache, valid_path=str(valid)))
    assert not held & trained
    assert len(trained) == 10
    with pytest.raises(UserError, match="nothing is left to train on"):
        prepare(run_config(corpus, cache, valid_path=str(corpus)))


@pytest.mark.parametrize("n", [0, 1, 3, 5, 100])
def test_held_out_batches_are_spread_over_ranks(corpus: Path, cache: Path, n: int) -> None:
    def read(dp: int, micro: int) -> list[Row]:
        config = run_config(corpus, cache, valid_fraction=0.5, micro_batch_size=micro, grad_accum=3, seed=dp)
        ranks = [[rows(batch) for batch in build_data(config, rank, dp).valid(n)] for rank in range(dp)]
        assert len({len(rank) for rank in ranks}) == 1, "ranks take part in the same number of collectives"
        assert all(len(batch) == micro for rank in ranks for batch in rank)
        return sorted(row for rank in ranks for batch in rank for row in batch if set(row[1]) != {IGNORE_INDEX})

    want = read(1, 1)
    available = prepare(run_config(corpus, cache, valid_fraction=0.5))["valid_sequences"]
    assert 5 < available < 100
    assert len(want) == min(n, available)
    assert len(set(want)) == len(want)
    assert read(2, 1) == read(1, 2) == read(3, 2) == want


def test_held_out_without_any(corpus: Path, cache: Path) -> None:
    data = build_data(run_config(corpus, cache))
    assert list(data.valid(5)) == []
    assert data.valid_bytes_per_label is None


def test_bytes_per_label_of_the_byte_tokenizer_is_one(corpus: Path, cache: Path, tmp_path: Path) -> None:
    assert build_data(run_config(corpus, cache, valid_fraction=0.3)).valid_bytes_per_label == 1.0
    path = write_jsonl(tmp_path / "a.jsonl", ["the cat and the hat" * n for n in (1, 2, 3)])
    data = build_data(run_config(path, cache, valid_fraction=0.3, tokenizer=str(make_tokenizer(tmp_path / "tok"))))
    labels = sum((batch.labels_BT != IGNORE_INDEX).sum().item() for batch in data.valid(10))
    assert data.valid_bytes_per_label == data.held_out.store.documents["bytes"][data.held_out.documents].sum() / labels > 1.5  # type: ignore[union-attr]


def test_whole_packages_of_the_standard_library_are_held_out(tmp_path: Path, cache: Path) -> None:
    for name in ("modules_are_many.py", "email/a.py", "json/a.py", "xml/a.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    facts = prepare(run_config(tmp_path, cache, source="python_stdlib", valid_fraction=0.01))
    assert (facts["train_documents"], facts["valid_documents"]) == (3, 1)
    (held,) = facts["valid_origins"]
    (tmp_path / "email" / "a.py").write_text("# changed\n")
    (tmp_path / "json" / "a.py").write_text("# changed\n")
    (tmp_path / "xml" / "a.py").write_text("# changed\n")
    assert prepare(run_config(tmp_path, cache, source="python_stdlib", valid_fraction=0.01))["valid_origins"] == [held], "by name"
    everything = prepare(run_config(tmp_path, cache, source="python_stdlib", valid_fraction=0.999999))
    assert everything["train_documents"] == 1, "the modules document is always trained on"


# Refused before anything starts -----------------------------------------------------------------------------------------


BAD_INPUT = {
    "empty file": ("text", b"", "file: the document is empty"),
    "invalid UTF-8": ("text", b"one\ntwo \xff", "file line 2: invalid UTF-8 at byte 8"),
    "line without text": ("jsonl", b'{"text": "a"}\n{"body": "b"}\n', "file line 2: no text field 'text'"),
    "truncated parquet": ("parquet", b"PAR1 cut", "file: damaged or truncated"),
    "truncated arrow": ("arrow", b"\xff\xff\xff\xff\x10\x00\x00\x00", "file: damaged or truncated"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_with_its_place_and_nothing_is_written(tmp_path: Path, case: str, streaming: bool) -> None:
    source, content, message = BAD_INPUT[case]
    (tmp_path / "file").write_bytes(content)
    mode = STREAM if streaming else {}
    with pytest.raises(UserError) as error:
        prepare(run_config(tmp_path / "file", tmp_path / "cache", source=source, **mode))
    assert message in str(error.value)
    assert error.value.exit_code == 2
    assert len(str(error.value).splitlines()) <= 2
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("mode", [{}, STREAM])
def test_bad_documents_are_skipped_when_asked(tmp_path: Path, cache: Path, mode: dict[str, Any]) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{}\n{"text": "one"}\n\xff\n{"text": "two"}\n{}\n')
    data = build_data(run_config(tmp_path / "a.jsonl", cache, on_bad_document="skip", seq_len=4, **mode))
    steps = steps_of(data, 4, None)
    assert sorted(t for batches, _ in steps[:2] for t in batches[0][0][0]) == sorted(tokens_of("one") + tokens_of("two"))
    if mode:
        assert [step[1]["skipped"] for step in steps] == [
            {"invalid_utf8": 1, "missing_text": 1},
            {"invalid_utf8": 1, "missing_text": 2},
            {"invalid_utf8": 2, "missing_text": 3},
            {"invalid_utf8": 2, "missing_text": 4},
        ]
        assert steps_of(data, 2, steps[1][1]) == steps[2:], "counts go on after a resume"
    else:
        assert data.describe()["skipped"] == {"invalid_utf8": 1, "missing_text": 2}


def test_bad_document_met_while_streaming_fails_the_run(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "long enough for one sequence"}\n' * 5 + b"{}\n")
    config = run_config(tmp_path / "a.jsonl", cache, **STREAM)
    prepare(config)
    with build_data(config).train() as steps:
        next(steps)
        with pytest.raises(RunFailed, match=r"a\.jsonl line 6") as error:
            list(islice(steps, 20))
    assert error.value.exit_code == 1


def test_source_without_any_usable_document_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}\n{}\n")
    for mode in ({}, STREAM):
        with pytest.raises(UserError, match="no usable document"):
            prepare(run_config(tmp_path / "a.jsonl", cache, on_bad_document="skip", **mode))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streaming": True, "valid_fraction": 0.05}, r"data\.shuffle=none .* and data\.valid_path, or data\.valid_fraction=0"),
        ({"streaming": True}, r"data\.streaming=true needs data\.shuffle=none"),
        ({"source": "python_stdlib", "valid_path": "x"}, r"data\.valid_path: python_stdlib"),
        ({"tokenizer": "/nowhere"}, r"data\.tokenizer: /nowhere"),
        ({"valid_path": "/nowhere"}, r"data\.valid_path: /nowhere"),
        ({"path": "/nowhere"}, r"data\.path: /nowhere"),
        ({"source": "text", "path": __file__, "valid_fraction": 0.1}, r"1 distinct document, all of which data\.valid_fraction=0\.1"),
    ],
)
def test_unusable_settings_are_refused_by_name(corpus: Path, cache: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(run_config(changes.get("path", corpus), cache, **{k: v for k, v in changes.items() if k != "path"}))


def test_model_vocabulary_must_hold_the_tokenizer(corpus: Path, cache: Path) -> None:
    config = RunConfig(model=ModelConfig(vocab_size=257), data=run_config(corpus, cache).data)
    with pytest.raises(UserError, match=r"model\.vocab_size 257 is below the 258 ids"):
        prepare(config)


def test_rank_out_of_range_is_refused(corpus: Path, cache: Path) -> None:
    with pytest.raises(ValueError, match=r"dp_rank 2 is not in 0\.\.1"):
        build_data(run_config(corpus, cache), 2, 2)


def test_prepare_describes_and_verifies(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, tmp_path / "cache")
    facts = prepare(config)
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["train_documents"], facts["train_tokens"]) == (12, sum(len(tokens_of(text)) for text in texts()))
    tokens = Path(facts["store"]) / "tokens.bin"
    raw = bytearray(tokens.read_bytes())
    raw[100] ^= 1
    tokens.write_bytes(raw)
    prepare(config)
    assert tokens.read_bytes() != bytes(raw), "a flipped bit is found and repaired before ranks start"


def test_hugging_face_tokenizer_end_to_end(corpus: Path, cache: Path, tmp_path: Path) -> None:
    for mode in ({}, STREAM):
        data = build_data(
            run_config(corpus, cache, tokenizer=str(make_tokenizer(tmp_path / "tok")), seq_len=4096, document_mask=False, **mode)
        )
        ((batches, _),) = steps_of(data, 1)
        ids = list(batches[0][0][0])
        read = {data.tokenizer.decode(document) for document in _split(ids, data.tokenizer.eos_id) if document}
        assert read == set(texts())
        assert max(ids) < data.vocab_size


def _split(ids: list[int], eos: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for i in ids:
        if i == eos:
            parts.append([])
        else:
            parts[-1].append(i)
    return parts


def test_default_settings_need_no_file(tmp_path: Path) -> None:
    facts = prepare(RunConfig(data=DataSection(seq_len=16_384, cache_dir=str(tmp_path))))
    assert facts["train_tokens"] > 4_000_000
    assert facts["valid_documents"] >= 1
    assert not any(origin.endswith("/modules") for origin in facts["valid_origins"])
