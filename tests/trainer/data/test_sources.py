"""Every kind of source: the same documents, positions that can be read from again, and every bad input with its place."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import UserError
from tests.trainer.data.corpus import texts, write_jsonl
from trainer.data import sources
from trainer.data.documents import BadDocument, Document, Item, Source
from trainer.data.sources import open_source
from trainer.data.tables import HubSource


@pytest.fixture(autouse=True)
def _own_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub-cache")


def items(source: Source) -> list[Item]:
    return [item for unit in source.units() for _, item in source.read(unit)]


def good(source: Source) -> list[str]:
    found = items(source)
    assert all(isinstance(item, Document) for item in found), found
    return [item.text for item in found if isinstance(item, Document)]


def the_bad_one(source: Source) -> BadDocument:
    (found,) = [item for item in items(source) if isinstance(item, BadDocument)]
    return found


def make_text(folder: Path) -> Source:
    (folder / "text" / "deep").mkdir(parents=True)
    (folder / "text" / ".hidden").write_bytes(b"\xff")
    for i, text in enumerate(texts()):
        (folder / "text" / ("deep" if i < 6 else "") / f"x{i:02}.txt").write_bytes(text.encode())
    return open_source("text", str(folder / "text"))


def make_jsonl(folder: Path) -> Source:
    return open_source("jsonl", str(write_jsonl(folder / "a.jsonl", texts())))


def make_parquet(folder: Path) -> Source:
    (folder / "pq").mkdir()
    table = pa.table({"n": range(12), "text": texts()})
    pq.write_table(table.slice(0, 7), folder / "pq" / "0.parquet", row_group_size=3)
    pq.write_table(table.slice(7), folder / "pq" / "1.parquet")
    return open_source("parquet", str(folder / "pq" / "*.parquet"))


def make_arrow(folder: Path) -> Source:
    datasets.Dataset.from_dict({"text": texts()}).save_to_disk(folder / "saved", num_shards=3)
    (folder / "saved" / "cache-123.arrow").write_bytes(b"not listed in state.json")
    return open_source("arrow", str(folder / "saved"))


def make_arrow_file_format(folder: Path) -> Source:
    table = pa.table({"text": texts()})
    with pa.OSFile(str(folder / "f.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    return open_source("arrow", str(folder / "f.arrow"))


def make_hub(folder: Path, streaming: bool = False) -> Source:
    (folder / "hub").mkdir()
    write_jsonl(folder / "hub" / "train.jsonl", texts())
    return open_source("hub", str(folder / "hub"), streaming=streaming)


def make_hub_streaming(folder: Path) -> Source:
    return make_hub(folder, streaming=True)


MAKERS = [make_text, make_jsonl, make_parquet, make_arrow, make_arrow_file_format, make_hub, make_hub_streaming]


@pytest.mark.parametrize("make", MAKERS)
def test_all_kinds_give_the_same_documents(make: Callable[[Path], Source], tmp_path: Path) -> None:
    source = pickle.loads(pickle.dumps(make(tmp_path)))
    assert good(source) == texts()


@pytest.mark.parametrize("make", MAKERS)
def test_reading_from_any_position_gives_the_rest(make: Callable[[Path], Source], tmp_path: Path) -> None:
    source = make(tmp_path)
    for unit in source.units():
        whole = list(source.read(unit))
        for i, (position, _) in enumerate(whole):
            assert list(source.read(unit, position)) == whole[i:]


@pytest.mark.parametrize("make", MAKERS[:6])
def test_fingerprint_follows_the_content(make: Callable[[Path], Source], tmp_path: Path) -> None:
    (tmp_path / "same").mkdir()
    first, same = make(tmp_path), make(tmp_path / "same")
    assert first.fingerprint() == pickle.loads(pickle.dumps(first)).fingerprint()
    if not isinstance(first, HubSource):  # the library's fingerprint depends on paths and times
        assert first.fingerprint() == same.fingerprint(), "a copy is the same source"
    assert isinstance(json.dumps(first.fingerprint()), str)
    before = json.dumps(first.fingerprint())
    data = [f for f in sorted(tmp_path.rglob("*")) if f.suffix in {".txt", ".jsonl", ".parquet", ".arrow"}]
    changed = next(f for f in data if not {"same", "hub-cache"} & set(f.parts) and "cache-123" not in f.name)
    raw = bytearray(changed.read_bytes().replace(b"document", b"dokument"))  # of equal size
    if raw == changed.read_bytes():  # compressed: any byte
        raw[len(raw) // 2] ^= 1
    changed.write_bytes(raw)
    after = HubSource(*first.__reduce__()[1]) if isinstance(first, HubSource) else first  # type: ignore[misc]
    assert json.dumps(after.fingerprint()) != before


def test_large_sources_are_recognised_by_file_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setattr("trainer.data.files.HASHED_BYTES", 10)
    source = make_jsonl(tmp_path)
    before, path = source.fingerprint(), tmp_path / "a.jsonl"
    assert source.fingerprint() == before
    times = path.stat()
    path.write_bytes(path.read_bytes().replace(b"document 1", b"document 7"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, modification time restored
    assert source.fingerprint() != before


@pytest.mark.parametrize("unit_bytes", [1, 7, 40, 100_000])
def test_jsonl_lines_belong_to_exactly_one_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
    path = write_jsonl(tmp_path / "a.jsonl", texts())
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n\n \n").rstrip())  # blank lines are no documents; no final newline
    assert good(open_source("jsonl", str(path))) == texts()


BAD_LINES = [
    (b'{"text": "a"', "invalid_json", "invalid JSON"),
    (b'{"text": "caf\xe9"}', "invalid_utf8", "invalid UTF-8 at byte 13"),
    (b'{"text": "\\ud800"}', "invalid_utf8", "lone surrogate"),
    (b'{"body": "a", "id": 3}', "missing_text", "no text field 'text' (keys: body, id)"),
    (b'{"text": null}', "missing_text", "holds NoneType, not text"),
    (b'["a"]', "missing_text", "a JSON list"),
    (b'{"text": " \\n"}', "empty", "empty"),
    (b"[" * 100_000, "invalid_json", "invalid JSON"),
]


@pytest.mark.parametrize("unit_bytes", [30, 10**6])
@pytest.mark.parametrize(("line", "reason", "detail"), BAD_LINES)
def test_bad_jsonl_line_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int, line: bytes, reason: str, detail: str
) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": "two"}\n' + line + b'\n{"text": "three"}\n')
    bad = the_bad_one(open_source("jsonl", str(path)))
    assert (bad.reason, bad.origin) == (reason, f"{path} line 4")
    assert detail in bad.detail
    assert f"{path} line 4" in str(bad.error())
    assert len(str(bad.error()).splitlines()) == 2


def test_empty_and_invalid_text_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(b"line one\nline two\nca\xe9 x")
    (tmp_path / "c.txt").write_bytes(b"")
    fine, invalid, empty = items(open_source("text", str(tmp_path)))
    assert isinstance(fine, Document)
    assert isinstance(invalid, BadDocument)
    assert isinstance(empty, BadDocument)
    assert (invalid.reason, invalid.origin) == ("invalid_utf8", f"{tmp_path}/b.txt line 3")
    assert "byte 20" in invalid.detail
    assert (empty.reason, empty.origin) == ("empty", f"{tmp_path}/c.txt")


def test_empty_files_are_bad_in_every_kind(tmp_path: Path) -> None:
    for kind in ("text", "jsonl", "parquet", "arrow"):
        path = tmp_path / f"nothing.{kind}"
        path.write_bytes(b"")
        bad = the_bad_one(open_source(kind, str(path)))
        assert (bad.reason, bad.origin, bad.detail) == (
            "empty",
            str(path),
            "the document is empty" if kind == "text" else "the file is empty",
        )


@pytest.mark.parametrize("make", [make_parquet, make_arrow, make_arrow_file_format])
def test_truncated_table_is_named_wherever_it_is_cut(make: Callable[[Path], Source], tmp_path: Path) -> None:
    source = make(tmp_path)
    path = source.files[-1]  # type: ignore[attr-defined]
    whole = path.read_bytes()
    for cut in sorted({1, 4, 8, 9, 100, len(whole) // 2, *range(len(whole) - 12, len(whole))}):
        path.write_bytes(whole[:cut])
        bad = the_bad_one(source)
        assert (bad.reason, bad.origin) == ("unreadable", str(path)), cut
    path.write_bytes(whole)
    assert good(source) == texts()


def test_arrow_stream_cut_between_batches_is_damaged(tmp_path: Path) -> None:
    path, table = tmp_path / "s.arrow", pa.table({"text": texts()})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    path.write_bytes(path.read_bytes()[:-8])
    assert "no end marker" in the_bad_one(open_source("arrow", str(path))).detail


@pytest.mark.parametrize("kind", ["parquet", "arrow", "arrow file"])
def test_names_of_columns_that_are_no_text_make_a_damaged_file(tmp_path: Path, kind: str) -> None:
    path, table = tmp_path / f"t.{kind.split()[0]}", pa.table({"first": [1], "text": ["a"]})
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        make = pa.ipc.new_stream if kind == "arrow" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
            writer.write_table(table)
    path.write_bytes(path.read_bytes().replace(b"first", b"fi\x8ast"))
    bad = the_bad_one(open_source(kind.split()[0], str(path)))  # type: ignore[arg-type]
    assert (bad.reason, bad.origin) == ("unreadable", str(path)) and "damaged" in bad.detail


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_bad_table_rows_and_columns_are_named(tmp_path: Path, kind: str) -> None:
    def written(table: pa.Table) -> Source:
        path = tmp_path / f"t.{kind}"
        if kind == "parquet":
            pq.write_table(table, path, row_group_size=2)
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        return open_source(kind, str(path))  # type: ignore[arg-type]

    invalid = pa.array([b"ok", b"ok", b"fine", b"caf\xe9"], pa.binary()).view(pa.string())
    bad = the_bad_one(written(pa.table({"text": invalid})))
    assert (bad.reason, bad.origin) == ("invalid_utf8", f"{tmp_path}/t.{kind} row 3")
    bad = the_bad_one(written(pa.table({"text": ["a", "b", None, "c"]})))
    assert (bad.reason, bad.origin, bad.detail) == ("missing_text", f"{tmp_path}/t.{kind} row 2", "column 'text' holds no value, not text")
    bad = the_bad_one(written(pa.table({"text": ["a", "b", "c", ""]})))
    assert (bad.reason, bad.origin) == ("empty", f"{tmp_path}/t.{kind} row 3")
    bad = items(written(pa.table({"body": ["a"]})))[0]
    assert isinstance(bad, BadDocument)
    assert (bad.reason, bad.origin) == ("missing_text", f"{tmp_path}/t.{kind}")
    assert "columns: body" in bad.detail
    bad = items(written(pa.table({"text": [1]})))[0]
    assert isinstance(bad, BadDocument)
    assert "int64, not text" in bad.detail
    assert the_bad_one(written(pa.table({"text": pa.array([], pa.string())}))).detail == "the file has no rows"


def test_hub_rows_and_columns_are_named(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    write_jsonl(tmp_path / "hub" / "train.jsonl", ["a", "", "c"])
    bad = the_bad_one(open_source("hub", str(tmp_path / "hub")))
    assert (bad.reason, bad.origin) == ("empty", f"{tmp_path}/hub (train) row 1")
    for streaming in (False, True):
        bad = items(open_source("hub", str(tmp_path / "hub"), text_field="body", streaming=streaming))[0]
        assert isinstance(bad, BadDocument)
        assert bad.reason == "missing_text"


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "arrow"])
def test_source_that_is_not_there_is_refused(tmp_path: Path, kind: sources.SourceKind) -> None:
    (tmp_path / "empty").mkdir()
    for path, what in ((tmp_path / "nowhere", "does not exist"), (tmp_path / "empty", "holds no"), (tmp_path / "*.zip", "matches no file")):
        with pytest.raises(UserError, match=f"data.valid_path: .*{what}"):
            open_source(kind, str(path), key="data.valid_path")


def test_a_hub_name_needs_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(name: str, *arguments: object, **more: object) -> datasets.Dataset:
        asked.append(name)
        return datasets.Dataset.from_dict({"text": texts()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match="data.valid_path: 'some/corpus' is no local folder.*data.allow_download=true"):
        open_source("hub", "some/corpus", key="data.valid_path")
    assert asked == []
    assert good(open_source("hub", "some/corpus", allow_download=True)) == texts() and asked == ["some/corpus"]


def test_unusable_hub_and_saved_data_sets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    write_jsonl(tmp_path / "hub" / "train.jsonl", texts())
    for change in ({"hub_split": "nowhere"}, {"hub_config": "nowhere"}):
        with pytest.raises(UserError, match="data.path: data set .* cannot be loaded") as error:
            items(open_source("hub", str(tmp_path / "hub"), **change))  # type: ignore[arg-type]
        assert len(str(error.value).splitlines()) == 1
    one = datasets.Dataset.from_dict({"text": texts()})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "several")
    with pytest.raises(UserError, match=r"several splits \(test, train\)"):
        open_source("arrow", str(tmp_path / "several"))
    assert good(open_source("arrow", str(tmp_path / "several" / "train"))) == texts()
    next((tmp_path / "several" / "train").glob("data-*.arrow")).unlink()
    with pytest.raises(UserError, match="is missing, although"):
        open_source("arrow", str(tmp_path / "several" / "train"))


def test_standard_library_packages_are_documents(tmp_path: Path) -> None:
    for name, content in {
        "os.py": b"import sys\n",
        "abc.py": b"# abc\n",
        "_sysconfigdata_x.py": b"machine\n",
        "email/__init__.py": b"# -*- coding: latin-1 -*-\n# caf\xe9\n",
        "email/a/b.py": b"b = 1\n",
        "email/test/t.py": b"left out\n",
        "test/t.py": b"left out\n",
        "site-packages/x.py": b"left out\n",
        "config-3.11/x.py": b"left out\n",
        "nopython/readme.txt": b"left out\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    modules, email = items(open_source("python_stdlib", str(tmp_path)))
    assert isinstance(modules, Document)
    assert isinstance(email, Document)
    assert modules.text == "# abc.py\n# abc\n\n# os.py\nimport sys\n\n"
    assert modules.train_only
    assert email.text == "# email/__init__.py\n# -*- coding: latin-1 -*-\n# café\n\n# email/a/b.py\nb = 1\n\n"
    assert (email.identity, email.train_only) == ("email", False)
    (tmp_path / "email" / "a" / "b.py").write_bytes(b"x = '\xe9'\n")
    bad = the_bad_one(open_source("python_stdlib", str(tmp_path)))
    assert bad.origin == f"{tmp_path}/email/a/b.py"
    with pytest.raises(UserError, match=r"data.path: .* no folder of Python source"):
        open_source("python_stdlib", str(tmp_path / "zip")).units()


def test_running_standard_library_is_long_text() -> None:
    source = open_source("python_stdlib", None)
    sizes = {item.identity: len(item.text) for item in items(source) if isinstance(item, Document)}
    assert sizes["modules"] > 2**20 + 1, "one document of a million tokens"
    assert {"email", "asyncio", "json"} <= sizes.keys()
    assert "site-packages" not in sizes


@pytest.mark.parametrize("offsets", [(0, 3, -100), (0, 1 << 30, 6), (5, 3, 6), (0, 3, 7000)])
def test_arrow_cells_that_reach_outside_of_the_file_are_a_damaged_file(tmp_path, offsets):
    """Arrow itself would end the process."""
    table, sink = pa.table({"text": ["one", "two"]}), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    raw, there = sink.getvalue().to_pybytes(), struct.pack("<3i", 0, 3, 6)
    assert raw.count(there) == 1
    (tmp_path / "data.arrow").write_bytes(raw.replace(there, struct.pack("<3i", *offsets)))
    source = open_source("arrow", str(tmp_path / "data.arrow"))
    items = [item for unit in source.units() for _, item in source.read(unit)]
    assert [item.reason for item in items] == ["unreadable"] and "damaged" in items[0].detail
