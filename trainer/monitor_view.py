"""One run at a glance: how it stands, its loss as a curve of characters, its speed, its memory, the end of its log. Imports no torch.

Reads only the tails of files, so a run of a million steps is shown as fast as one of ten.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from trainer.console import GIB, duration, memory_fact
from trainer.metrics_file import decode_record
from trainer.run_dir import RunDir
from trainer.runs_table import RunRow

TAIL_BYTES = 512 * 1024
LOG_BYTES = 16 * 1024
LOG_LINES = 8
RANKS_SHOWN = 4
RECENT_STEPS = 50
"""Over which speed is a median."""
WIDTH = 60
_BARS = "▁▂▃▄▅▆▇█"
STATUS_STYLE = {"running": "green", "done": "green", "failed": "red", "died": "red", "queued": "yellow", "starting": "yellow"}
"""Colours on a terminal."""


@dataclass(frozen=True)
class View:
    """What is shown, in order."""

    title: str
    facts: list[tuple[str, str]]
    log_name: str
    log: list[str]


def view(row: RunRow, *, now: float | None = None) -> View:
    """The run of ``row``; what is not known is left out."""
    run_dir = RunDir(row.path)
    records = read_tail(run_dir.metrics)
    train = [record for record in records if record.get("split") == "train"]
    valid = [record for record in records if record.get("split") == "valid"]
    facts = [("status", row.status + (f": {row.reason}" if row.reason else "")), ("step", _step(row, train))]
    if train:
        losses = [value for record in train if (value := number(record, "loss")) is not None]
        first, last = train[0]["step"], train[-1]["step"]
        facts += [("loss", _loss(train)), (f"{first} to {last}", sparkline(losses, WIDTH)), ("speed", _speed(train))]
        if isinstance(train[-1].get("memory_peak_bytes"), int):
            facts.append(("memory", memory_fact(train[-1]).removeprefix("mem ")))
    if valid and (held_out := number(valid[-1], "loss")) is not None:
        facts.append(("held-out", f"loss {held_out:.4f} at step {valid[-1]['step']}"))
    facts += [("ranks" if i == 0 else "", line) for i, line in enumerate(rank_lines(run_dir))]
    facts.append(("saved", _saved(run_dir, row, time.time() if now is None else now)))
    log = newest_log(run_dir)
    return View(row.name, facts, str(log.relative_to(run_dir.path)) if log else "", _last_lines(log) if log else [])


def plain(shown: View) -> str:
    """Lines for a pipe or a file."""
    width = max(len(name) for name, _ in shown.facts)
    lines = [shown.title, *(f"{name:<{width}}  {text}" for name, text in shown.facts)]
    return "\n".join([*lines, *([f"--- {shown.log_name}", *shown.log] if shown.log_name else [])])


def render(shown: View) -> Group:
    """The same for a terminal."""
    table = Table.grid(padding=(0, 2))
    for name, text in shown.facts:
        first = text.split(":")[0]
        style = STATUS_STYLE.get(first, "") if name == "status" else "cyan" if text and set(text) <= {*_BARS, "!"} else ""
        table.add_row(Text(name, style="dim"), Text(text, style=style))
    parts = [Panel(table, title=Text(shown.title), title_align="left")]
    if shown.log_name:
        parts.append(Panel(Text("\n".join(shown.log), no_wrap=True, overflow="ellipsis"), title=Text(shown.log_name), title_align="left"))
    return Group(*parts)


def sparkline(values: Sequence[float], width: int) -> str:
    """At most ``width`` bars from the smallest to the largest of ``values``, several values in one bar by their mean; a value that is not
    finite is ``!``."""
    count = min(width, len(values))
    groups = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    means = [statistics.fmean(group) for group in groups]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return "!" * count
    low, spread = min(finite), max(finite) - min(finite)

    def bar(mean: float) -> str:
        if not math.isfinite(mean):
            return "!"
        return _BARS[min(len(_BARS) - 1, int((mean - low) / spread * len(_BARS)))] if spread > 0 else _BARS[0]

    return "".join(map(bar, means))


def read_tail(path: Path, size: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """The whole records in the last ``size`` bytes of metrics.jsonl; none where there is no file."""
    return [record for line in _tail(path, size).splitlines(keepends=True) if (record := decode_record(line)) is not None]


def newest_log(run_dir: RunDir) -> Path | None:
    """Rank 0's log of the latest attempt, or of the run where nobody counts attempts."""
    found = [*sorted(run_dir.logs.glob("attempt_*/rank_0.log"), key=lambda path: (len(path.parent.name), path))[-1:], run_dir.log(0)]
    return next((path for path in found if path.is_file()), None)


