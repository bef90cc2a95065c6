"""Small corpora and brute-force twins shared by the tests of the data room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from models.batch import IGNORE_INDEX
from trainer.config import DataSection, RunConfig, TrainSection


def texts(n: int = 12) -> list[str]:
    """Documents of uneven length with characters of one to four bytes."""
    return [f"document {i} " + "é€😀x\n" * (i * i % 7) + "ab" * (i % 5) for i in range(n)]


def write_jsonl(path: Path, documents: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(documents)), encoding="utf-8")
    return path


def run_config(path: Path, cache: Path, *, seed: int = 0, micro_batch_size: int = 1, grad_accum: int = 1, **data: Any) -> RunConfig:
    """A run over ``path`` (jsonl unless told otherwise) with nothing held out unless told otherwise."""
    settings = {"source": "jsonl", "path": str(path), "cache_dir": str(cache), "seq_len": 16, "valid_fraction": 0.0, "tokenize_workers": 1}
    return RunConfig(
        data=DataSection(**{**settings, **data}),
        train=TrainSection(seed=seed, micro_batch_size=micro_batch_size, grad_accum=grad_accum),
    )


def tokens_of(text: str) -> list[int]:
    """Byte tokens with the end token."""
    return [*text.encode(), 256]


def expected_sequence(pieces: list[list[tuple[int, int, int]]], i: int, seq_len: int, mask: bool, pad: int) -> tuple[Any, ...]:
    """Sequence i of a stream of documents, token by token. ``pieces[d]`` = (token, document, index in document) of all its tokens."""
    stream = [entry for document in pieces for entry in document]
    window = stream[i * seq_len : (i + 1) * seq_len]
    tokens, labels, positions, starts = [], [], [], []
    for t in range(seq_len):
        if t >= len(window):
            if mask and t == len(window):
                starts.append(t)
            tokens.append(pad)
            labels.append(IGNORE_INDEX)
            positions.append(t - starts[-1] if mask else t)
            continue
        token, document, _ = window[t]
        if t == 0 or (mask and window[t - 1][1] != document):
            starts.append(t)
        following = stream[i * seq_len + t + 1] if i * seq_len + t + 1 < len(stream) else None
        has_label = following is not None and (not mask or following[1] == document)
        tokens.append(token)
        labels.append(following[0] if has_label and following else IGNORE_INDEX)
        positions.append(t - starts[-1])
    return np.array(tokens), np.array(labels), np.array(positions), tuple(starts)
