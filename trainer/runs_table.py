"""The table behind ``longstride runs``: what the run directories below a root say. Imports no torch, reads only tails.

A run that calls itself running but whose process is gone (killed, power lost) is shown as died; on another machine or in
another container it cannot be seen and keeps its word.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from trainer.console import GIB, duration
from trainer.run_dir import RunDir

TAIL_BYTES = 32 * 1024


@dataclass(frozen=True)
class RunRow:
    """One run."""

    name: str
    path: Path
    status: str
    """running, stopped, done, failed, died (process gone), or unknown (no readable state.json)."""
    step: int
    total_steps: int
    """0 if not known."""
    train_loss: float | None
    valid_loss: float | None
    tokens_per_second: float | None
    mfu: float | None
    memory_peak_bytes: int | None
    memory_budget_bytes: int | None
    checkpoint_step: int | None
    """Newest published checkpoint (not verified here)."""
    checkpoint_time: float | None
    """Unix time in seconds of its directory."""
    updated: float
    """Unix time in seconds of the last sign of life."""
    reason: str
    job: str = ""
    """Number of its last Slurm job."""
    nodes: str = ""
    """Where that job runs, or ran last."""


def is_run(path: Path) -> bool:
    """Whether ``path`` is a run directory."""
    run = RunDir(path)
    return path.is_dir() and any(file.is_file() for file in (run.state, run.config, run.metrics))


def read_runs(root: Path | str) -> list[RunRow]:
    """Rows of all runs directly below ``root`` (or of ``root`` itself if it is a run), the most recently active last."""
    path = Path(root)
    if is_run(path):
        return [read_run(path)]
    if not path.is_dir():
        return []
    return sorted((read_run(entry) for entry in path.iterdir() if is_run(entry)), key=lambda row: (row.updated, row.name))


def read_run(path: Path) -> RunRow:
    """One run's row; files that are missing or damaged leave their columns empty."""
    run = RunDir(path)
    state = run.read_state()
    train, valid = _last_records(run.metrics)
    status = state.status if state else "unknown"
    if state and state.status == "running" and state.process.is_dead():
        status = "died"
    checkpoints = run.checkpoint_steps()
    step = max(state.step if state else 0, int(train.get("step", 0)) if status in ("running", "died", "unknown") else 0)
    return RunRow(
        name=path.resolve().name,
        path=path,
        status=status,
        step=step,
        total_steps=state.total_steps if state else 0,
        train_loss=_number(train.get("loss")),
        valid_loss=_number(valid.get("loss")),
        tokens_per_second=_number(train.get("tokens_per_second")),
        mfu=_number(train.get("mfu")),
        memory_peak_bytes=_integer(train.get("memory_peak_bytes")),
        memory_budget_bytes=_integer(train.get("memory_budget_bytes")),
        checkpoint_step=checkpoints[-1] if checkpoints else None,
        checkpoint_time=(_modified(run.checkpoint(checkpoints[-1])) or None) if checkpoints else None,
        updated=max(state.updated if state else 0.0, _modified(run.metrics)),
        reason="process is gone; resume it" if status == "died" else (state.reason if state else "no readable state.json"),
    )


def _last_records(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Newest train and valid record in the last TAIL_BYTES of the file; {} where there is none."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - TAIL_BYTES))
            lines = stream.read().splitlines()
    except OSError:
        return {}, {}
    return _last_of(lines, "train"), _last_of(lines, "valid")


def _last_of(lines: list[bytes], split: str) -> dict[str, Any]:
    word = f'"{split}"'.encode()
    for line in reversed(lines):
        if word in line:  # most lines need no parsing
            try:
                record = json.loads(line)
            except ValueError:  # torn
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int) and record.get("split") == split:
                return record
    return {}


def _number(value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


LEAST_NEEDED = ("active", "valid", "MFU", "nodes", "tokens/s", "mem GiB")
"""Columns that a narrow terminal does without, the first one first."""
COLUMNS = ("run", "status", "step", "loss", "valid", "tokens/s", "MFU", "mem GiB", "saved", "active", "job", "nodes", "note")


def _cells(row: RunRow, now: float) -> tuple[str, ...]:
    return (
        row.name,
        row.status,
        f"{row.step}/{row.total_steps}" if row.total_steps else str(row.step),
        _text(row.train_loss, ".4f"),
        _text(row.valid_loss, ".4f"),
        _text(row.tokens_per_second, ",.0f"),
        _text(row.mfu, ".1%"),
        _memory(row),
        _text(row.checkpoint_step, "d") + (f", {_ago(row.checkpoint_time, now)}" if row.checkpoint_time else ""),
        _ago(row.updated, now) if row.updated else "-",
        row.job or "-",
        row.nodes or "-",
        row.reason,
    )


def _memory(row: RunRow) -> str:
    """Measured peak, and what it may be at most: ``70.10/72.00``."""
    if not row.memory_peak_bytes:
        return "-"
    return f"{row.memory_peak_bytes / GIB:.2f}" + (f"/{row.memory_budget_bytes / GIB:.2f}" if row.memory_budget_bytes else "")


def _ago(when: float, now: float) -> str:
    return f"{duration(max(0.0, now - when))} ago"


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


_COLORS = {"running": "green", "done": "cyan", "stopped": "yellow", "failed": "red", "died": "red", "unknown": "dim"}


def render(rows: list[RunRow], stream: TextIO | None = None, *, now: float | None = None) -> None:
    """Print rows: a coloured table on a terminal, with notes that do not fit on lines of their own; tab-separated lines with a header line
    in a pipe (never cut off)."""
    console = Console(file=stream)
    cells = [_cells(row, time.time() if now is None else now) for row in rows]
    if not console.is_terminal:
        for line in (COLUMNS, *cells):
            console.file.write("\t".join(line) + "\n")
        return
    names = _fitting(cells, console.width)
    places = [COLUMNS.index(name) for name in names]
    widths = [max(len(line[place]) for line in (COLUMNS, *cells)) for place in places]

    def columns(line: tuple[str, ...]) -> str:
        return "  ".join(line[place].ljust(width) for place, width in zip(places, widths, strict=True))

    console.print(Text(columns(COLUMNS), style="bold"), soft_wrap=True)
    for row, line in zip(rows, cells, strict=True):
        text, note, style = columns(line), line[-1], _COLORS.get(row.status, "")
        beside = len(text) + 2 + len(note) <= console.width
        console.print(Text(f"{text}  {note}" if beside else text.rstrip(), style=style), soft_wrap=True)
        if not beside:
            console.print(Padding(Text(note, style=style), (0, 0, 0, 4)))


def _fitting(cells: list[tuple[str, ...]], width: int) -> list[str]:
    """The columns of a terminal that wide, notes not counted: those that say something, without the least needed if they are too many."""
    names = [name for i, name in enumerate(COLUMNS[:-1]) if any(line[i] != "-" for line in cells)]

    def needed() -> int:
        return sum(2 + max(len(line[COLUMNS.index(name)]) for line in (COLUMNS, *cells)) for name in names) - 2

    for name in LEAST_NEEDED:
        if needed() > width and name in names:
            names.remove(name)
    return names
