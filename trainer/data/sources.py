"""Sources of documents in plain files: text, JSON lines and the running Python's standard library.

``open_source`` is the door for every kind; tables (Parquet, Arrow, hub data sets) are read in tables.py.
Try alone: ``python -c "from trainer.data.sources import *; s = StdlibSource(); print(next(s.read(s.units()[0]))[1].origin)"``.
"""

from __future__ import annotations

import io
import itertools
import json
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from models.errors import UserError
from trainer.data.beside import NOTHING, Beside
from trainer.data.documents import BadDocument, Document, Item, Source, Unit, check_text
from trainer.data.files import fingerprint_files, list_files, size_of
from trainer.data.tables import ArrowSource, HubSource, ParquetSource

SourceKind = Literal["python_stdlib", "text", "jsonl", "parquet", "arrow", "hub"]

UNIT_BYTES = 16 * 2**20
"""How much of a source one tokenising process takes at a time."""


def open_source(
    kind: SourceKind,
    path: str | None,
    *,
    text_field: str = "text",
    beside: Beside = NOTHING,
    hub_config: str | None = None,
    hub_split: str = "train",
    streaming: bool = False,
    allow_download: bool = False,
    key: str = "data.path",
) -> Source:
    """The source that the ``data`` settings name; ``key`` is the setting that error messages name.

    Raises UserError when there is no such file, folder or data set, or when it is to come from the network and must not.
    """
    if kind == "python_stdlib":
        return StdlibSource(path, key)
    assert path is not None  # the configuration refuses every other kind without a path
    match kind:
        case "text":
            return TextSource(list_files(path, None, key))
        case "jsonl":
            return JsonlSource(list_files(path, ".jsonl", key), text_field, beside)
        case "parquet":
            return ParquetSource(list_files(path, ".parquet", key), text_field, beside)
        case "arrow":
            return ArrowSource.open(path, text_field, key, beside)
        case "hub":
            if not allow_download and not Path(path).expanduser().exists():
                raise UserError(f"{key}: {path!r} is no local folder, and nothing is downloaded; allow it with data.allow_download=true")
            return HubSource(path, hub_config, hub_split, text_field, streaming, key, beside)


@dataclass(frozen=True)
class TextSource:
    """Each file one document. Unit: (first, end) of the file list; position: index into the file list."""

    files: tuple[Path, ...]

    def units(self) -> Sequence[Unit]:
        """Consecutive files of about UNIT_BYTES in all."""
        cuts, held = [0], 0
        for i, file in enumerate(self.files):
            held += file.stat().st_size
            if held >= UNIT_BYTES or i + 1 == len(self.files):
                cuts.append(i + 1)
                held = 0
        return list(itertools.pairwise(cuts))

    def read(self, unit: Unit, position: int = 0) -> Iterator[tuple[int, Item]]:
        """The files of a unit."""
        first, end = unit
        for i in range(max(first, position), end):
            yield i, _read_text(self.files[i])

    def size_bytes(self) -> int:
        """Bytes of all files."""
        return size_of(self.files)

    def fingerprint(self) -> Any:
        """Names and contents."""
        return fingerprint_files(self.files)


@dataclass(frozen=True)
class JsonlSource:
    """One JSON object per line. Unit: (file, begin, end) in bytes; it holds the lines that begin there. Position: byte
    offset of a line in its file. Lines of white space are no documents."""

    files: tuple[Path, ...]
    text_field: str
    beside: Beside = NOTHING

    def units(self) -> Sequence[Unit]:
        """Byte ranges of about UNIT_BYTES; an empty file is one unit, so that it is reported."""
        found = []
        for i, file in enumerate(self.files):
            size = file.stat().st_size
            found += [(i, begin, min(begin + UNIT_BYTES, size)) for begin in range(0, max(size, 1), UNIT_BYTES)]
        return found

    def read(self, unit: Unit, position: int = 0) -> Iterator[tuple[int, Item]]:
        """Lines that begin in the unit's byte range."""
        i, begin, end = unit
        path = self.files[i]
        if end == 0:
            yield 0, BadDocument("empty", str(path), "the file is empty")
            return
        try:
            file = path.open("rb")
        except OSError as error:
            yield begin, BadDocument("unreadable", str(path), f"cannot be read: {error.strerror}")
            return
        with file:
            if position > begin:
                file.seek(position)
            elif begin > 0:  # the line that holds byte begin - 1 belongs to the unit before
                file.seek(begin - 1)
                file.readline()
            while (start := file.tell()) < end:
                line = file.readline()
                if line.strip():
                    yield start, self._parse(path, start, line)

    def _parse(self, path: Path, start: int, line: bytes) -> Item:
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            return BadDocument("invalid_utf8", _line_of(path, start), f"invalid UTF-8 at byte {error.start} of the line")
        except (ValueError, RecursionError) as error:
            return BadDocument("invalid_json", _line_of(path, start), f"invalid JSON: {error}")
        text = record.get(self.text_field) if isinstance(record, dict) else None
        found = check_text(text, f"{path} byte {start}", "")
        if isinstance(found, Document):
            return self._with_beside(found, record, path, start)
        detail = self._what_is_missing(record, text) if found.reason == "missing_text" else found.detail
        return BadDocument(found.reason, _line_of(path, start), detail)

    def _with_beside(self, found: Document, record: dict[str, Any], path: Path, start: int) -> Item:
        item = self.beside.checked(found, [record.get(key) for key in self.beside.keys], "")
        return item if isinstance(item, Document) else replace(item, origin=_line_of(path, start))

    def _what_is_missing(self, record: Any, text: Any) -> str:
        if not isinstance(record, dict):
            return f"a JSON {type(record).__name__}, not an object with the text field {self.text_field!r}"
        if self.text_field in record:
            return f"the text field {self.text_field!r} holds {type(text).__name__}, not text"
        keys = ", ".join(sorted(record)[:8]) or "none"
        return f"no text field {self.text_field!r} (keys: {keys}); data.text_field names it"

    def size_bytes(self) -> int:
        """Bytes of all files."""
        return size_of(self.files)

    def fingerprint(self) -> Any:
        """Names, contents and the fields."""
        return [self.text_field, fingerprint_files(self.files), *self.beside.fingerprint()]


