"""The worlds of the bAbI-style tasks: sentences that are told, a question, and its answer. Plain words, no tokens, no torch.

Every world keeps going until what it told can be asked about; which facts an answer rests on is known from the simulation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from trainer.evals.draws import Draws

PEOPLE = ("Daniel", "John", "Mary", "Sandra")
GIVERS = ("Bill", "Fred", "Jeff", "Mary")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
GIFTS = ("apple", "cake", "football", "milk")
DIRECTIONS = ("north", "south", "east", "west")
WORDS = frozenset((*PLACES, *OBJECTS, *GIFTS))
MOVES = ("moved to", "went to", "travelled to", "journeyed to", "went back to")
TAKES = ("picked up", "got", "grabbed", "took")
DROPS = ("put down", "dropped", "discarded", "left")
GIVES = ("gave", "handed", "passed")


class Story(NamedTuple):
    """What is told and asked."""

    facts: list[str]
    question: str
    answer: str
    supports: int
    """Number of the last fact that the answer rests on."""
    kind: int = 0
    """Which of the task's kinds of answers."""


@dataclass
class _World:
    """People that move about, take things and put them down. Each thing's places are kept with the fact that brought it there."""

    draws: Draws
    facts: list[str] = field(default_factory=list)
    at: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Person: where, and told by which fact."""
    holder: dict[str, str] = field(default_factory=dict)
    trail: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    """Thing: its places one after the other, each with the fact by which it is known to be there."""

    def move(self) -> None:
        who = self.draws.choice(PEOPLE)
        here = self.at[who][0] if who in self.at else None
        place = self.draws.choice([place for place in PLACES if place != here])
        self.at[who] = (place, len(self.facts))
        for thing, holder in self.holder.items():
            if holder == who:
                self.trail[thing].append((place, len(self.facts)))
        self.facts.append(f"{who} {self.draws.choice(MOVES)} the {place}.")

    def take(self) -> bool:
        """Someone takes a thing that is where they are, or was nowhere yet; False where nobody can."""
        can = [
            (who, thing)
            for who, (place, _) in sorted(self.at.items())
            for thing in OBJECTS
            if thing not in self.holder and (thing not in self.trail or self.trail[thing][-1][0] == place)
        ]
        if not can:
            return False
        who, thing = self.draws.choice(can)
        self.holder[thing] = who
        if thing not in self.trail:
            self.trail[thing] = [(self.at[who][0], len(self.facts))]
        self.facts.append(f"{who} {self.draws.choice(TAKES)} the {thing}.")
        return True

    def drop(self) -> bool:
        """Someone puts a thing down; False where nobody holds one."""
        if not self.holder:
            return False
        thing = self.draws.choice(sorted(self.holder))
        who = self.holder.pop(thing)
        self.facts.append(f"{who} {self.draws.choice(DROPS)} the {thing}.")
        return True

    def live(self, facts: int) -> None:
        """Tell ``facts`` of them: half of them moves, where something else can happen."""
        while len(self.facts) < facts:
            what = self.draws.one(4)
            done = self.take() if what == 0 else self.drop() if what == 1 else False
            if not done:
                self.move()


def where_is_someone(draws: Draws, facts: int) -> Story:
    """qa1."""
    world = _World(draws)
    while len(world.facts) < facts:
        world.move()
    who = draws.choice(sorted(world.at))
    place, fact = world.at[who]
    return Story(world.facts, f"Where is {who}?", place, fact)


def where_is_something(draws: Draws, facts: int) -> Story:
    """qa2. Of things that were taken: the last place in their trail."""
    while True:
        world = _World(draws)
        world.live(facts)
        if world.trail:
            thing = draws.choice(sorted(world.trail))
            place, fact = world.trail[thing][-1]
            return Story(world.facts, f"Where is the {thing}?", place, fact)


def where_was_something(draws: Draws, facts: int) -> Story:
    """qa3. Asks about a place in which the thing was once, and not first."""
    while True:
        world = _World(draws)
        world.live(facts)
        asked = []
        for thing, trail in sorted(world.trail.items()):
            places = [place for place, _ in trail]
            asked += [(thing, i) for i in range(1, len(trail)) if places.count(places[i]) == 1]
        if asked:
            thing, i = draws.choice(asked)
            (before, _), (place, fact) = world.trail[thing][i - 1 : i + 1]
            return Story(world.facts, f"Where was the {thing} before the {place}?", before, fact)


def what_is_beside(draws: Draws, facts: int) -> Story:
    """qa4. Places in a row, told in any order; one in the middle is asked about, either way."""
    row = [PLACES[i] for i in draws.different(len(PLACES), facts + 1)]
    direction = draws.choice(DIRECTIONS)
    order = [int(i) for i in draws.different(facts, facts)]
    told = [f"The {row[i]} is {direction} of the {row[i + 1]}." for i in order]
    middle = 1 + draws.one(facts - 1)
    if draws.one(2):
        return Story(told, f"What is {direction} of the {row[middle]}?", row[middle - 1], order.index(middle - 1))
    return Story(told, f"What is the {row[middle]} {direction} of?", row[middle + 1], order.index(middle))


def who_gave_what(draws: Draws, facts: int) -> Story:
    """qa5. The last gift that fits the question is meant; a kind of question is asked for a gift that is the last to fit it."""
    told: list[str] = []
    gifts: list[tuple[str, str, str, int]] = []
    first = draws.one(facts)
    while len(told) < facts:
        if len(told) == first or draws.one(2):
            giver, taker = (GIVERS[i] for i in draws.different(len(GIVERS), 2))
            thing = draws.choice(GIFTS)
            gifts.append((giver, thing, taker, len(told)))
            told.append(f"{giver} {draws.choice(GIVES)} the {thing} to {taker}.")
        else:
            told.append(f"{draws.choice(GIVERS)} {draws.choice(MOVES)} the {draws.choice(PLACES)}.")
    giver, thing, taker, _ = draws.choice(gifts)

    def last(fits: Callable[[tuple[str, str, str, int]], bool]) -> tuple[str, str, str, int]:
        return [gift for gift in gifts if fits(gift)][-1]

    what = draws.one(5)
    if what == 0:
        found = last(lambda gift: gift[0] == giver and gift[2] == taker)
        return Story(told, f"What did {giver} give to {taker}?", found[1], found[3], kind=1)
    if what == 1:
        found = last(lambda gift: gift[1] == thing and gift[2] == taker)
        return Story(told, f"Who gave the {thing} to {taker}?", found[0], found[3])
    if what == 2:
        found = last(lambda gift: gift[0] == giver and gift[1] == thing)
        return Story(told, f"Who did {giver} give the {thing} to?", found[2], found[3])
    found = last(lambda gift: gift[1] == thing)
    if what == 3:
        return Story(told, f"Who gave the {thing}?", found[0], found[3])
    return Story(told, f"Who received the {thing}?", found[2], found[3])


WORLDS: dict[str, tuple[Callable[[Draws, int], Story], int, int]] = {
    "qa1": (where_is_someone, 1, 10_000),
    "qa2": (where_is_something, 4, 10_000),
    "qa3": (where_was_something, 6, 10_000),
    "qa4": (what_is_beside, 2, len(PLACES) - 1),
    "qa5": (who_gave_what, 1, 10_000),
}
"""By task: the world, and how many facts it tells at least and at most."""

KINDS: dict[str, tuple[tuple[float, tuple[str, ...]], ...]] = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), ((1.0, PLACES),)),
    "qa5": ((0.8, GIVERS), (0.2, GIFTS)),
}
"""By task: the kinds of answers, each with its share of questions and its words."""
