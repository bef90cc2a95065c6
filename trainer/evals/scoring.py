"""Accuracy on generated samples, by length and depth. Imports no torch: a predictor is any function of tokens.

The model reads the true tokens (teacher forcing); after each position that is asked about its most likely next token is compared with the
answer's. A question is answered when all tokens of its answer are right. This is what greedy decoding would give for one whole answer,
since the first wrong token ends it.

Legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from models.errors import UserError
from trainer.evals.sample import Sample, Task, TooShort, fitting

Predictor = Callable[[np.ndarray, Sequence[np.ndarray]], list[np.ndarray]]
"""(tokens_BT, per row the positions asked about) -> per row the predicted next tokens."""

TOKENS_AT_ONCE = 65_536
"""Samples shorter than this are read several at a time."""


@dataclass
class Cell:
    """What was found at one length and depth."""

    length: int
    depth: float
    questions: int = 0
    answered: int = 0
    """Questions with every token right."""
    tokens: int = 0
    tokens_right: int = 0

    @property
    def accuracy(self) -> float | None:
        """Share of questions answered; None without any."""
        return self.answered / self.questions if self.questions else None

    @property
    def token_accuracy(self) -> float | None:
        """Share of answer tokens that are right."""
        return self.tokens_right / self.tokens if self.tokens else None

    def add(self, right: np.ndarray) -> None:
        """Count one question, of whose tokens ``right`` are."""
        self.questions += 1
        self.answered += bool(right.all())
        self.tokens += len(right)
        self.tokens_right += int(right.sum())


def total(cells: Sequence[Cell], length: int) -> Cell:
    """All depths of one length together."""
    chosen = [cell for cell in cells if cell.length == length]
    sums = [sum(getattr(cell, name) for cell in chosen) for name in ("questions", "answered", "tokens", "tokens_right")]
    return Cell(length, float("nan"), *sums)


def score(
    task: Task,
    predict: Predictor,
    length: int,
    depths: Sequence[float],
    samples: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Cell]:
    """One cell per depth: of ``samples`` samples of ``length`` tokens at each depth for a task that places its facts, else of ``samples``
    in all, each question counted at the nearest depth.

    Sample i is a function of (task, seed, length, depth, i). Raises UserError for a length the task does not fit in."""
    cells = [Cell(length, depth) for depth in depths]
    asked: list[float | None] = [depth for depth in depths for _ in range(samples)] if task.places_facts else [None] * samples
    at_once = max(1, TOKENS_AT_ONCE // length)
    for first in range(0, len(asked), at_once):
        numbers = range(first, min(first + at_once, len(asked)))
        try:
            made = [fitting(task, length, asked[i], "eval", seed, length, repr(asked[i]), i % samples) for i in numbers]
        except TooShort as error:
            raise UserError(f"--lengths: {error}") from None
        _count(cells, depths, made, [asked[i] for i in numbers], predict)
        if progress is not None:
            progress(numbers[-1] + 1, len(asked))
    return cells


def _count(cells: list[Cell], depths: Sequence[float], made: list[Sample], asked: list[float | None], predict: Predictor) -> None:
    at = [np.sort(np.concatenate([question.at for question in sample.questions])) for sample in made]
    # A sample of a million tokens is not copied.
    tokens_BT = made[0].tokens_T[None] if len(made) == 1 else np.stack([sample.tokens_T for sample in made])
    predicted = predict(tokens_BT, at)
    for sample, depth, positions, tokens in zip(made, asked, at, predicted, strict=True):
        for question in sample.questions:
            found = tokens[np.searchsorted(positions, question.at)]
            place = question.depth if depth is None else depth
            cells[int(np.argmin([abs(place - known) for known in depths]))].add(found == question.answer)
