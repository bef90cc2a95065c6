"""What a generated sample is, what a task is, and what guessing scores. Imports no torch.

A task makes sample after sample; what is asked in it stands in its ``questions``. The same samples are training data
(trainer/data/synthetic.py) and are scored (trainer/evals/scoring.py): by teacher forcing, the model reads the true tokens of an answer
before the one it has to predict.

Legend: T tokens of a sample, n tokens of an answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from trainer.evals.draws import Draws


class Question(NamedTuple):
    """One thing that is asked."""

    at: np.ndarray
    """[n] positions, ascending, after which the model has to predict a token of the answer."""
    answer: np.ndarray
    """[n] the tokens to predict there."""
    depth: float
    """How far back the fact lies that it depends on, the last one if several: 1 - distance / T. For a question at the end, the fact's
    place: 0 the beginning of the sample, 1 its end."""
    kind: int = 0
    """Which of the task's kinds of answers it has."""


class Sample(NamedTuple):
    """One sequence and what is asked in it."""

    tokens_T: np.ndarray
    """int64. What the model reads; whether answers stand in it is the task's matter."""
    last: int | None
    """The token that would come next, for tasks in which every next token may be predicted."""
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Answers:
    """All answers that are equally likely for one who knows the form and nothing else: one of each part, put one after the other."""

    parts: tuple[tuple[np.ndarray, ...], ...]
    """Each part's choices as tokens."""

    @staticmethod
    def ids(first: int, count: int, n: int = 1) -> Answers:
        """Any ``n`` of the tokens first .. first + count - 1."""
        return Answers((tuple(np.array([first + i]) for i in range(count)),) * n)

    def draw(self, draws: Draws) -> np.ndarray:
        """One of them."""
        chosen = draws.uniform(len(self.parts)) * [len(part) for part in self.parts]
        return np.concatenate([part[int(i)] for part, i in zip(self.parts, chosen, strict=True)])

    @property
    def chance(self) -> float:
        """Probability that a guess is right in all its tokens."""
        return 1 / prod(len(part) for part in self.parts)

    @property
    def hits_and_tokens(self) -> tuple[float, float]:
        """Expected tokens of an answer that a guess has right at their places, over answers and guesses, and expected tokens.

        Exact where the choices of every part but the last are equally long."""
        hits, tokens = 0.0, 0.0
        for part in self.parts:
            longest = max(map(len, part))
            padded = np.full((len(part), longest), -1)
            for row, choice in zip(padded, part, strict=True):
                row[: len(choice)] = choice
            for column in padded.T:
                _, counts = np.unique(column[column >= 0], return_counts=True)
                hits += float((counts.astype(float) ** 2).sum()) / len(part) ** 2
            tokens += float(np.mean([len(choice) for choice in part]))
        return hits, tokens


class Task(Protocol):
    """A generator of samples."""

    name: str
    kinds: tuple[tuple[float, Answers], ...]
    """The kinds of answers that are asked for, each with its share of the questions."""
    places_facts: bool
    """Whether it can put the facts at a given depth."""

    def sample(self, draws: Draws, length: int, depth: float | None = None) -> Sample:
        """A sample of ``length`` tokens; ``depth`` 0..1 says where the facts stand, for tasks that can choose it, instead of the setting.

        Raises TooShort with the way out where ``length`` is too short."""
        ...


def guessing(task: Task) -> tuple[float, float]:
    """What one scores who knows which answers there are and nothing else: share of questions, and of tokens."""
    chances = [(share, answers.chance, *answers.hits_and_tokens) for share, answers in task.kinds]
    hits, tokens = (sum(share * numbers[i] for share, *numbers in chances) for i in (1, 2))
    return sum(share * chance for share, chance, *_ in chances), hits / tokens


TELLINGS = 20


def fitting(task: Task, length: int, depth: float | None, *purpose: int | str) -> Sample:
    """The sample of ``task`` for ``purpose``. One that comes out longer than ``length`` by chance (long names, long words) is drawn anew;
    raises TooShort when that has happened ``TELLINGS`` times."""
    for telling in range(TELLINGS - 1):
        with contextlib.suppress(TooShort):
            return task.sample(Draws(task.name, *purpose, telling), length, depth)
    return task.sample(Draws(task.name, *purpose, TELLINGS - 1), length, depth)


class TooShort(ValueError):
    """A length in which a sample does not fit."""


def too_short(task: str, length: int, needed: int) -> TooShort:
    """The error of a sample that does not fit."""
    return TooShort(f"synthetic/{task} needs {needed} tokens a sample with these settings, not {length}: raise its length, or ask less")


def joined(pieces: Sequence[ArrayLike]) -> np.ndarray:
    """Tokens one after the other, int64."""
    return np.concatenate([np.asarray(piece, dtype=np.int64) for piece in pieces])
