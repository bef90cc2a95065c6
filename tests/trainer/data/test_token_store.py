"""The token store: what is built, when it is built anew, and what is left behind when it cannot be built."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import RunFailed, UserError
from tests.trainer.data.corpus import texts, tokens_of, write_jsonl
from tests.trainer.data.test_tokenizers import make_tokenizer
from trainer.data import sources, store_builder
from trainer.data.documents import Document, Item, Unit
from trainer.data.sources import open_source
from trainer.data.store_builder import StoreSpec, open_or_build
from trainer.data.token_store import TokenStore, document_key, token_dtype


def spec_of(path: Path, cache: Path, **changes: Any) -> StoreSpec:
    return StoreSpec(**{"source": open_source("jsonl", str(path)), "tokenizer": "bytes", "cache_dir": str(cache), "workers": 1, **changes})


def content(store: TokenStore) -> list[list[int]]:
    return [store.read(d, 0, n).tolist() for d, n in enumerate(store.documents["tokens"].tolist())]


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one entry with each store that is really built."""
    real, names = store_builder._build, []
    monkeypatch.setattr(store_builder, "_build", lambda spec, folder, progress: (names.append(folder.name), real(spec, folder, progress)))
    return names


def test_store_holds_every_document_with_its_end_token(tmp_path: Path, builds: list[str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts())
    store = open_or_build(spec_of(path, tmp_path / "cache"))
    assert content(store) == [tokens_of(text) for text in texts()]
    assert store.documents["bytes"].tolist() == [len(text.encode()) for text in texts()]
    assert store.documents["key"].tolist() == [document_key(text) for text in texts()]
    assert store.origins[0] == f"{path} byte 0"
    assert len(store.origins) == len(texts())
    again = open_or_build(spec_of(path, tmp_path / "cache"), verify=True)
    assert content(again) == content(store)
    assert len(builds) == 1
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [store.folder.name], "no lock, no temporary file"


def test_tokens_are_read_and_not_mapped(tmp_path: Path) -> None:
    """Pages of a mapped file would count as memory of the process."""
    store = open_or_build(spec_of(write_jsonl(tmp_path / "a.jsonl", texts()), tmp_path / "cache"))
    last = len(texts()) - 1
    want = tokens_of(texts()[last])
    assert store.read(last, 2, 5).tolist() == want[2:5]
    assert store.read(last, 3, 3).tolist() == []
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(store.folder) not in maps.read_text()
    descriptor = store._tokens
    del store
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_tokens_that_a_disk_no_longer_gives_end_the_run_with_a_remedy(tmp_path: Path) -> None:
    store = open_or_build(spec_of(write_jsonl(tmp_path / "a.jsonl", texts()), tmp_path / "cache"))
    os.truncate(store.folder / "tokens.bin", 3 * np.dtype(store.meta["dtype"]).itemsize)
    assert store.read(0, 0, 3).tolist() == tokens_of(texts()[0])[:3]
    with pytest.raises(RunFailed, match=r"tokens\.bin cannot be read any more: it has become shorter; .* delete that folder"):
        store.read(0, 0, 4)


def test_smallest_type_that_holds_the_vocabulary() -> None:
    assert [token_dtype(n) for n in (256, 257, 65_536, 65_537)] == ["<u1", "<u2", "<u2", "<u4"]


def test_held_out_keys_are_frozen_for_ever() -> None:
    assert document_key("email") == 12846158899015374247


def test_parallel_processes_give_the_same_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 200)
    tokenizer = str(make_tokenizer(tmp_path / "tok"))
    path = write_jsonl(tmp_path / "a.jsonl", texts(40))
    seen: list[tuple[int, int]] = []
    one = open_or_build(spec_of(path, tmp_path / "one", tokenizer=tokenizer, workers=1))
    source = _Parts(tuple(texts(40)))
    two = open_or_build(spec_of(path, tmp_path / "two", source=source, tokenizer=tokenizer, workers=2), progress=lambda *p: seen.append(p))
    assert content(one) == content(two)
    assert seen == [(i, 10) for i in range(1, 11)]


class _Parts:
    """Documents in ten units; each says which process read it."""

    def __init__(self, documents: tuple[str, ...]) -> None:
        self.documents = documents

    def units(self) -> list[Unit]:
        return [(i,) for i in range(10)]

    def read(self, unit: Unit, position: int = 0) -> Any:
        size = len(self.documents) // 10
        for i in range(unit[0] * size, (unit[0] + 1) * size):
            item: Item = Document(self.documents[i], f"process {os.getpid()}")
            yield i, item

    def size_bytes(self) -> int:
        return 1

    def fingerprint(self) -> Any:
        return self.documents


def test_tokenising_happens_in_other_processes(tmp_path: Path) -> None:
    store = open_or_build(StoreSpec(_Parts(tuple(texts(40))), "bytes", cache_dir=str(tmp_path), workers=2))
    assert f"process {os.getpid()}" not in store.origins
    assert 1 <= len(set(store.origins)) <= 2


def test_changes_of_source_tokenizer_or_rule_build_anew(tmp_path: Path, builds: list[str]) -> None:
    path, cache = write_jsonl(tmp_path / "a.jsonl", texts()), tmp_path / "cache"
    open_or_build(spec_of(path, cache))
    open_or_build(spec_of(path, cache, on_bad_document="skip"))
    open_or_build(spec_of(path, cache, tokenizer=str(make_tokenizer(tmp_path / "tok"))))
    assert len(set(builds)) == 3
    path.write_bytes(path.read_bytes().replace(b"document 3", b"document 4"))  # of equal size
    assert content(open_or_build(spec_of(path, cache)))[3] == tokens_of(texts()[3].replace("document 3", "document 4"))
    assert len(set(builds)) == 4
    shutil.copytree(tmp_path / "cache", tmp_path / "moved")
    open_or_build(spec_of(Path(shutil.copy(path, tmp_path / "b.jsonl")).rename(tmp_path / "moved" / "a.jsonl"), tmp_path / "moved"))
    assert len(builds) == 4, "a copy of a known source is known"


