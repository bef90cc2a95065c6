"""Generated samples as training data: sequence n of a run is a pure function of (settings, seed, n), whatever the topology.

Try alone: ``longstride train debug_cpu data.source=synthetic/mqar data.seq_len=64``.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np

from models.batch import IGNORE_INDEX
from models.errors import UserError
from trainer.config import DataSection
from trainer.data.packing import PackedSequence
from trainer.evals.registry import PREFIX, task_of
from trainer.evals.sample import Sample, Task, TooShort, fitting

ENDLESS = 2**62
"""Sequences of the one epoch there is."""


class SyntheticSequences:
    """The sequences of a task by number. ``per_step``: sequences of an optimizer step, by which a curriculum counts its steps.

    ``split`` valid: samples of their own, of the curriculum's last stage."""

    def __init__(self, data: DataSection, seed: int, pad_id: int, split: Literal["train", "valid"], per_step: int, count: int) -> None:
        self.data, self.seed, self.pad_id, self.split, self.per_step, self.count = data, seed, pad_id, split, per_step, count
        self.seq_len = data.seq_len
        self.name = data.source.removeprefix(PREFIX)
        self._stages = {stage.from_step: self._made(stage.from_step) for stage in data.synthetic.curriculum} or {0: self._made(0)}

    def __len__(self) -> int:
        """Sequences of one epoch."""
        return self.count

    def __getitem__(self, n: int) -> PackedSequence:
        """Sequence ``n`` of the run."""
        step = n // self.per_step if self.split == "train" else max(self._stages)
        task, length = self._stages[max(first for first in self._stages if first <= step)]
        samples = [fitting(task, length, None, self.split, self.seed, n, i) for i in range(self.seq_len // length)]
        return packed(samples, self.seq_len, self.data.document_mask, self.pad_id, self.data.synthetic.loss == "all")

    def fingerprint(self) -> str:
        """Of the first sequence of every stage: changes with the settings, the tokenizer and the background."""
        digest = hashlib.sha256(repr(self.data.synthetic).encode())
        for first in self._stages:
            one = self[first * self.per_step]
            digest.update(one.tokens_T.tobytes() + one.labels_T.tobytes())
        return digest.hexdigest()[:16]

    def _made(self, step: int) -> tuple[Task, int]:
        """Task and tokens of a sample from a step on; raises UserError where no sample can be made."""
        settings = self.data.synthetic.at(step)
        length = settings.length or self.seq_len
        if length > self.seq_len:
            raise UserError(
                f"data.synthetic.length {length} exceeds data.seq_len {self.seq_len}: a sample is never cut; raise data.seq_len"
            )
        task = task_of(self.data, settings)
        try:
            fitting(task, length, None, "tried")
        except TooShort as error:
            raise UserError(f"data.synthetic: {error} (data.synthetic.length, or data.seq_len where that is null)") from None
        return task, length


def packed(samples: list[Sample], seq_len: int, document_mask: bool, pad_id: int, every_token: bool) -> PackedSequence:
    """Samples one after the other, each a document, the rest padding. Labels are the answers; with ``every_token`` also every other token
    that follows, where the task says which."""
    tokens_T = np.full(seq_len, pad_id, dtype=np.int64)
    labels_T = np.full(seq_len, IGNORE_INDEX, dtype=np.int64)
    starts, start = [], 0
    for sample in samples:
        end = start + len(sample.tokens_T)
        tokens_T[start:end] = sample.tokens_T
        if every_token and sample.last is not None:
            labels_T[start:end] = np.append(sample.tokens_T[1:], sample.last)
        for question in sample.questions:
            labels_T[start + question.at] = question.answer
        starts.append(start)
        start = end
    if start < seq_len:
        starts.append(start)
    if not document_mask:
        return PackedSequence(tokens_T, labels_T, np.arange(seq_len), (0,))
    positions_T = np.arange(seq_len) - np.repeat(starts, np.diff(starts, append=seq_len))
    return PackedSequence(tokens_T, labels_T, positions_T, tuple(starts))
