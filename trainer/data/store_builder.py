"""Tokenise a source once, in parallel processes, into a token store that is cached by what it was made of.

Safe against concurrent builders (one builds, the others wait), kills (temporary name, sync, rename) and damage (rebuilt).
Imports no torch, so that its worker processes start quickly.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from models.errors import UserError
from trainer.data.beside import NOTHING, Beside
from trainer.data.clusters import CLUSTER
from trainer.data.documents import BadDocument, Document, Item, Source, Unit
from trainer.data.files import sha256_file
from trainer.data.prefixes import PREFIX, Prefixes
from trainer.data.token_store import CLUSTERS, DOCUMENT, PREFIXES, STORE_VERSION, DamagedStore, TokenStore, document_key, token_dtype
from trainer.data.tokenizers import Tokenizer, load_tokenizer

DEFAULT_CACHE = "~/.cache/longstride/tokens"

_BATCH_CHARACTERS = 2**20
_BYTES_PER_PROCESS = 32 * 2**20
"""With tokenize_workers 0, a process is started only for so much text: starting one costs about 0.2 s."""

Progress = Callable[[int, int], None]
"""Called with (parts done, parts in all)."""


@dataclass(frozen=True)
class StoreSpec:
    """What makes a token store what it is, and how to build it."""

    source: Source
    tokenizer: str
    on_bad_document: Literal["error", "skip"] = "error"
    cache_dir: str | None = None
    workers: int = 0
    key: str = "data.path"
    """Setting that names the source in error messages."""
    beside: Beside = NOTHING
    """What the source reads beside texts."""

    def cache_name(self) -> str:
        """Hash of the source's content, the tokenizer and the format."""
        parts = [STORE_VERSION, type(self.source).__name__, self.source.fingerprint(), load_tokenizer(self.tokenizer).fingerprint()]
        return hashlib.sha256(json.dumps([*parts, self.on_bad_document]).encode()).hexdigest()[:32]


def open_or_build(spec: StoreSpec, verify: bool = False, progress: Progress | None = None) -> TokenStore:
    """The store of a source: from the cache, or tokenised now (concurrent callers wait for the one that does it).

    ``verify`` also reads every cached token against its checksum; a damaged store is built anew. Raises UserError for a bad
    document (unless they are skipped), no document at all, or an unusable cache directory; no file is left behind then.
    """
    cache = Path(spec.cache_dir or DEFAULT_CACHE).expanduser()
    folder = cache / spec.cache_name()
    if folder.is_dir():
        with suppress(DamagedStore):
            return TokenStore(folder, verify)
    try:
        with _locked(cache, folder.name):
            with suppress(DamagedStore):  # built by another process meanwhile
                return TokenStore(folder, verify)
            _build(spec, folder, progress)
        return TokenStore(folder)
    except BrokenProcessPool as error:
        raise UserError("a tokenising process was killed (out of memory?); set data.tokenize_workers lower") from error
    except DamagedStore as error:
        raise UserError(f"data.cache_dir: a store just written cannot be read back: {error}") from error
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot tokenise into {cache}: {error}") from error


@dataclass(frozen=True)
class _Part:
    """What a process made of one unit; its tokens are in a file."""

    path: Path
    documents: np.ndarray
    origins: list[str]
    skipped: Counter[str]
    error: BadDocument | None
    prefixes: np.ndarray
    """PREFIX records, one per document; none where the source has no prefixes."""
    clusters: np.ndarray
    """CLUSTER numbers likewise."""


