"""What an evaluation found: a table, a JSON file and a picture, depth by length. Imports no torch, and matplotlib only when it draws."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.evals.scoring import total
from trainer.run_dir import write_atomic

if TYPE_CHECKING:
    from trainer.evals.suites import TaskResult

METHOD = (
    "teacher-forced: the model reads the true tokens, and its most likely next token is compared with the answer's; "
    "a question counts when all tokens of its answer are right"
)
INK, MUTED = "#22262b", "#6b7280"


def lines(result: TaskResult) -> list[str]:
    """A table for people: one line per length."""
    depths = list(dict.fromkeys(cell.depth for cell in result.cells))
    chance = f"guessing: {_percent(result.chance)}, tokens {_percent(result.token_chance)}"
    head = ["length", "answered", "tokens", "questions", *(f"depth {depth:g}" for depth in depths), "memory", "tokens/s"]
    rows = []
    for length in result.seconds:
        whole = total(result.cells, length)
        cells = [cell for cell in result.cells if cell.length == length]
        speed = result.tokens_read[length] / result.seconds[length]
        values = [_percent(whole.accuracy), _percent(whole.token_accuracy), f"{whole.questions:,}"]
        memory = f"{result.peak_bytes[length] / 2**20:,.0f} MiB"
        rows.append([f"{length:,}", *values, *(_percent(cell.accuracy) for cell in cells), memory, f"{speed:,.0f}"])
    return [f"{result.task} ({chance})", *aligned([head, *rows])]


def content(result: TaskResult, **facts: Any) -> dict[str, Any]:
    """The JSON-able whole."""
    cells = [asdict(cell) | {"accuracy": cell.accuracy, "token_accuracy": cell.token_accuracy} for cell in result.cells]
    return {**facts, **asdict(result), "cells": cells, "method": METHOD}


def heat_map(result: TaskResult, title: str) -> bytes:
    """A PNG: accuracy by depth (down) and length (across); ``title`` in short lines."""
    from matplotlib.figure import Figure

    depths = list(dict.fromkeys(cell.depth for cell in result.cells))
    lengths = list(result.seconds)
    found = {(cell.depth, cell.length): cell for cell in result.cells}
    share = np.array([[_number(found[depth, length].accuracy) for length in lengths] for depth in depths])
    figure = Figure(figsize=(max(5.2, 2.6 + 0.85 * len(lengths)), 2.1 + 0.42 * len(depths)), layout="constrained", dpi=140)
    axes = figure.subplots()
    axes.set_facecolor("#eceef1")  # where nothing was asked
    image = axes.imshow(np.ma.masked_invalid(share), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(lengths)), [short(length) for length in lengths], color=INK)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], color=INK)
    axes.set_xlabel("tokens of the sample", color=MUTED)
    axes.set_ylabel("depth of the fact", color=MUTED)
    axes.tick_params(length=0)
    for (row, column), value in np.ndenumerate(share):
        if not np.isnan(value):
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=8, color="black" if value > 0.6 else "white")
    for side in axes.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1], format=lambda x, _: f"{x:.0%}")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def write(folder: Path, name: str, record: dict[str, Any], picture: bytes) -> Path:
    """``NAME.json`` and ``NAME.png`` in ``folder``, or NAME_2 and on where such files are: nothing is replaced. The JSON file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    free, number = name, 1
    while (folder / f"{free}.json").exists() or (folder / f"{free}.png").exists():
        number += 1
        free = f"{name}_{number}"
    write_atomic(folder / f"{free}.png", picture)
    write_atomic(folder / f"{free}.json", (json.dumps(record, indent=2) + "\n").encode())
    return folder / f"{free}.json"


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{share:.1%}" if share >= 0.001 or share == 0 else f"{share:.0e}"


def _number(share: float | None) -> float:
    return float("nan") if share is None else share


def short(length: int) -> str:
    """``65536`` as ``64k``."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if length % size == 0:
            return f"{length // size}{unit}"
    return f"{length:,}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines, columns to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
