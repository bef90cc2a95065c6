"""Sources of documents in tables: Parquet files, Arrow files and data sets of the ``datasets`` library.

Rows are counted from 0. pyarrow and datasets are imported when a table is opened, never before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from models.errors import UserError
from trainer.data.beside import NOTHING, Beside
from trainer.data.documents import BadDocument, Item, Unit, check_text
from trainer.data.files import fingerprint_files, list_files, size_of

_ROWS_PER_BATCH = 256
_ROWS_PER_UNIT = 16_384


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files. Unit: (file, row group, first row in the file); position: row within the row group. A file that cannot be
    opened is one unit with row group -1, so that it is reported when it is read."""

    files: tuple[Path, ...]
    text_field: str
    beside: Beside = NOTHING

    def units(self) -> Sequence[Unit]:
        """One per row group."""
        found: list[Unit] = []
        for i, path in enumerate(self.files):
            try:
                with _opened_parquet(path) as file:
                    first = 0
                    for group in range(file.num_row_groups):
                        found.append((i, group, first))
                        first += file.metadata.row_group(group).num_rows
                    if first == 0:
                        found[len(found) - file.num_row_groups :] = [(i, -1, 0)]
            except _Unreadable:
                found.append((i, -1, 0))
        return found

    def read(self, unit: Unit, position: int = 0) -> Iterator[tuple[int, Item]]:
        """Rows of a row group."""
        i, group, first = unit
        path = self.files[i]
        row = 0
        try:
            with _opened_parquet(path) as file:
                if group < 0:
                    yield 0, BadDocument("empty", str(path), "the file has no rows")
                    return
                if missing := _no_column(path, self.text_field, self.beside, file.schema_arrow.names):
                    yield 0, missing
                    return
                wanted = [self.text_field, *self.beside.keys]
                batches = _reading(path, file.iter_batches(_ROWS_PER_BATCH, row_groups=[group], columns=wanted))
                for batch in batches:
                    if row + batch.num_rows > position:
                        columns = [batch.column(name) for name in wanted]
                        yield from _rows(columns, self.text_field, self.beside, f"{path}", row, first, position)
                    row += batch.num_rows
        except _Unreadable as error:
            yield row, error.document

    def size_bytes(self) -> int:
        """Bytes of all files."""
        return size_of(self.files)

    def fingerprint(self) -> Any:
        """Names, contents and the columns."""
        return [self.text_field, fingerprint_files(self.files), *self.beside.fingerprint()]


