"""Samples in words: facts among background sentences, in tokens of any tokenizer. Imports no torch.

Pieces are tokenised one by one, so that a fact is made of the same tokens wherever it stands and an answer's tokens are known exactly.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from models.errors import UserError
from trainer.data.tokenizers import Tokenizer
from trainer.evals.draws import Draws
from trainer.evals.sample import joined, too_short

LARGEST_BACKGROUND = 64 * 2**20
"""Bytes of a background file that are read."""


class Encoder:
    """Words to tokens, remembered."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, np.ndarray] = {}

    def __call__(self, text: str) -> np.ndarray:
        """int64 tokens of ``text`` by itself."""
        found = self._known.get(text)
        if found is None:
            if len(self._known) > 100_000:
                self._known.clear()
            found = self._known[text] = self.tokenizer.encode_batch([text])[0]
        return found

    def all(self, *texts: str) -> np.ndarray:
        """Tokens of several pieces, one after the other."""
        return joined([self(text) for text in texts])


@dataclass(frozen=True)
class Background:
    """Sentences that stand around the facts."""

    sentences: tuple[np.ndarray, ...]
    order: Literal["cycle", "text", "drawn"]
    """cycle: over and over from the first; text: from any one on, in order; drawn: each by chance."""

    def take(self, draws: Draws, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Exactly ``n`` tokens, the last sentence cut, and where sentences begin in them (n too where none is cut)."""
        lengths = np.array([len(sentence) for sentence in self.sentences])
        if self.order == "drawn":
            chosen = draws.below(len(lengths), n // int(lengths.min()) + 1)
        else:
            first = draws.one(len(lengths)) if self.order == "text" else 0
            turns = n // int(lengths.sum()) + 1
            chosen = (np.arange(first, first + turns * len(lengths) + len(lengths))) % len(lengths)
        starts = np.concatenate(([0], np.cumsum(lengths[chosen])))
        used = int(np.searchsorted(starts, n))
        tokens = joined([self.sentences[i] for i in chosen[:used]] or [np.zeros(0, np.int64)])[:n]
        return tokens, starts[: used + 1][starts[: used + 1] <= n]


def background_of(encode: Encoder, path: str | None, own: Sequence[str], order: Literal["cycle", "text", "drawn"]) -> Background:
    """The sentences of the text file ``path``, in order, or the task's own. Raises UserError for a file that cannot be used."""
    if path is None:
        return Background(tuple(encode(sentence) for sentence in own), order)
    return Background(tuple(encode(sentence) for sentence in _sentences(path, Path(path).expanduser())), "text")


@lru_cache(maxsize=2)
def _sentences(key: str, path: Path) -> tuple[str, ...]:
    try:
        with path.open("rb") as stream:
            raw = stream.read(LARGEST_BACKGROUND)
    except OSError as error:
        raise UserError(f"data.synthetic.background: {key} cannot be read ({error.strerror}); give a text file") from None
    if b"\0" in raw:
        raise UserError(f"data.synthetic.background: {key} is no text file")
    words = " ".join(raw.decode("utf-8", errors="ignore").split())
    sentences = tuple(sentence + " " for sentence in re.split(r"(?<=[.!?]) +", words) if sentence)
    if not sentences:
        raise UserError(f"data.synthetic.background: {key} holds no words")
    return sentences


@dataclass(frozen=True)
class Page:
    """A text with facts in it: everything the reader is given, and after it what it has to say."""

    head: np.ndarray
    tail: np.ndarray
    answer: np.ndarray

    def compose(
        self, task: str, draws: Draws, background: Background, facts: Sequence[tuple[float, np.ndarray]], length: int
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """(``length`` + 1 tokens, the positions that predict the answer, the position of every fact).

        Each fact (depth 0..1, tokens) stands between two sentences, as near as possible to its depth in the background; facts of one place
        keep their order."""
        fixed = len(self.head) + len(self.tail) + len(self.answer) + sum(len(tokens) for _, tokens in facts)
        if fixed > length + 1:
            raise too_short(task, length, fixed - 1)
        noise, bounds = background.take(draws, length + 1 - fixed)
        places = [int(bounds[np.argmin(np.abs(bounds - depth * len(noise)))]) for depth, _ in facts]
        pieces, at, cut, written = [self.head], [0] * len(facts), 0, len(self.head)
        for i in sorted(range(len(facts)), key=lambda i: (places[i], i)):
            pieces += [noise[cut : places[i]], facts[i][1]]
            written += places[i] - cut
            at[i], cut = written, places[i]
            written += len(facts[i][1])
        tokens = joined([*pieces, noise[cut:], self.tail, self.answer])
        predicted = np.arange(length - len(self.answer), length)
        return tokens, predicted, at
