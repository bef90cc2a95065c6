"""The clock and the step at the beginning of every line of a log. Imports no torch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, TextIO

_STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?: step \d+)? \| ")
_step: int | None = None


def at_step(step: int) -> None:
    """From now on lines of this process say ``step``, the last one that is finished."""
    global _step
    _step = step


def stamp() -> str:
    """``2026-11-21 10:15:02 step 37 | ``; no step before there is one. Local time, as Slurm's own log has."""
    return time.strftime("%Y-%m-%d %H:%M:%S") + (f" step {_step}" if _step is not None else "") + " | "


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
