"""Associative retrieval over segments (the task of ARMT, Rodkin et al. 2024, arXiv 2407.04841): a pair in a segment of its own, the
question in the last one.

    segment:       filler ... PAIR k1 .. km IS v1 .. vn filler ...        at a random place of the segment; or filler only
    last segment:  filler ... ASK k1 .. km IS v1 .. vn ASK ...            the values are to be predicted

Pairs stand in different segments, in as many of the ``length / segment_tokens - 1`` before the last as there are pairs. A curriculum
raises ``pairs`` and ``length``. Keys of a sample differ; values may repeat. Vocabulary: symbols of keys, of values, fillers, PAIR, ASK, IS.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trainer.evals.draws import Draws
from trainer.evals.sample import Answers, Question, Sample, joined, too_short


class Associative:
    """See the module. Raises ValueError for settings that cannot be."""

    places_facts = False

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.name = name
        self.pairs, self.queries, self.segment = settings["pairs"], settings["queries"], settings["segment_tokens"]
        self.keys, self.values, self.fillers = settings["keys"], settings["values"], settings["fillers"]
        self.key_tokens, self.value_tokens = settings["key_tokens"], settings["value_tokens"]
        if self.pairs > self.keys**self.key_tokens:
            raise ValueError(
                f"synthetic/associative: pairs {self.pairs} have different keys, of which there are {self.keys}^{self.key_tokens}; "
                "raise keys or key_tokens"
            )
        if self.queries > self.pairs:
            raise ValueError(
                f"synthetic/associative: queries {self.queries} exceed pairs {self.pairs}; every pair is asked for at most once"
            )
        self.fact = 2 + self.key_tokens + self.value_tokens
        if self.fact * self.queries > self.segment:
            raise ValueError(
                f"synthetic/associative: {self.queries} queries of {self.fact} tokens do not fit in segment_tokens {self.segment}; raise it"
            )
        words = self.keys + self.values + self.fillers
        self.PAIR, self.ASK, self.IS = words, words + 1, words + 2
        self.vocab_size = words + 3
        self.kinds = ((1.0, Answers.ids(self.keys, self.values, self.value_tokens)),)

    def sample(self, draws: Draws, length: int, depth: float | None = None) -> Sample:
        """See `Task.sample`. ``length`` counts the last token of the last answer too, which is only predicted; what does not fill a
        segment comes first, as filler. ``depth`` has no say."""
        segments, rest = divmod(length + 1, self.segment)
        if segments < self.pairs + 1:
            raise too_short(self.name, length, (self.pairs + 1) * self.segment - 1)
        tokens = draws.below(self.fillers, length + 1)
        tokens += self.keys + self.values
        keys, values = self._keys(draws), draws.below(self.values, self.pairs * self.value_tokens).reshape(self.pairs, -1) + self.keys
        places = rest + np.sort(draws.different(segments - 1, self.pairs)) * self.segment
        places += draws.below(self.segment - self.fact + 1, self.pairs)
        for place, key, value in zip(places, keys, values, strict=True):
            tokens[place : place + self.fact] = joined([[self.PAIR], key, [self.IS], value])
        questions, start = [], length + 1 - self.queries * self.fact
        for pair in draws.different(self.pairs, self.queries):
            tokens[start : start + self.fact] = joined([[self.ASK], keys[pair], [self.IS], values[pair]])
            at = start + 1 + self.key_tokens + np.arange(self.value_tokens)
            questions.append(Question(at, values[pair], 1 - float(at[0] - places[pair]) / length))
            start += self.fact
        return Sample(tokens[:-1], int(tokens[-1]), tuple(questions))

    def _keys(self, draws: Draws) -> np.ndarray:
        """[pairs, key_tokens] different from one another."""
        numbers = draws.different(min(self.keys**self.key_tokens, 2**62), self.pairs)
        return np.stack([numbers // self.keys**i % self.keys for i in range(self.key_tokens)], axis=1)
