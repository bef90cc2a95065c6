"""Needle in a haystack as RULER defines it (Hsieh et al. 2024, arXiv 2404.06654): sentences that give a key a magic number, one asked for.

    needle_single     one needle among sentences that say nothing                      (RULER's niah_single_1 with words for keys)
    needle_multikey   ``pairs`` needles among such sentences, one key asked for        (niah_multikey_1; background a text file)
    needle_haystack   nothing but needles of other keys around the one asked for       (niah_multikey_2)

Keys are two words, values numbers of ``digits`` digits, every digit an even draw and tokenised alone. The needle asked for stands at the
depth that is wanted; the others at any.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trainer.data.tokenizers import Tokenizer
from trainer.evals.draws import Draws
from trainer.evals.sample import Answers, Question, Sample, joined, too_short
from trainer.evals.tasks.passkey import NOISE
from trainer.evals.text import Encoder, Page, background_of

HEAD = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n"
)
_ADJECTIVES = (
    "able amber ancient bitter blue bold brave brief bright broad calm careful cheap clean clever cold cool crisp curious dark dear deep "
    "dry dull eager early easy empty exact faint fair famous fast fierce fine firm flat fresh gentle glad golden grand gray great green "
    "happy hard heavy hollow honest humble icy idle keen kind large late lazy light little lively lone long loud loyal lucky mild modest"
)
_NOUNS = (
    "anchor apple arrow badge basket beacon bell bench bottle branch bridge brush bucket button cabin cable candle canoe carpet castle "
    "chain chair clock cloud coin comb compass copper cradle crown curtain desk dial door drum engine feather fence ferry flag flute "
    "forest fountain garden gate glove hammer harbor helmet hinge island jacket kettle key ladder lamp lantern letter lock magnet map "
    "marble market mask meadow mirror needle orchard oven paddle panel pencil pillar pillow plate pocket pump quilt raft ribbon ring"
)
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()


class Needle:
    """See the module: one class, three tasks."""

    places_facts = True

    def __init__(self, name: str, settings: dict[str, Any], tokenizer: Tokenizer) -> None:
        self.name, self.encode, self.depth = name, Encoder(tokenizer), settings["depth"]
        self.pairs = settings.get("pairs", 1)
        if self.pairs > len(ADJECTIVES) * len(NOUNS):
            raise ValueError(f"synthetic/{name}: pairs {self.pairs} have different keys, of which there are {len(ADJECTIVES) * len(NOUNS)}")
        self.background = None
        if name != "needle_haystack":
            self.background = background_of(self.encode, settings["background"], NOISE, "cycle")
        self.answers = Answers((tuple(self.encode(digit) for digit in "0123456789"),) * settings["digits"])
        self.kinds = ((1.0, self.answers),)

    def sample(self, draws: Draws, length: int, depth: float | None = None) -> Sample:
        """See `Task.sample`."""
        depth = self.depth if depth is None else depth
        depth = float(draws.uniform(1)[0]) if depth is None else depth
        keys = [_key(int(i)) for i in draws.different(len(ADJECTIVES) * len(NOUNS), max(self.pairs, 1))]
        value = self.answers.draw(draws)
        page = Page(self.encode(HEAD), self.encode(_question(keys[0])), value)
        facts = [(depth, self._fact(keys[0], value))]
        facts += [(float(draws.uniform(1)[0]), self._fact(key, self.answers.draw(draws))) for key in keys[1:]]
        if self.background is None:
            return self._among_needles(draws, page, facts[0], keys[0], length)
        tokens, at, places = page.compose(self.name, draws, self.background, facts, length)
        return self._sample(tokens, at, value, places[0], length)

    def _among_needles(self, draws: Draws, page: Page, fact: tuple[float, np.ndarray], key: str, length: int) -> Sample:
        """Other needles all around, as many as fit; what is left over is blanks at the end."""
        room = length + 1 - len(page.head) - len(page.tail) - len(page.answer) - len(fact[1])
        if room < 0:
            raise too_short(self.name, length, length - room)
        others, used = [], 0
        while True:
            other = _key(draws.one(len(ADJECTIVES) * len(NOUNS)))
            if other == key:  # asked for once
                continue
            tokens = self._fact(other, self.answers.draw(draws))
            if used + len(tokens) > room:
                break
            others.append(tokens)
            used += len(tokens)
        before = round(fact[0] * len(others))
        blank = self.encode("\n")
        filler = np.resize(blank, room - used)
        tokens = joined([page.head, *others[:before], fact[1], *others[before:], filler, page.tail, page.answer])
        place = len(page.head) + sum(len(other) for other in others[:before])
        return self._sample(tokens, np.arange(length - len(page.answer), length), page.answer, place, length)

    def _fact(self, key: str, value: np.ndarray) -> np.ndarray:
        return joined(
            [self.encode("One of the special magic numbers for "), self.encode(key), self.encode(" is: "), value, self.encode(". ")]
        )

    def _sample(self, tokens: np.ndarray, at: np.ndarray, value: np.ndarray, place: int, length: int) -> Sample:
        return Sample(tokens[:-1], int(tokens[-1]), (Question(at, value, 1 - (int(at[0]) - place) / length),))


def _key(number: int) -> str:
    return f"{ADJECTIVES[number // len(NOUNS)]}-{NOUNS[number % len(NOUNS)]}"


def _question(key: str) -> str:
    return (
        f"\nWhat is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is "
    )
