"""Questions about a small world, as bAbI's tasks 1 to 5 (Weston et al. 2015, arXiv 1502.05698), their facts strewn in order over a
background text, as in BABILong (Kuratov et al. 2024, arXiv 2406.10149). The worlds are simulated here (tasks/worlds.py).

    qa1  Where is Mary?                             the last place she went to
    qa2  Where is the milk?                         carried by someone who moves, or put down
    qa3  Where was the milk before the office?      the order of its places
    qa4  What is north of the garden?               two-argument relations, both ways round
    qa5  Who gave the milk to Fred?                 three-argument relations, each argument asked for

``facts`` sentences are told. Without a background file the text around is generated sentences about other things.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trainer.data.tokenizers import Tokenizer
from trainer.evals.draws import Draws
from trainer.evals.sample import Answers, Question, Sample
from trainer.evals.tasks.needle import ADJECTIVES, NOUNS
from trainer.evals.tasks.worlds import KINDS, WORDS, WORLDS
from trainer.evals.text import Encoder, Page, background_of

NOISE_SENTENCES = 512


class Babi:
    """See the module: one class, five tasks."""

    places_facts = False

    def __init__(self, name: str, settings: dict[str, Any], tokenizer: Tokenizer) -> None:
        self.name, self.facts, self.encode = name, settings["facts"], Encoder(tokenizer)
        self.tell, least, most = WORLDS[name]
        if not least <= self.facts <= most:
            raise ValueError(f"synthetic/{name}: facts {self.facts} must be from {least} to {most}")
        self.background = background_of(self.encode, settings["background"], _noise(), "drawn")
        self.kinds = tuple((share, Answers((tuple(self.encode(word) for word in words),))) for share, words in KINDS[name])

    def sample(self, draws: Draws, length: int, depth: float | None = None) -> Sample:
        """See `Task.sample`. ``depth`` has no say; a question's is that of the last fact its answer rests on."""
        story = self.tell(draws, self.facts)
        answer, encode = self.encode(story.answer), self.encode
        where = np.sort(draws.uniform(len(story.facts)))
        page = Page(encode(""), encode.all("\nQuestion: ", story.question, "\nAnswer: "), answer)
        facts = [(float(place), encode(fact + " ")) for place, fact in zip(where, story.facts, strict=True)]
        tokens, at, places = page.compose(self.name, draws, self.background, facts, length)
        depth = 1 - (int(at[0]) - places[story.supports]) / length
        return Sample(tokens[:-1], int(tokens[-1]), (Question(at, answer, depth, story.kind),))


def _noise() -> list[str]:
    """Sentences about things of which no task knows."""
    draws = Draws("babi noise")
    nouns = [noun for noun in NOUNS if noun not in WORDS]
    ways = ("stood near", "was older than", "looked like", "belonged with", "lay under", "was lighter than")

    def thing() -> str:
        return f"{draws.choice(ADJECTIVES)} {draws.choice(nouns)}"

    return [f"The {thing()} {draws.choice(ways)} the {thing()}. " for _ in range(NOISE_SENTENCES)]
