"""What a person sees of a running run: a live bar on a terminal, the same facts as plain lines in a pipe and in the log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from parallel.log_lines import beside

GIB = 1 << 30


def facts(record: Mapping[str, Any]) -> str:
    """One line of a metrics record: loss, rates and memory; what the record lacks is left out.

    ``loss 2.3456 | 5,912 tokens/s | MFU 38.1% | mem 1.2 of 4.0 GiB, planned 1.1``
    """
    parts = [f"loss {float(record['loss']):.4f}"] if "loss" in record else []
    if record.get("grad_norm") is not None:
        parts.append(f"grad {float(record['grad_norm']):.3g}")
    if record.get("lr") is not None:
        parts.append(f"lr {float(record['lr']):.3g}")
    if record.get("tokens_per_second"):
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if record.get("mfu") is not None:
        parts.append(f"MFU {100 * record['mfu']:.1f}%")
    if record.get("memory_peak_bytes"):
        parts.append(memory_fact(record))
    return " | ".join(parts)


def memory_fact(record: Mapping[str, Any]) -> str:
    """``mem 70.1 of 72.0 GiB, planned 69.4``; budget and plan only where they are known."""
    budget, planned = record.get("memory_budget_bytes"), record.get("memory_planned_bytes")
    text = f"mem {record['memory_peak_bytes'] / GIB:.2f}" + (f" of {budget / GIB:.2f} GiB" if budget else " GiB")
    return text + (f", planned {planned / GIB:.2f}" if planned else "")


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class RunConsole:
    """Progress of one run on rank 0; on other ranks (``enabled=False``) silent.

    A console that is closed under it (a broken pipe) never stops training.
    """

    def __init__(
        self, total_steps: int, start_step: int = 0, *, enabled: bool = True, stream: TextIO | None = None, plain_every_seconds: float = 1.0
    ) -> None:
        """``plain_every_seconds``: plain lines come at most this often (the first, the last and notes always)."""
        self.total_steps = total_steps
        self.start_step = start_step
        self.enabled = enabled
        self._stream, self._open = stream or sys.stdout, True
        self._every = plain_every_seconds
        self._printed: float | None = None
        self._began: tuple[float, int] | None = None
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if enabled and self._stream.isatty():
            self._start_bar()

    def step(self, record: Mapping[str, Any]) -> None:
        """Show the record of one training step."""
        if not self.enabled:
            return
        step, now = int(record["step"]), time.monotonic()
        if self._progress is not None:
            self._progress.update(self._task, completed=step, facts=facts(record))
        if self._printed is None or step >= self.total_steps or now - self._printed >= self._every:
            self._printed = now
            line = f"step {step}/{self.total_steps} | {facts(record)}{self._eta(step, now)}"
            beside(line)
            if self._progress is None:
                self._line(line)
        self._began = self._began or (now, step)

    def valid(self, record: Mapping[str, Any]) -> None:
        """Show the record of one evaluation on held-out data."""
        self.note(f"valid at step {record['step']} | {facts({key: record[key] for key in ('loss', 'tokens_per_second') if key in record})}")

    def note(self, text: str) -> None:
        """One line of its own, above the bar."""
        if not self.enabled:
            return
        beside(text)
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._line(text)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _start_bar(self) -> None:
        progress = Progress(
            TextColumn("step {task.completed}/{task.total}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}", markup=False),
            TextColumn("| ETA", markup=False),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=Console(file=self._stream),
            refresh_per_second=4,
        )
        self._task = progress.add_task("train", total=self.total_steps, completed=self.start_step, facts="")
        progress.start()
        self._progress = progress

    def _eta(self, step: int, now: float) -> str:
        """Remaining time from the pace since the second step seen (the first one warms up)."""
        if self._began is None or step <= self._began[1] or step >= self.total_steps:
            return ""
        return f" | ETA {duration((now - self._began[0]) / (step - self._began[1]) * (self.total_steps - step))}"

    def _line(self, text: str) -> None:
        try:
            if self._open:
                print(text, file=self._stream, flush=True)
        except (OSError, ValueError):  # reader gone: the record is in metrics.jsonl
            self._open = False