@dataclass(frozen=True)
class ArrowSource:
    """Arrow IPC files (stream or file format), as ``Dataset.save_to_disk`` writes them. Unit: (file,); position: row."""

    files: tuple[Path, ...]
    text_field: str
    beside: Beside = NOTHING

    @staticmethod
    def open(path: str, text_field: str, key: str, beside: Beside = NOTHING) -> ArrowSource:
        """Files of a saved data set (its state.json lists them), or every .arrow file at ``path``."""
        folder = Path(path).expanduser()
        if (folder / "dataset_dict.json").is_file():
            splits = ", ".join(sorted(p.name for p in folder.iterdir() if (p / "state.json").is_file()))
            raise UserError(
                f"{key}: {folder} holds several splits ({splits}); give the folder of one, such as {folder / splits.split(', ')[0]}"
            )
        state = folder / "state.json"
        if not state.is_file():
            return ArrowSource(list_files(path, ".arrow", key), text_field, beside)
        try:
            files = tuple(folder / entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{key}: {state} is damaged: {error!r}") from error
        if absent := [f for f in files if not f.is_file()]:
            raise UserError(f"{key}: {absent[0]} is missing, although {state} lists it")
        return ArrowSource(files, text_field, beside)

    def units(self) -> Sequence[Unit]:
        """One per file."""
        return [(i,) for i in range(len(self.files))]

    def read(self, unit: Unit, position: int = 0) -> Iterator[tuple[int, Item]]:
        """Rows of a file; memory-mapped, so rows before ``position`` cost nothing."""
        path = self.files[unit[0]]
        row = 0
        try:
            with _opened_arrow(path) as (names, batches):
                if missing := _no_column(path, self.text_field, self.beside, names):
                    yield 0, missing
                    return
                for batch in _reading(path, batches):
                    if row + batch.num_rows > position:
                        columns = [_checked(path, batch.column(name)) for name in (self.text_field, *self.beside.keys)]
                        yield from _rows(columns, self.text_field, self.beside, str(path), row, 0, position)
                    row += batch.num_rows
                if row == 0:
                    yield 0, BadDocument("empty", str(path), "the file has no rows")
        except _Unreadable as error:
            yield row, error.document

    def size_bytes(self) -> int:
        """Bytes of all files."""
        return size_of(self.files)

    def fingerprint(self) -> Any:
        """Names, contents and the columns."""
        return [self.text_field, fingerprint_files(self.files), *self.beside.fingerprint()]


@dataclass(frozen=True)
class HubSource:
    """A data set by its hub name (or a local folder in a form that ``load_dataset`` knows). No code of the data set is run.

    Unit: (first row, end); position: row. Streaming: one unit (0, None); going on from a row reads past the rows before it,
    because the library's own resume state is not exact in every version (huggingface/datasets#8308).
    """

    name: str
    config: str | None
    split: str
    text_field: str
    streaming: bool = False
    key: str = "data.path"
    beside: Beside = NOTHING

    def units(self) -> Sequence[Unit]:
        """Ranges of rows."""
        if self.streaming:
            return [(0, None)]
        n = len(self._table)
        return [(i, min(i + _ROWS_PER_UNIT, n)) for i in range(0, n, _ROWS_PER_UNIT)]

    def read(self, unit: Unit, position: int = 0) -> Iterator[tuple[int, Item]]:
        """Rows of a range."""
        names = self._table.column_names
        if names is not None and (missing := _no_column(f"{self.name} ({self.split})", self.text_field, self.beside, names)):
            yield 0, missing
            return
        first, end = unit
        for row, text, values in self._texts(max(first, position), end):
            origin = f"{self.name} ({self.split}) row {row}"
            if isinstance(text, UnicodeDecodeError):
                yield row, BadDocument("invalid_utf8", origin, f"invalid UTF-8 at byte {text.start} of the text")
            else:
                item = check_text(text, origin, f"column {self.text_field!r} holds {type(text).__name__}, not text")
                yield row, self.beside.checked(item, values, origin)

    def _texts(self, start: int, end: int | None) -> Iterator[tuple[int, Any, list[Any]]]:
        """(row, text, what stands beside it) of rows from ``start`` on; a text that cannot be decoded comes as its error."""
        keys = self.beside.keys
        if end is None:
            for row, record in enumerate(self._table.skip(start), start):
                yield row, record.get(self.text_field), [record.get(key) for key in keys]
            return
        table = self._table.select_columns([self.text_field, *keys])
        for row in range(start, end):
            try:
                record = table[row]
                yield row, record[self.text_field], [record[key] for key in keys]
            except UnicodeDecodeError as error:
                yield row, error, []

    def size_bytes(self) -> int:
        """Bytes of the prepared tables; 0 when streaming (not known)."""
        return 0 if self.streaming else self._table.data.nbytes

    def fingerprint(self) -> Any:
        """Name, configuration, split, and the library's fingerprint of the prepared tables."""
        named = [self.name, self.config, self.split, self.text_field, *self.beside.fingerprint()]
        return named if self.streaming else [*named, self._table._fingerprint]

    def __reduce__(self) -> tuple[type, tuple]:
        return HubSource, (self.name, self.config, self.split, self.text_field, self.streaming, self.key, self.beside)  # not the table

    @cached_property
    def _table(self) -> Any:
        import datasets

        name = str(Path(self.name).expanduser()) if Path(self.name).expanduser().exists() else self.name
        try:
            return datasets.load_dataset(name, self.config, split=self.split, streaming=self.streaming)
        except Exception as error:  # the library lets through what its file systems and builders raise
            cause = error.__cause__ or error
            why = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
            where = f"hub_config {self.config}, hub_split {self.split}"
            raise UserError(f"{self.key}: data set {self.name!r} ({where}) cannot be loaded: {why}") from error


class _Unreadable(Exception):
    """A file that is damaged; carries what to report."""

    def __init__(self, path: Path, error: Exception) -> None:
        empty = path.is_file() and path.stat().st_size == 0
        why = (str(error).splitlines() or [type(error).__name__])[0]
        if empty:
            self.document = BadDocument("empty", str(path), "the file is empty")
        else:
            self.document = BadDocument("unreadable", str(path), f"damaged or truncated: {why}")


@contextmanager
def _opened_parquet(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        _ = file.schema_arrow.names  # in a damaged file they need not be text
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _Unreadable(path, error) from error
    with file:
        yield file


@contextmanager
def _opened_arrow(path: Path) -> Iterator[tuple[list[str], Iterator[Any]]]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as mapped:
            try:
                reader = pa.ipc.open_stream(mapped)
                names, batches = reader.schema.names, _stream_batches(path, reader)
            except pa.ArrowInvalid:  # not the stream format: then the file format, which begins with a magic word
                mapped.seek(0)
                file = pa.ipc.open_file(mapped)
                names, batches = file.schema.names, (file.get_batch(i) for i in range(file.num_record_batches))
            yield names, batches
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _Unreadable(path, error) from error


def _stream_batches(path: Path, reader: Any) -> Iterator[Any]:
    """All batches, then the end marker: a stream cut between two batches reads without any error otherwise."""
    yield from reader
    with path.open("rb") as file:
        file.seek(-8, 2)
        if file.read() != b"\xff\xff\xff\xff\0\0\0\0":
            raise OSError("the stream has no end marker")


def _reading(path: Path, batches: Iterator[Any]) -> Iterator[Any]:
    """The batches; an error while one is read becomes _Unreadable."""
    import pyarrow as pa

    try:
        yield from batches
    except (pa.ArrowException, OSError) as error:
        raise _Unreadable(path, error) from error


def _checked(path: Path, column: Any) -> Any:
    """``column``, of which no cell reaches outside of the file: Arrow takes offsets as they stand there, and ends the process."""
    import pyarrow as pa

    try:
        # As bytes: text that is not UTF-8 is a bad document, not a bad file.
        kinds = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
        (column.view(kinds[column.type]) if column.type in kinds else column).validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise _Unreadable(path, error) from error
    return column


def _rows(columns: Sequence[Any], field: str, beside: Beside, path: str, row: int, first: int, position: int) -> Iterator[tuple[int, Item]]:
    """Cells of one batch, texts and what stands beside them. Its first row has position ``row``; ``first`` + position: in the file."""
    column, *others = columns
    for i in range(max(0, position - row), len(column)):
        origin = f"{path} row {first + row + i}"
        try:
            text, values = column[i].as_py(), [other[i].as_py() for other in others]
        except UnicodeDecodeError as error:
            yield row + i, BadDocument("invalid_utf8", origin, f"invalid UTF-8 at byte {error.start} of the text")
            continue
        item = check_text(text, origin, f"column {field!r} holds {'no value' if text is None else column.type}, not text")
        yield row + i, beside.checked(item, values, origin)


def _no_column(path: Path | str, field: str, beside: Beside, names: Sequence[str]) -> Item | None:
    """What to report where a column is missing; None if all are there."""
    if field not in names:
        return BadDocument("missing_text", str(path), f"no column {field!r} (columns: {', '.join(names)}); data.text_field names it")
    return beside.missing(names, str(path))
