"""A tokenised source on disk: read piece by piece, never written again. store_builder.py makes it.

One folder: ``tokens.bin`` (all documents end to end, each with its end token, in the smallest integer type that holds the
vocabulary), ``documents.npy`` (one DOCUMENT record each), ``origins.txt`` (one line each), ``prefixes.npy`` (one PREFIX record each,
where the data have prefixes), ``clusters.npy`` (one number each, where they have clusters) and ``meta.json`` (counts, sizes, SHA-256).
Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import RunFailed, UserError
from trainer.data.clusters import CLUSTER
from trainer.data.files import sha256_file
from trainer.data.prefixes import PREFIX

STORE_VERSION = 1

DOCUMENT = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("key", "<u8"), ("train_only", "?")])
"""Of one document: tokens with the end token, UTF-8 bytes, hash that decides whether it is held out."""


PREFIXES = "prefixes.npy"
"""A store without it has documents without prefixes."""


CLUSTERS = "clusters.npy"
"""A store without it has documents without clusters."""


class DamagedStore(Exception):
    """A store that is incomplete or altered; the builder makes it anew."""


class TokenStore:
    """Documents of one tokenised source.

    Opening checks the format, the sizes and the hash of everything but the tokens; ``verify`` reads the tokens too. Raises DamagedStore.
    """

    def __init__(self, folder: Path, verify: bool = False) -> None:
        self.folder = folder
        try:
            self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            if self.meta["version"] != STORE_VERSION:
                raise DamagedStore(f"{folder} has format {self.meta['version']}, not {STORE_VERSION}")
            self._check(verify)
            self.documents = np.load(folder / "documents.npy", allow_pickle=False)
            if self.documents.dtype != DOCUMENT or len(self.documents) == 0:
                raise DamagedStore(f"{folder / 'documents.npy'} is no list of documents")
            self.prefixes = self._beside(PREFIXES, PREFIX, "prefixes")
            self.clusters = self._beside(CLUSTERS, CLUSTER, "clusters")
            self._dtype = np.dtype(self.meta["dtype"])
            self._tokens = os.open(folder / "tokens.bin", os.O_RDONLY)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedStore(f"{folder}: {error!r}") from error
        weakref.finalize(self, os.close, self._tokens)
        self._starts = np.concatenate(([0], np.cumsum(self.documents["tokens"])))
        stored = os.fstat(self._tokens).st_size / self._dtype.itemsize
        if self._starts[-1] != stored:
            raise DamagedStore(f"{folder}: {stored:g} tokens where the documents have {self._starts[-1]}")

    def _beside(self, name: str, dtype: np.dtype, what: str) -> np.ndarray | None:
        """One record per document, or None where the store has none of this kind."""
        if name not in self.meta["files"]:
            return None
        found = np.load(self.folder / name, allow_pickle=False)
        if found.dtype != dtype or len(found) != len(self.documents):
            raise DamagedStore(f"{self.folder / name} is no list of {what} of {len(self.documents)} documents")
        return found

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document, as stored; start and stop within it. Raises RunFailed when the disk does not give them.

        Read, not mapped: pages of a mapped file count as this process's memory, which then grows by the size of the store over an epoch
        while no tensor does, and a disk that fails ends the process instead of raising.
        """
        at = int(self._starts[document] + start) * self._dtype.itemsize
        missing, parts = (stop - start) * self._dtype.itemsize, []
        while missing > 0:
            try:
                part = os.pread(self._tokens, missing, at)  # 2 GiB at most
            except OSError as error:
                raise self._unreadable(str(error)) from error
            if not part:
                raise self._unreadable("it has become shorter")
            parts.append(part)
            at, missing = at + len(part), missing - len(part)
        return np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), dtype=self._dtype)

    def _unreadable(self, why: str) -> RunFailed:
        return RunFailed(
            f"data: {self.folder / 'tokens.bin'} cannot be read any more: {why}; the last checkpoint is intact. See that the disk is "
            "well, delete that folder (it is made anew) and resume"
        )

    @cached_property
    def origins(self) -> list[str]:
        """Where each document stands in its source."""
        return (self.folder / "origins.txt").read_bytes().decode("utf-8", "surrogateescape").split("\n")[:-1]

    @property
    def skipped(self) -> dict[str, int]:
        """Bad documents left out, by reason."""
        return dict(self.meta["skipped"])

    @property
    def content_hash(self) -> str:
        """Equal for equal tokens and documents, wherever they were read from."""
        files = self.meta["files"]
        names = ["tokens.bin", "documents.npy", *(name for name in (PREFIXES, CLUSTERS) if name in files)]
        return hashlib.sha256(" ".join(files[name]["sha256"] for name in names).encode()).hexdigest()

    def _check(self, verify: bool) -> None:
        files: dict[str, dict[str, Any]] = self.meta["files"]
        for name, entry in files.items():
            size = (self.folder / name).stat().st_size
            if size != entry["size"]:
                raise DamagedStore(f"{self.folder / name} has {size} bytes, not {entry['size']}")
        names = [name for name in files if verify or name != "tokens.bin"]
        with ThreadPoolExecutor(max(1, len(names))) as threads:
            for name, digest in zip(names, threads.map(lambda name: sha256_file(self.folder / name), names), strict=True):
                if digest != files[name]["sha256"]:
                    raise DamagedStore(f"{self.folder / name} does not have the content that was written")


def token_dtype(vocab_size: int) -> str:
    """Smallest unsigned type for ids below ``vocab_size``."""
    for dtype in ("<u1", "<u2", "<u4"):
        if vocab_size - 1 <= np.iinfo(dtype).max:
            return dtype
    raise UserError(f"data.tokenizer: a vocabulary of {vocab_size} ids is not supported")


def document_key(identity: str) -> int:
    """The hash in 0..2**64 that decides whether a document is held out; the same everywhere and for ever."""
    return int.from_bytes(hashlib.blake2b(identity.encode("utf-8"), digest_size=8, person=b"held-out").digest(), "big")
