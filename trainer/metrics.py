"""The record of a run: metrics.jsonl is the truth, TensorBoard shows the same numbers.

One JSON object per line, with at least step, split (train or valid), loss, tokens, tokens_per_second and
memory_peak_bytes; floats in full precision (they read back bit-identical), numbers that JSON lacks as the text "NaN",
"Infinity" or "-Infinity" (``float()`` reads them). A record is in the file when ``write`` returns.

A disk that is full or gone costs records, never the run: the writer warns once and tries again at the next record.
"""

from __future__ import annotations

import errno
import io
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.metrics_file import decode_record, encode_record
from trainer.run_dir import RunDir, write_atomic


def repair(path: Path, last_step: int) -> int:
    """Remove records after ``last_step`` and lines that a crash tore; the number of lines removed.

    The steps after the checkpoint that is resumed from are run again: their old records would be doubled. Usually only
    the end is cut (one atomic truncation); a bad line further up makes the file be rewritten and renamed.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return 0
    lines = io.BytesIO(data).readlines()
    kept = [line for line in lines if (record := decode_record(line)) is not None and record["step"] <= last_step]
    text = b"".join(kept)
    if text == data:
        return 0
    if data.startswith(text):
        with path.open("r+b") as stream:
            stream.truncate(len(text))
            os.fsync(stream.fileno())
    else:
        write_atomic(path, text)
    return len(lines) - len(kept)


class MetricsWriter:
    """Appends records to metrics.jsonl and TensorBoard. Made on every rank; only rank 0's writes."""

    def __init__(self, run_dir: RunDir, start_step: int = 0, *, enabled: bool = True, tensorboard: bool = True) -> None:
        """``start_step``: step of the checkpoint that is resumed from, 0 when training starts at the beginning. Records
        after it are removed (from the beginning: all, those of step 0 too).

        ``enabled``: False on every rank but 0.
        """
        self.path = run_dir.metrics
        self._tensorboard = run_dir.tensorboard if tensorboard else None
        self._enabled = enabled
        self._stream: Any = None
        self._length = 0
        self._warned = False
        self._board: Any = None
        if enabled:
            self._open(start_step)

    def rewind(self, step: int) -> None:
        """Go on after ``step``: what was recorded later is removed here and hidden in TensorBoard, as when a run is resumed there."""
        if self._enabled:
            self.close()
            self._open(step)

    def _open(self, start_step: int) -> None:
        try:
            repair(self.path, start_step or -1)
            self._stream = self.path.open("ab", buffering=0)
            self._length = self._stream.seek(0, os.SEEK_END)
        except OSError as error:
            self._warn(error)
        if self._tensorboard is not None:
            self._open_board(self._tensorboard, start_step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; needs ``step`` and ``split``. Never raises for the disk."""
        if self._stream is not None:
            self._append(encode_record(record))
        if self._board is not None:
            self._show(record)

    def close(self) -> None:
        """Flush and close; records written before are safe without it."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        board, self._board = self._board, None
        if board is not None:
            try:
                board.close()
            except OSError as error:
                self._warn(error)

    def _append(self, line: bytes) -> None:
        try:
            written = self._stream.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._length += len(line)
        except OSError as error:
            self._warn(error)
            self._cut_back()

    def _cut_back(self) -> None:
        """Half a line must not stay in front of the next one."""
        try:
            self._stream.truncate(self._length)
        except OSError as error:
            self._warn(error)

    def _open_board(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # lazily: 2.5 seconds

        try:
            earlier = list(folder.glob("events.out.tfevents.*")) if folder.is_dir() else []
            _wait_for_later_name(earlier)
            # purge_step hides the events of the steps that are run again
            self._board = SummaryWriter(str(folder), purge_step=(start_step + 1 if start_step else 0) if earlier else None)
        except OSError as error:
            self._warn(error)

    def _show(self, record: Mapping[str, Any]) -> None:
        try:
            for name, value in _scalars(record):
                self._board.add_scalar(f"{record['split']}/{name}", value, record["step"])
            self._board.flush()
        except OSError as error:  # its writer thread is dead then, so TensorBoard ends here; metrics.jsonl goes on
            self._board = None
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"cannot write metrics below {self.path.parent}: {error.strerror or error}; training goes on", RuntimeWarning, stacklevel=3
            )


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a record by name, those in nested dicts (the data position) as ``outer/inner``."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and f"{prefix}{key}" != "step":
            yield f"{prefix}{key}", value


def _wait_for_later_name(earlier: list[Path]) -> None:
    """Event files are read in the order of their names, which begin with the second they were made in: at most one second."""
    seconds = [int(part) for path in earlier if (part := path.name.split(".")[3]).isdigit()]
    newest = max(seconds, default=0)
    while int(time.time()) == newest:
        time.sleep(0.02)
