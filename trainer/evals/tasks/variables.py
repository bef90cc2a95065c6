"""Variable tracking as RULER defines it (Hsieh et al. 2024, arXiv 2404.06654): chains of assignments among sentences that say nothing.

    VAR ABCDE = 12345      VAR FGHIJ = VAR ABCDE      ...      which variables are assigned the value 12345?

``pairs`` chains of ``hops`` assignments after the first, in order in the text, at random places; the variables of the first chain are
asked for, in their order. Names are five letters, values five digits, each an even draw and tokenised alone.
"""

from __future__ import annotations

import string
from typing import Any

import numpy as np

from trainer.data.tokenizers import Tokenizer
from trainer.evals.draws import Draws
from trainer.evals.sample import Answers, Question, Sample, joined
from trainer.evals.tasks.passkey import NOISE
from trainer.evals.text import Encoder, Page, background_of

HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
LETTERS, DIGITS = 5, 5


class Variables:
    """See the module."""

    places_facts = False

    def __init__(self, name: str, settings: dict[str, Any], tokenizer: Tokenizer) -> None:
        self.name = name
        self.encode, self.hops, self.chains = Encoder(tokenizer), settings["hops"], settings["pairs"]
        self.background = background_of(self.encode, settings["background"], NOISE, "cycle")
        letters = tuple(self.encode(letter) for letter in string.ascii_uppercase)
        self.names = Answers((letters,) * LETTERS)
        self.values = Answers((tuple(self.encode(digit) for digit in string.digits),) * DIGITS)
        self.kinds = ((1.0, Answers((letters,) * (LETTERS * (self.hops + 1)))),)

    def sample(self, draws: Draws, length: int, depth: float | None = None) -> Sample:
        """See `Task.sample`. ``depth`` has no say; a question's is that of the last assignment of the chain."""
        encode, per_chain = self.encode, self.hops + 1
        names = self._different(draws, self.names, self.chains * per_chain)
        values = self._different(draws, self.values, self.chains)
        facts: list[tuple[float, np.ndarray]] = []
        for chain in range(self.chains):
            for hop, where in enumerate(np.sort(draws.uniform(per_chain))):
                i = chain * per_chain + hop
                source = values[chain] if hop == 0 else joined([encode("VAR "), names[i - 1]])
                facts.append((float(where), joined([encode("VAR "), names[i], encode(" = "), source, encode(". ")])))
        asked = names[:per_chain]
        tail = joined([
            encode("\nQuestion: Find all variables that are assigned the value "), values[0],
            encode(f" in the text above. Answer: According to the chain(s) of variable assignment in the text above, {per_chain} variables "
                   "are assigned the value "), values[0], encode(", they are:"),
        ])  # fmt: skip
        said = [piece for name in asked for piece in (encode(" "), name)]
        page = Page(encode(HEAD), tail, joined(said))
        tokens, at, places = page.compose(self.name, draws, self.background, facts, length)
        # The blanks between the names are no part of the question.
        asked_of = np.concatenate([np.full(len(piece), i % 2 == 1) for i, piece in enumerate(said)])
        at = at[asked_of]
        question = Question(at, tokens[at + 1], 1 - (int(at[0]) - places[per_chain - 1]) / length)
        return Sample(tokens[:-1], int(tokens[-1]), (question,))

    def _different(self, draws: Draws, kind: Answers, n: int) -> list[np.ndarray]:
        found: dict[bytes, np.ndarray] = {}
        while len(found) < n:
            one = kind.draw(draws)
            found[one.tobytes()] = one
        return list(found.values())
