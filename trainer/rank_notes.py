"""What each rank leaves when it ends by itself, for whoever started it: one small file beside its log. Imports no torch.

A rank that was killed leaves none; that is how its end is told from a refusal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from trainer.run_dir import RunDir, write_atomic


@dataclass(frozen=True)
class RankNote:
    """The end of one rank."""

    code: int
    """Exit code: 0 done, 75 stopped with everything saved, others failed."""
    reason: str = ""
    """One line; empty when done."""
    refused: bool = False
    """It would fail the same way again: settings, data, a loss that is not finite, a checkpoint that cannot be written."""
    signal_number: int = 0
    """Signal after which it saved; 0 if none."""
    step: int = 0
    """Last finished step, where it is known."""


def write_note(run_dir: RunDir, attempt: int, rank: int, note: RankNote) -> None:
    """Leave ``note``; a full disk does not turn one end into another."""
    with contextlib.suppress(OSError):
        _path(run_dir, attempt, rank).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(_path(run_dir, attempt, rank), (json.dumps(dataclasses.asdict(note)) + "\n").encode())


def read_notes(run_dir: RunDir, attempt: int) -> dict[int, RankNote]:
    """By rank; ranks without a readable note are left out."""
    found = {}
    for path in run_dir.log(0, attempt).parent.glob("rank_*.end"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found[int(path.stem.removeprefix("rank_"))] = RankNote(**json.loads(path.read_bytes()))
    return found


def _path(run_dir: RunDir, attempt: int, rank: int) -> Path:
    return run_dir.log(rank, attempt).with_suffix(".end")
