"""Passkey retrieval (Mohtashami and Jaggi 2023, arXiv 2305.16300): a number among sentences that say nothing, asked for at the end.

The digits are even draws, the first one too; every digit is tokenised alone, in the text and in the answer.
"""

from __future__ import annotations

from typing import Any

from trainer.data.tokenizers import Tokenizer
from trainer.evals.draws import Draws
from trainer.evals.sample import Answers, Question, Sample, joined
from trainer.evals.text import Encoder, Page, background_of

HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there. "
)
NOISE = ("The grass is green. ", "The sky is blue. ", "The sun is yellow. ", "Here we go. ", "There and back again. ")


class Passkey:
    """See the module."""

    places_facts = True

    def __init__(self, name: str, settings: dict[str, Any], tokenizer: Tokenizer) -> None:
        self.name = name
        self.encode, self.depth = Encoder(tokenizer), settings["depth"]
        self.background = background_of(self.encode, settings["background"], NOISE, "cycle")
        self.kinds = ((1.0, Answers((tuple(self.encode(digit) for digit in "0123456789"),) * settings["digits"])),)

    def sample(self, draws: Draws, length: int, depth: float | None = None) -> Sample:
        """See `Task.sample`."""
        depth = self.depth if depth is None else depth
        depth = float(draws.uniform(1)[0]) if depth is None else depth
        key, encode = self.kinds[0][1].draw(draws), self.encode
        fact = [encode("The pass key is "), key, encode(". Remember it. "), key, encode(" is the pass key. ")]
        page = Page(encode(HEAD), encode("\nWhat is the pass key? The pass key is "), key)
        tokens, at, places = page.compose(self.name, draws, self.background, [(depth, joined(fact))], length)
        return Sample(tokens[:-1], int(tokens[-1]), (Question(at, key, 1 - (int(at[0]) - places[0]) / length),))
