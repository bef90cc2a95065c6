"""Loss by position in long documents: whether a model makes use of what lies further back.

The first ``length`` tokens of held-out documents that have so many are read, each document from its own beginning, and the loss of every
token is added up by its position, in buckets that double in width. Where more context helps, later buckets have a lower loss.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from memory_mgmt.monitor import MemoryMonitor
from models.errors import UserError
from trainer.config import RunConfig
from trainer.data.build import build_data
from trainer.data.loader import StoredSequences
from trainer.evals.loading import alone
from trainer.evals.report import INK, MUTED, aligned, short
from trainer.evals.scoring import TOKENS_AT_ONCE
from trainer.evals.streaming import StreamedModel

FIRST_BUCKET = 64


@dataclass(frozen=True)
class Bucket:
    """Tokens at positions [start, end) of documents of one length."""

    length: int
    start: int
    end: int
    loss: float
    """Mean in nats."""
    tokens: int


@dataclass
class PositionResult:
    """Loss by position at all lengths."""

    task: str = "position"
    buckets: list[Bucket] = field(default_factory=list)
    documents: dict[int, int] = field(default_factory=dict)
    """By length: documents read."""
    seconds: dict[int, float] = field(default_factory=dict)
    peak_bytes: dict[int, int] = field(default_factory=dict)
    """By length: memory above that of the loaded model."""
    memory_source: str = ""


def bucket_edges(length: int) -> list[int]:
    """0, 64, 128, 256 ... and ``length``."""
    edges = [0]
    while (following := max(FIRST_BUCKET, 2 * edges[-1])) < length:
        edges.append(following)
    return [*edges, length]


def long_documents(config: RunConfig, data_path: str | None, length: int, count: int) -> list[np.ndarray]:
    """The first ``length`` + 1 tokens of up to ``count`` held-out documents, spread evenly over those that are long enough.

    Raises UserError where there is none."""
    held_out = build_data(alone(config, data_path)).held_out
    if not isinstance(held_out, StoredSequences):
        raise UserError("--suite position: reads held-out documents, and this run has none; give --data PATH, or leave it out")
    tokens = held_out.store.documents["tokens"][held_out.documents]
    fits = np.flatnonzero(tokens > length)
    if len(fits) == 0:
        raise UserError(
            f"--suite position: no held-out document has {length + 1:,} tokens, the longest has {tokens.max():,}; "
            "ask for shorter --lengths, or give --data PATH"
        )
    chosen = [fits[i * len(fits) // count] for i in range(count)] if count < len(fits) else list(fits)
    return [np.array(held_out.store.read(int(held_out.documents[i]), 0, length + 1), dtype=np.int64) for i in chosen]


def loss_by_position(
    reader: StreamedModel,
    documents_of: Callable[[int], list[np.ndarray]],
    lengths: Sequence[int],
    device: torch.device,
) -> PositionResult:
    """Over the documents that ``documents_of`` gives for each length."""
    result, monitor = PositionResult(), MemoryMonitor(device)
    result.memory_source = monitor.source
    for length in lengths:
        if refused := reader.refused(length):
            raise UserError(refused)
    for length in lengths:
        documents, begun = documents_of(length), time.perf_counter()
        monitor.reset()
        result.buckets += _buckets(reader, documents, length)
        result.documents[length], result.seconds[length] = len(documents), time.perf_counter() - begun
        result.peak_bytes[length] = monitor.peak_bytes()
    return result


def _buckets(reader: StreamedModel, documents: list[np.ndarray], length: int) -> list[Bucket]:
    edges = bucket_edges(length)
    sums = np.zeros(len(edges) - 1)
    at_once = max(1, TOKENS_AT_ONCE // length)
    for first in range(0, len(documents), at_once):
        rows = np.stack(documents[first : first + at_once])
        for start, end, nll_BT in reader.losses(rows[:, :-1], rows[:, 1:]):
            of_token = np.searchsorted(edges, np.arange(start, end), side="right") - 1
            np.add.at(sums, of_token, nll_BT.double().sum(0).cpu().numpy())
    found = []
    for i, total in enumerate(sums):
        tokens = (edges[i + 1] - edges[i]) * len(documents)
        found.append(Bucket(length, edges[i], edges[i + 1], float(total) / tokens, tokens))
    return found


def lines(result: PositionResult) -> list[str]:
    """A table for people: positions down, lengths across."""
    lengths = list(result.seconds)
    head = ["positions", *(f"{length:,} tokens" for length in lengths)]
    found = {(bucket.start, bucket.length): bucket for bucket in result.buckets}
    rows = []
    for start in sorted({bucket.start for bucket in result.buckets}):
        here = [found.get((start, length)) for length in lengths]
        end = max(bucket.end for bucket in here if bucket is not None)
        rows.append([f"{start:,} to {end:,}", *("-" if bucket is None else f"{bucket.loss:.4f}" for bucket in here)])
    rows.append(["documents", *(str(result.documents[length]) for length in lengths)])
    rows.append(["memory", *(f"{result.peak_bytes[length] / 2**20:,.0f} MiB" for length in lengths)])
    return ["position (loss in nats per token)", *aligned([head, *rows])]


def picture(result: PositionResult, title: str) -> bytes:
    """A PNG: loss over position, a line per length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained", dpi=140)
    axes = figure.subplots()
    for length in result.seconds:
        buckets = [bucket for bucket in result.buckets if bucket.length == length]
        middle = [(max(bucket.start, FIRST_BUCKET / 2) * bucket.end) ** 0.5 for bucket in buckets]
        axes.plot(middle, [bucket.loss for bucket in buckets], marker="o", markersize=3, linewidth=1.2, label=f"{short(length)} tokens")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: short(round(x)))
    axes.set_xlabel("position in the document", color=MUTED)
    axes.set_ylabel("loss, nats per token", color=MUTED)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(result.seconds) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def content(result: PositionResult, **facts: Any) -> dict[str, Any]:
    """The JSON-able whole."""
    return {**facts, **vars(result), "buckets": [vars(bucket) for bucket in result.buckets]}