_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "__phello__"}


@dataclass(frozen=True)
class StdlibSource:
    """The Python standard library as text: each top-level package tree is one long document, all single-file modules together
    are the first one (``modules``, over four million bytes). Tests and machine-specific files are left out.

    ``root`` may name another folder laid out in the same way. Whole packages are held out, by a hash of their name, so the
    same ones on every machine; ``modules`` never is. Unit: (i,), a document; its position is always 0.
    """

    root: str | None = None
    key: str = "data.path"

    def units(self) -> Sequence[Unit]:
        """One per document."""
        return [(i,) for i in range(len(self._trees()))]

    def read(self, unit: Unit, position: int = 0) -> Iterator[tuple[int, Item]]:
        """The document of a unit; a file that is not in its declared encoding spoils the document and is named."""
        name, files = self._trees()[unit[0]]
        text = io.StringIO()
        for file in files:
            try:
                with tokenize.open(file) as source:  # honours the encoding declared in the file (PEP 263)
                    text.write(f"# {file.relative_to(self._folder()).as_posix()}\n{source.read()}\n")
            except (SyntaxError, UnicodeDecodeError) as error:
                yield 0, BadDocument("invalid_utf8", str(file), f"cannot be decoded: {error}")
                return
        yield 0, Document(text.getvalue(), str(self._folder() / name), identity=name, train_only=name == "modules")

    def size_bytes(self) -> int:
        """Bytes of all files."""
        return size_of([file for _, files in self._trees() for file in files])

    def fingerprint(self) -> Any:
        """Contents of every document's files."""
        return [[name, fingerprint_files(files)] for name, files in self._trees()]

    def _folder(self) -> Path:
        return Path(self.root).expanduser() if self.root else Path(sysconfig.get_path("stdlib"))

    def _trees(self) -> list[tuple[str, list[Path]]]:
        folder = self._folder()
        if not folder.is_dir():
            raise UserError(f"{self.key}: {folder} is no folder of Python source; set data.source=text and data.path to text of your own")
        modules = sorted(f for f in folder.glob("*.py") if not f.name.startswith("_sysconfigdata"))
        packages = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.isidentifier() and p.name not in _NOT_LIBRARY)
        trees = [("modules", modules), *((p.name, _python_files(p)) for p in packages)]
        found = [(name, files) for name, files in trees if files]
        if not found:
            raise UserError(f"{self.key}: {folder} holds no Python source; set data.source=text and data.path to text of your own")
        return found


def _python_files(package: Path) -> list[Path]:
    files = [f for f in package.rglob("*.py") if not _NOT_LIBRARY & set(f.relative_to(package).parts)]
    return sorted(files, key=lambda f: f.as_posix())


def _read_text(path: Path) -> Item:
    try:
        raw = path.read_bytes()
        return check_text(raw.decode("utf-8"), str(path), "")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return BadDocument("invalid_utf8", f"{path} line {line}", f"invalid UTF-8 at byte {error.start} of the file")
    except OSError as error:
        return BadDocument("unreadable", str(path), f"cannot be read: {error.strerror}")


def _line_of(path: Path, offset: int) -> str:
    """``path line N`` for a byte offset, counted only when a message needs it."""
    lines, left = 1, offset
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, 2**20))):
            lines += block.count(b"\n")
            left -= len(block)
    return f"{path} line {lines}"
