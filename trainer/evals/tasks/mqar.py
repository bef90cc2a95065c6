"""Multi-query associative recall (MQAR; Arora et al. 2023, arXiv 2312.04927): key-value pairs, then keys of which the value is asked.

    k1 v1 k2 v2 ... | filler, at least ``gap`` tokens | filler with keys in it, after each of which its value is to be predicted

Keys of a sample differ, values may repeat. The token after a queried key is filler, not the value, so one answer does not help the next
(as in the authors' generator). Queries stand at slots of two tokens, drawn without putting back with probability proportional to
``power * slot^(power - 1)``: mostly soon after the gap, some far from it. Vocabulary: keys, then values, then fillers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trainer.evals.draws import Draws
from trainer.evals.sample import Answers, Question, Sample, too_short


class Mqar:
    """See the module. Raises ValueError for settings that cannot be."""

    places_facts = False

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.name = name
        self.pairs, self.gap, self.power = settings["pairs"], settings["gap"], settings["power"]
        self.queries = settings["queries"] or self.pairs
        self.keys, self.values, self.fillers = settings["keys"], settings["values"], settings["fillers"]
        if self.pairs > self.keys:
            raise ValueError(f"synthetic/mqar: pairs {self.pairs} have different keys, of which there are {self.keys}; raise keys")
        if self.queries > self.pairs:
            raise ValueError(f"synthetic/mqar: queries {self.queries} exceed pairs {self.pairs}; every pair is asked for at most once")
        self.vocab_size = self.keys + self.values + self.fillers
        self.kinds = ((1.0, Answers.ids(self.keys, self.values)),)

    def sample(self, draws: Draws, length: int, depth: float | None = None) -> Sample:
        """See `Task.sample`; ``depth`` has no say: queries stand where the power law puts them."""
        first = 2 * self.pairs + self.gap
        slots = (length - first) // 2
        if slots < self.queries:
            raise too_short(self.name, length, first + 2 * self.queries)
        keys, values = draws.different(self.keys, self.pairs), draws.below(self.values, self.pairs) + self.keys
        tokens_T = draws.below(self.fillers, length)
        tokens_T += self.keys + self.values
        tokens_T[0 : 2 * self.pairs : 2], tokens_T[1 : 2 * self.pairs : 2] = keys, values
        weights = self.power * np.arange(1, slots + 1, dtype=np.float64) ** (self.power - 1)
        at = first + 2 * draws.weighted(weights, self.queries)
        asked = draws.different(self.pairs, self.queries)
        tokens_T[at] = keys[asked]
        questions = [Question(at[i : i + 1], values[p : p + 1], 1 - float(at[i] - 2 * p) / length) for i, p in enumerate(asked)]
        return Sample(tokens_T, None, tuple(questions))