def rank_lines(run_dir: RunDir) -> list[str]:
    """The last report of the ranks: each of a few, the slowest of many, and how they compare; nothing where there is none."""
    try:
        report = json.loads(run_dir.ranks.read_bytes())
        ranks = sorted(
            ((float(r["own_seconds"]), int(r["rank"]), str(r["host"]), r) for r in report["ranks"]), reverse=True, key=lambda r: r[:2]
        )
        median = statistics.median(seconds for seconds, *_ in ranks)
        shown = ranks if len(ranks) <= RANKS_SHOWN else ranks[:RANKS_SHOWN]
        lines = [
            f"{rank} on {host}: {seconds:.3g} s of own work"
            + (f", {seconds / median:.1f}x" if median > 0 and len(ranks) > 1 else "")
            + f", {int(r['resident_bytes']) / GIB:.2f} GiB resident"
            + (f", {int(r['device_bytes']) / GIB:.2f} on the device" if r["device_bytes"] else "")
            + (", slow" if r["slow_reports"] else "")
            for seconds, rank, host, r in sorted(shown, key=lambda r: r[1])
        ]
        more = [f"the slowest {RANKS_SHOWN} of {len(ranks)}, at step {int(report['step'])}"] if len(ranks) > len(shown) else []
        return [*more, *lines]
    except (OSError, ValueError, KeyError, TypeError, statistics.StatisticsError):
        return []


def number(record: dict[str, Any], name: str) -> float | None:
    """A value of a record as a number (metrics.jsonl writes those that JSON lacks as text); None where it is none."""
    value = record.get(name)
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def _step(row: RunRow, train: list[dict[str, Any]]) -> str:
    text = f"{row.step} of {row.total_steps}" if row.total_steps else str(row.step)
    if row.total_steps:
        text += f" ({100 * row.step / row.total_steps:.0f}%)"
    seconds = [value for record in train[-RECENT_STEPS:] if (value := number(record, "step_seconds")) is not None]
    if row.status == "running" and seconds and row.step < row.total_steps:
        text += f", {duration(statistics.median(seconds) * (row.total_steps - row.step))} to go"
    return text


def _loss(train: list[dict[str, Any]]) -> str:
    names = {"loss": ".4f", "grad_norm": ".3g", "lr": ".3g"}
    values = {name: number(train[-1], name) for name in names}
    return ", ".join(f"{'' if name == 'loss' else name + ' '}{value:{names[name]}}" for name, value in values.items() if value is not None)


def _speed(train: list[dict[str, Any]]) -> str:
    parts = []
    for name, form in (("tokens_per_second", "{:,.0f} tokens/s"), ("mfu", "MFU {:.1%}"), ("step_seconds", "{:.3g} s a step")):
        values = [value for record in train[-RECENT_STEPS:] if (value := number(record, name)) is not None]
        if values:
            parts.append(form.format(statistics.median(values)))
    return ", ".join(parts)


def _saved(run_dir: RunDir, row: RunRow, now: float) -> str:
    if row.checkpoint_step is None:
        return "no checkpoint yet"
    try:
        age = now - run_dir.checkpoint(row.checkpoint_step).stat().st_mtime
    except OSError:
        return f"step {row.checkpoint_step}"
    return f"step {row.checkpoint_step}, {duration(max(0.0, age))} ago"


def _last_lines(path: Path) -> list[str]:
    lines = _tail(path, LOG_BYTES).decode("utf-8", "replace").splitlines()[-LOG_LINES:]
    return ["".join(char if char.isprintable() else " " for char in line) for line in lines]


def _tail(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as stream:
            length = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, length - size))
            return stream.read()
    except OSError:
        return b""