@pytest.mark.parametrize("file", ["tokens.bin", "documents.npy", "origins.txt", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damaged_cache_is_built_anew(tmp_path: Path, builds: list[str], file: str, damage: str) -> None:
    path, cache = write_jsonl(tmp_path / "a.jsonl", texts()), tmp_path / "cache"
    store = open_or_build(spec_of(path, cache))
    want, target = content(store), store.folder / file
    raw = bytearray(target.read_bytes())
    if damage == "missing":
        target.unlink()
    elif damage == "cut":
        target.write_bytes(raw[:-3])
    else:
        raw[len(raw) // 2] ^= 1
        target.write_bytes(raw)
    assert content(open_or_build(spec_of(path, cache), verify=True)) == want
    assert len(builds) == 2
    assert content(open_or_build(spec_of(path, cache), verify=True)) == want
    assert len(builds) == 2


def test_remains_of_killed_builders_are_removed(tmp_path: Path) -> None:
    spec = spec_of(write_jsonl(tmp_path / "a.jsonl", texts()), tmp_path / "cache")
    remains = tmp_path / "cache" / f"{spec.cache_name()}.tmp-99-abc"
    remains.mkdir(parents=True)
    (remains / "tokens.bin").write_bytes(b"x")
    (tmp_path / "cache" / f"{spec.cache_name()}.lock").write_bytes(b"")
    store = open_or_build(spec)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [store.folder.name]


def _build_and_report(path: Path, cache: Path, start: Any, results: Any) -> None:
    real, built = store_builder._build, []

    def slow(*args: Any) -> None:
        built.append(1)
        time.sleep(0.3)
        real(*args)

    store_builder._build = slow
    start.wait()
    results.put((len(built), content(open_or_build(spec_of(path, cache))), len(built)))


def test_of_concurrent_builders_one_builds_and_all_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts())
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    processes = [context.Process(target=_build_and_report, args=(path, tmp_path / "cache", start, results)) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    answers = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(timeout=10)
        assert process.exitcode == 0
    assert sum(built for _, _, built in answers) == 1
    assert all(found == [tokens_of(text) for text in texts()] for _, found, _ in answers)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_killed_builder_does_not_block_the_next(tmp_path: Path) -> None:
    path, cache = write_jsonl(tmp_path / "a.jsonl", texts()), tmp_path / "cache"
    code = f"""
import time
from pathlib import Path
from trainer.data import store_builder
from tests.trainer.data.test_token_store import spec_of
store_builder._write_store = lambda *a: (print("building", flush=True), time.sleep(60))
store_builder.open_or_build(spec_of(Path({str(path)!r}), Path({str(cache)!r})))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"building\n"
    process.kill()
    process.wait()
    process.stdout.close()
    assert list(cache.glob("*.tmp-*"))
    assert content(open_or_build(spec_of(path, cache))) == [tokens_of(text) for text in texts()]
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_document_stops_the_build_and_nothing_is_written(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, bad in (("a", None), ("b", 2), ("c", 0)):
        lines = [json.dumps({"text": text}) for text in texts(4)]
        if bad is not None:
            lines[bad] = "{}"
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    spec = spec_of(tmp_path / "*.jsonl", tmp_path / "new" / "cache", workers=workers)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"b\.jsonl line 3: no text field 'text'") as error:  # the first one, whoever finds which when
        open_or_build(spec)
    assert error.value.exit_code == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_skipped_documents_are_counted_by_reason(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{}\n{"text": ""}\nnonsense\n{"text": "two"}\n{}\n')
    store = open_or_build(spec_of(tmp_path / "a.jsonl", tmp_path / "cache", on_bad_document="skip"))
    assert content(store) == [tokens_of("one"), tokens_of("two")]
    assert store.skipped == {"empty": 1, "invalid_json": 1, "missing_text": 2}


def test_no_document_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n\n[]\n")
    with pytest.raises(UserError, match=r"data\.path: no usable document \(2 missing_text\)"):
        open_or_build(spec_of(tmp_path / "a.jsonl", tmp_path / "cache", on_bad_document="skip"))
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"no usable document \(none at all\)"):
        open_or_build(spec_of(tmp_path / "a.jsonl", tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_unusable_cache_directory_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot tokenise into"):
        open_or_build(spec_of(path, tmp_path / "file" / "cache"))


def _die(*args: Any) -> None:
    os.kill(os.getpid(), 9)


class _Deadly(_Parts):
    """Kills the process that reads it, as running out of memory does."""

    def read(self, unit: Unit, position: int = 0) -> Any:
        _die()


def test_killed_worker_is_an_error_not_a_hang(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.tokenize_workers"):
        open_or_build(StoreSpec(_Deadly(("a",)), "bytes", cache_dir=str(tmp_path), workers=2))
    assert list(tmp_path.iterdir()) == []


def test_building_imports_no_torch(tmp_path: Path) -> None:
    code = "import sys, trainer.data.store_builder, trainer.data.sources; assert not {'torch', 'datasets', 'pyarrow'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reading_keeps_the_stored_type(tmp_path: Path) -> None:
    store = open_or_build(spec_of(write_jsonl(tmp_path / "a.jsonl", texts()), tmp_path / "cache"))
    assert store.read(0, 0, 3).dtype == np.uint16