def _build(spec: StoreSpec, folder: Path, progress: Progress | None) -> None:
    for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):  # of builders that were killed: no other one holds the lock
        shutil.rmtree(leftover, ignore_errors=True)
    work = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    work.mkdir()
    try:
        units = spec.source.units()
        _write_store(spec, work, _tokenise(spec, work, units), len(units), progress)
        if folder.exists():
            shutil.rmtree(folder)
        work.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _tokenise(spec: StoreSpec, work: Path, units: Sequence[Unit]) -> Iterator[_Part]:
    """Parts in order of the units, from as many processes as the settings and the amount of text ask for."""
    wanted = spec.workers or min(len(os.sched_getaffinity(0)), 1 + spec.source.size_bytes() // _BYTES_PER_PROCESS)
    processes = min(wanted, len(units))
    if processes <= 1 or multiprocessing.current_process().daemon:  # a daemonic process may not start others
        tokenizer = load_tokenizer(spec.tokenizer)
        yield from (_tokenise_unit(spec, tokenizer, work, i, unit) for i, unit in enumerate(units))
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(partial(_tokenise_in_process, spec, work), range(len(units)), units)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_load_once = lru_cache(maxsize=1)(load_tokenizer)
"""For processes that live for one build: loading a large vocabulary takes longer than tokenising a unit."""


def _tokenise_in_process(spec: StoreSpec, work: Path, index: int, unit: Unit) -> _Part:
    return _tokenise_unit(spec, _load_once(spec.tokenizer), work, index, unit)


def _tokenise_unit(spec: StoreSpec, tokenizer: Tokenizer, work: Path, index: int, unit: Unit) -> _Part:
    """Read and tokenise one unit into a file; stops at the first bad document unless they are skipped."""
    dtype, end = token_dtype(tokenizer.vocab_size), np.array([tokenizer.eos_id])
    path, skipped = work / f"part-{index}", Counter[str]()
    records, origins, prefixes, clusters = [], [], [], []
    with path.open("wb") as file:
        for item in _batches(_measured(spec.beside.prefixes, tokenizer, (item for _, item in spec.source.read(unit)))):
            if isinstance(item, BadDocument):
                if spec.on_bad_document == "error":
                    return _Part(path, np.empty(0, DOCUMENT), [], skipped, item, np.empty(0, PREFIX), np.empty(0, CLUSTER))
                skipped[item.reason] += 1
                continue
            encoded = tokenizer.encode_batch([document.text for document in item])
            ended = [part for ids in encoded for part in (ids, end)]
            np.concatenate(ended).astype(dtype).tofile(file)
            for document, ids in zip(item, encoded, strict=True):
                size, key = len(document.text.encode()), document_key(document.identity or document.text)
                records.append((len(ids) + 1, size, key, document.train_only))
                origins.append(document.origin.replace("\n", "\\n"))
                if document.prefix_record is not None:
                    prefixes.append(document.prefix_record)
                if document.cluster is not None:
                    clusters.append(document.cluster)
    beside = np.array(prefixes, PREFIX), np.array(clusters, CLUSTER)
    return _Part(path, np.array(records, DOCUMENT), origins, skipped, None, *beside)


def _measured(prefixes: Prefixes | None, tokenizer: Tokenizer, items: Iterable[Item]) -> Iterator[Item]:
    """Documents with their prefixes in tokens and bytes, where they have some; those whose prefix is none as bad ones."""
    for item in items:
        if prefixes is None or isinstance(item, BadDocument):
            yield item
            continue
        found = prefixes.measured(item.text, item.prefix, tokenizer, item.origin)
        yield found if isinstance(found, BadDocument) else replace(item, prefix_record=found)


def _batches(items: Iterable[Item]) -> Iterator[list[Document] | BadDocument]:
    """Documents in lists of about a million characters; bad ones singly."""
    batch, characters = [], 0
    for item in items:
        if isinstance(item, BadDocument):
            yield item
            continue
        batch.append(item)
        characters += len(item.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write_store(spec: StoreSpec, work: Path, parts: Iterator[_Part], n_parts: int, progress: Progress | None) -> None:
    """Append the parts to one file and describe it; the description is written last."""
    documents, prefixes, clusters, skipped = [], [], [], Counter()
    with (
        (work / "tokens.bin").open("wb") as tokens,
        (work / "origins.txt").open("w", encoding="utf-8", errors="surrogateescape") as origins,
    ):
        for done, part in enumerate(parts, 1):
            if part.error is not None:
                raise part.error.error()
            with part.path.open("rb") as file:
                shutil.copyfileobj(file, tokens, 2**20)
            part.path.unlink()
            documents.append(part.documents)
            prefixes.append(part.prefixes)
            clusters.append(part.clusters)
            origins.writelines(f"{origin}\n" for origin in part.origins)
            skipped += part.skipped
            if progress is not None:
                progress(done, n_parts)
    records = np.concatenate(documents)
    if len(records) == 0:
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items())) or "none at all"
        raise UserError(f"{spec.key}: no usable document ({counts}); nothing to train on")
    np.save(work / "documents.npy", records, allow_pickle=False)
    names = ["tokens.bin", "documents.npy", "origins.txt"]
    for name, held, values in ((PREFIXES, spec.beside.prefixes, prefixes), (CLUSTERS, spec.beside.clusters, clusters)):
        if held is not None:
            np.save(work / name, np.concatenate(values), allow_pickle=False)
            names.append(name)
    meta = {
        "version": STORE_VERSION,
        "dtype": token_dtype(load_tokenizer(spec.tokenizer).vocab_size),
        "skipped": dict(sorted(skipped.items())),
        "files": {name: {"size": (work / name).stat().st_size, "sha256": sha256_file(work / name)} for name in names},
    }
    (work / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    for name in (*names, "meta.json"):
        _sync(work / name)
    _sync(work)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _locked(cache: Path, name: str) -> Iterator[None]:
    """Hold the build lock of one store; the kernel releases it if this process dies. Directories made here for nothing are
    removed again."""
    made = [path for path in (cache, *cache.parents) if not path.exists()]
    path = cache / f"{name}.lock"
    file = _lock(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever waits for it finds it gone and takes a new one
        file.close()
        with suppress(OSError):  # not empty: in use
            for folder in made:
                folder.rmdir()


def _lock(path: Path) -> BinaryIO:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("ab")
        except FileNotFoundError:  # the directory was removed between the two calls
            continue
        fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()
