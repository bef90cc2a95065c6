"""Which files a local source is made of, and when they count as changed."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from models.errors import UserError

HASHED_BYTES = 256 * 2**20
"""Sources up to this size are recognised by their content, larger ones by size and times of their files."""


def list_files(path: str, suffix: str | None, key: str = "data.path") -> tuple[Path, ...]:
    """Files named by a file, folder (searched recursively, hidden entries left out) or glob pattern, sorted by path.

    ``suffix`` limits what is taken from a folder. Raises UserError naming ``key`` when nothing is found.
    """
    given = Path(path).expanduser()
    if given.is_file():
        return (given,)
    if given.is_dir():
        files = [f for f in given.rglob(f"*{suffix or ''}") if f.is_file() and not _is_hidden(f, given)]
        missing = f"holds no {suffix or ''} file"
    elif glob.has_magic(path):
        files = [Path(f) for f in glob.glob(str(given), recursive=True) if Path(f).is_file()]  # noqa: PTH207 (pathlib refuses absolute patterns)
        missing = "matches no file"
    else:
        raise UserError(f"{key}: {given} does not exist")
    if not files:
        raise UserError(f"{key}: {given} {missing}")
    return tuple(sorted(files, key=lambda f: f.as_posix()))


def size_of(files: Sequence[Path]) -> int:
    """Bytes of all files."""
    return sum(f.stat().st_size for f in files)


def fingerprint_files(files: Sequence[Path]) -> list[list[str | int]]:
    """One entry per file that changes with its content.

    Up to HASHED_BYTES in all: name and SHA-256, so a copy of a corpus is recognised as the same one. Above: absolute path, size,
    modification and inode-change time in ns (the latter moves with every write, even when a tool restores the former).
    """
    try:
        if size_of(files) <= HASHED_BYTES:
            with ThreadPoolExecutor() as threads:  # hashlib lets go of the interpreter lock
                return [[f.name, digest] for f, digest in zip(files, threads.map(sha256_file, files), strict=True)]
        stats = [(f, f.stat()) for f in files]
        return [[str(f.resolve()), s.st_size, s.st_mtime_ns, s.st_ctime_ns] for f, s in stats]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)
