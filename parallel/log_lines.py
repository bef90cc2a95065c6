"""The clock and the step at the beginning of every line of a log, and what reaches a log although it is not printed. Imports no torch."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from typing import Any, TextIO

_STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?: step \d+)? \| ")
_step: int | None = None
_beside: TextIO | None = None
_native = 2


def at_step(step: int) -> None:
    """From now on lines of this process say ``step``, the last one that is finished."""
    global _step
    _step = step


def stamp() -> str:
    """``2026-11-21 10:15:02 step 37 | ``; no step before there is one. Local time, as Slurm's own log has."""
    return time.strftime("%Y-%m-%d %H:%M:%S") + (f" step {_step}" if _step is not None else "") + " | "


def write_beside(log: TextIO | None) -> None:
    """From now on ``beside`` writes to ``log``: where a terminal shows a moving bar, its lines would not be in a log."""
    global _beside
    _beside = log


def beside(text: str) -> None:
    """A line for the log beside a terminal, if there is one."""
    if _beside is not None:
        with contextlib.suppress(OSError):  # a full disk must not end a run
            _beside.write(f"{text}\n")


def native_lines_to(descriptor: int) -> None:
    """Where the log is for what is not written through Python's streams, such as the stacks of all threads; 2, the error stream, where that
    is the log itself."""
    global _native
    _native = descriptor


def native_descriptors() -> set[int]:
    """The error stream and the log, which may be the same."""
    return {2, _native}


def without_stamp(line: str) -> str:
    """What was written."""
    return _STAMP.sub("", line)


class Stamped:
    """A text stream each of whose lines begins with a stamp; for everything else it is ``stream``."""

    def __init__(self, stream: TextIO, stamp: Callable[[], str] = stamp) -> None:
        self._stream, self._stamp = stream, stamp
        self._at_start = True

    def write(self, text: str) -> int:
        lines = text.splitlines(keepends=True)
        self._stream.write("".join((self._stamp() if i or self._at_start else "") + line for i, line in enumerate(lines)))
        if lines:
            self._at_start = lines[-1].endswith("\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
