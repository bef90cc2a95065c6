"""Data that a guard took out of training: ``passed_over.jsonl`` in the run directory, one line per intervention. Imports no torch.

A line is on disk before what it says takes effect. A run that is resumed, from whatever checkpoint, passes over the same sequences, so it
repeats the run bit for bit; and anybody can see which tokens were left out, and why. Nothing is ever taken out of this file.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PassedOver:
    """Sequences ``first`` up to, not including, ``end`` of the run's numbering (``data_cursor.sequences``)."""

    first: int
    end: int
    step: int
    """The step that was being made of them."""
    action: str
    """skip_step or rollback."""
    back_to: int | None
    """Step of the checkpoint that training went back to."""
    reason: str


class PassedOverList:
    """All interventions of a run. Every rank holds the same; one of them writes (``write``), then all ``add``."""

    def __init__(self, entries: list[PassedOver]) -> None:
        self.entries = entries

    def covers(self, first: int, end: int) -> bool:
        """Whether any of the sequences [first, end) is to be passed over."""
        return any(entry.first < end and first < entry.end for entry in self.entries)

    def skipped_before(self, first: int) -> int:
        """Skipped steps in a row that end where sequence ``first`` begins."""
        by_end = {entry.end: entry for entry in self.entries if entry.action == "skip_step"}
        count = 0
        while (entry := by_end.get(first)) is not None:
            count, first = count + 1, entry.first
        return count

    def rollbacks_to(self, step: int) -> int:
        """How often training went back to the checkpoint of ``step``."""
        return sum(entry.back_to == step for entry in self.entries)

    def add(self, entry: PassedOver) -> None:
        """Take note in this process."""
        self.entries.append(entry)


def read(path: Path) -> list[PassedOver]:
    """All whole lines; a torn one was never acted on."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [entry for line in lines if (entry := _parse(line)) is not None]


def write(path: Path, entry: PassedOver, **facts: Any) -> None:
    """Append a line, synced; ``facts`` stand in it for people. Raises OSError."""
    line = json.dumps({**asdict(entry), **facts, "time": time.time()}) + "\n"
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("ab") as stream:
        stream.write((("\n" if torn else "") + line).encode())
        stream.flush()
        os.fsync(stream.fileno())


def _parse(line: bytes) -> PassedOver | None:
    try:
        record = json.loads(line)
        back_to = record["back_to"]
        return PassedOver(
            int(record["first"]), int(record["end"]), int(record["step"]), str(record["action"]),
            None if back_to is None else int(back_to), str(record["reason"]),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError):
        return None
