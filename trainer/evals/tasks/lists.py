"""Copy, reverse and sort: ``pairs`` symbols, filler, and the symbols again in the order that is asked for.

    BEGIN x1 .. xn END | filler, ``gap`` tokens at least | ASK y1 .. yn          y: the same, backwards, or ascending

The symbols are even draws and may repeat. Vocabulary: symbols, fillers, BEGIN, END, ASK. A longer sample has more filler before BEGIN and
between, a random share of it before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trainer.evals.draws import Draws
from trainer.evals.sample import Answers, Question, Sample, joined, too_short


class Lists:
    """See the module: one class, three tasks."""

    places_facts = True

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.name, self.n, self.gap = name, settings["pairs"], settings["gap"]
        self.values, self.fillers, self.depth = settings["values"], settings["fillers"], settings["depth"]
        words = self.values + self.fillers
        self.BEGIN, self.END, self.ASK = words, words + 1, words + 2
        self.vocab_size = words + 3
        self.kinds = ((1.0, Answers.ids(0, self.values, self.n)),)

    def sample(self, draws: Draws, length: int, depth: float | None = None) -> Sample:
        """See `Task.sample`."""
        room = length + 1 - 2 * self.n - 3 - self.gap
        if room < 0:
            raise too_short(self.name, length, length - room)
        depth = self.depth if depth is None else depth
        before = round((float(draws.uniform(1)[0]) if depth is None else depth) * room)
        symbols = draws.below(self.values, self.n)
        said = {"copy": symbols, "reverse": symbols[::-1], "sort": np.sort(symbols)}[self.name]
        filler = draws.below(self.fillers, room + self.gap) + self.values
        tokens = joined([filler[:before], [self.BEGIN], symbols, [self.END], filler[before:], [self.ASK], said])
        at = np.arange(length - self.n, length)
        return Sample(tokens[:-1], int(tokens[-1]), (Question(at, said, 1 - (int(at[0]) - before) / length),))
