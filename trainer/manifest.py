"""The list of a checkpoint's files with sizes and SHA-256: what makes a damaged checkpoint visible. Imports no torch.

No file format notices a flipped bit by itself (torch.save, safetensors and torch's distributed checkpoint all load it
silently), so every file is hashed when written and compared before anything in it is believed. The manifest protects
itself: it is stored in one canonical form with a hash of its own, so that a change of any byte is seen.

Try it: ``python -c "from trainer.manifest import verify; print(verify('runs/x/checkpoints/step_00000010'))"``
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.run_dir import STEP_NAME, write_atomic

MANIFEST_NAME = "manifest.json"
FORMAT = 1


class ManifestError(Exception):
    """A manifest that is missing, damaged or of an unknown format; the message is the reason."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal digest of the content."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of and where it comes from."""

    step: int
    world_size: int
    """Ranks that wrote it; it can be read by any number."""
    config_hash: str
    versions: Mapping[str, str]
    """Versions of longstride, torch and Python that wrote it."""
    files: Mapping[str, FileEntry]
    """By file name; every file of the directory but the manifest itself."""

    def to_bytes(self) -> bytes:
        """The canonical form."""
        body = {
            "format": FORMAT,
            "step": self.step,
            "world_size": self.world_size,
            "config_hash": self.config_hash,
            "versions": dict(self.versions),
            "files": {name: [entry.size, entry.sha256] for name, entry in self.files.items()},
        }
        return _encode({**body, "self_sha256": hashlib.sha256(_encode(body)).hexdigest()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read the canonical form; raises ManifestError if any byte is not as it was written."""
        try:
            record: dict[str, Any] = json.loads(data)
            digest = record.pop("self_sha256")
            if record["format"] != FORMAT:
                raise ManifestError(f"format {record['format']} is not known to this version (it writes {FORMAT})")
            files = {str(name): FileEntry(int(size), str(sha256)) for name, (size, sha256) in record["files"].items()}
            manifest = cls(record["step"], record["world_size"], record["config_hash"], record["versions"], files)
            intact = digest == hashlib.sha256(_encode(record)).hexdigest() and data == manifest.to_bytes()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ManifestError("not readable") from None
        if not intact:
            raise ManifestError("its own checksum does not match")
        bad = [name for name in files if not _is_plain(name)]
        if bad:
            raise ManifestError(f"names a file outside the checkpoint: {bad[0]!r}")
        return manifest


def _encode(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..", MANIFEST_NAME) and not set(name) & {"/", "\0", "\\"}


def hash_file(path: Path, *, from_disk: bool = False) -> FileEntry:
    """Size and digest of a regular file; raises OSError if it is none (a link could lead anywhere).

    ``from_disk``: the kernel drops what it remembers of the file first (it keeps pages that are not yet written), where it can.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if from_disk and hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # advice only; a pipe has none, and is refused below
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError(f"{path} is not a regular file")
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return FileEntry(stream.tell(), digest)


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Entries of several files of one folder; hashing lets go of the interpreter lock, so threads use all cores."""
    listed = list(names)
    with ThreadPoolExecutor(max_workers=_threads(len(listed))) as pool:
        return dict(zip(listed, pool.map(lambda name: hash_file(folder / name), listed), strict=True))


def _threads(files: int) -> int:
    return max(1, min(files, 8, os.cpu_count() or 1))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest (the last file of a checkpoint), synced."""
    write_atomic(folder / MANIFEST_NAME, manifest.to_bytes())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint directory; raises ManifestError with the reason."""
    path = folder / MANIFEST_NAME
    try:
        return Manifest.from_bytes(path.read_bytes())
    except ManifestError as error:
        raise ManifestError(f"{MANIFEST_NAME}: {error}") from None
    except OSError as error:
        raise ManifestError(f"{MANIFEST_NAME}: {error.strerror or error}") from None


def problems_of_files(folder: Path, expected: Mapping[str, FileEntry], *, from_disk: bool = False) -> list[str]:
    """Compare files with their entries: one line per problem, naming the file. Several ranks may each check a part. ``from_disk`` as
    for ``hash_file``."""

    def problem(item: tuple[str, FileEntry]) -> str | None:
        name, entry = item
        try:
            size = (folder / name).lstat().st_size
            if size != entry.size:
                return f"{name}: {size} bytes, the manifest says {entry.size}"
            if hash_file(folder / name, from_disk=from_disk) != entry:
                return f"{name}: SHA-256 differs from the manifest"
        except OSError as error:
            return f"{name}: {error.strerror or error}"
        return None

    with ThreadPoolExecutor(max_workers=_threads(len(expected))) as pool:
        return [line for line in pool.map(problem, sorted(expected.items())) if line]


def structure_problems(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong before any file is read: a directory of another step, or entries that the manifest does not list
    (nobody knows what they are, so nothing may read them)."""
    listed = {*manifest.files, MANIFEST_NAME}
    problems = [f"{name}: not listed in the manifest" for name in sorted(entry.name for entry in folder.iterdir()) if name not in listed]
    named = STEP_NAME.fullmatch(folder.name)
    if named and int(named[1]) != manifest.step:
        problems.append(f"{MANIFEST_NAME}: is of step {manifest.step}, not of {folder.name}")
    return problems


def verify(folder: Path | str) -> list[str]:
    """Check a whole checkpoint directory; an empty list means that every byte is as it was written."""
    path = Path(folder)
    try:
        manifest = read_manifest(path)
        return [*structure_problems(path, manifest), *problems_of_files(path, manifest.files)]
    except ManifestError as error:
        return [str(error)]


def split_by_size(files: Mapping[str, FileEntry], parts: int) -> list[dict[str, FileEntry]]:
    """Deal files to ``parts`` checkers so that each has about the same number of bytes; the same answer on every rank."""
    piles: list[dict[str, FileEntry]] = [{} for _ in range(parts)]
    loads = [0] * parts
    for name, entry in sorted(files.items(), key=lambda item: (-item[1].size, item[0])):
        lightest = loads.index(min(loads))
        piles[lightest][name] = entry
        loads[lightest] += entry.size + 1
    return piles
