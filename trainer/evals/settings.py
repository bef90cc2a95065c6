"""Settings of generated data, ``data.synthetic``, and which task reads which of them. Imports no torch.

A setting that is left null takes its task's default (``DEFAULTS``); one that a task does not read is refused.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from models.config import PositiveInt, Section

Count = Annotated[int, Field(ge=0)]

DEFAULTS: dict[str, dict[str, Any]] = {
    "mqar": {"pairs": 8, "queries": None, "keys": 64, "values": 64, "fillers": 16, "gap": 0, "power": 0.01},
    "associative": {
        "pairs": 4, "queries": 1, "keys": 16, "values": 16, "fillers": 16, "key_tokens": 1, "value_tokens": 1, "segment_tokens": 16,
    },
    **{name: {"pairs": 8, "values": 16, "fillers": 16, "gap": 0, "depth": None} for name in ("copy", "reverse", "sort")},
    "passkey": {"digits": 5, "depth": None, "background": None},
    "needle_single": {"digits": 7, "depth": None, "background": None},
    "needle_multikey": {"pairs": 4, "digits": 7, "depth": None, "background": None},
    "needle_haystack": {"digits": 7, "depth": None},
    "variables": {"pairs": 1, "hops": 4, "background": None},
    **{name: {"facts": n, "background": None} for name, n in (("qa1", 6), ("qa2", 10), ("qa3", 14), ("qa4", 2), ("qa5", 8))},
}  # fmt: skip
"""By task: the settings it reads, besides those that every task reads, and their defaults."""

OF_IDS = ("mqar", "associative", "copy", "reverse", "sort")
"""Tasks with a vocabulary of their own; the others are in the words of ``data.tokenizer``."""

_EVERY_TASK = ("length", "loss", "curriculum")
_IN_STAGES = ("length", "pairs", "queries", "gap", "hops", "facts")


class Stage(Section):
    """What a curriculum sets from a step on."""

    from_step: Count
    """First optimizer step, counted from 0, at which these values hold."""
    length: PositiveInt | None = None
    """Instead of synthetic.length."""
    pairs: PositiveInt | None = None
    """Instead of synthetic.pairs."""
    queries: PositiveInt | None = None
    """Instead of synthetic.queries."""
    gap: Count | None = None
    """Instead of synthetic.gap."""
    hops: PositiveInt | None = None
    """Instead of synthetic.hops."""
    facts: PositiveInt | None = None
    """Instead of synthetic.facts."""


class SyntheticSection(Section):
    """Data that are generated: sample n is a pure function of these settings and (train.seed, n). Null is the task's default."""

    length: PositiveInt | None = None
    """Tokens of one sample; null: data.seq_len. Shorter ones fill a sequence one after the other, each a document of its own."""
    loss: Literal["answers", "all"] = "answers"
    """answers: only the tokens of answers are predicted; all: every next token too (tasks in words)."""
    pairs: PositiveInt | None = None
    """mqar, associative: key-value pairs of a sample; needle_multikey: needles; copy, reverse, sort: symbols; variables: chains."""
    queries: PositiveInt | None = None
    """mqar, associative: pairs that are asked for (mqar: all, associative: 1)."""
    keys: PositiveInt | None = None
    """mqar: different keys; associative: symbols that keys are made of."""
    values: PositiveInt | None = None
    """mqar: different values; associative: symbols that values are made of; copy, reverse, sort: different symbols."""
    fillers: PositiveInt | None = None
    """Tasks of ids: different tokens that stand between."""
    gap: Count | None = None
    """mqar: filler tokens between the last pair and the first query, at least; copy, reverse, sort: between the symbols and the answer."""
    power: float | None = Field(default=None, gt=0)
    """mqar: queries stand at distances from the pairs that follow a power law, density power * distance^(power - 1)."""
    key_tokens: PositiveInt | None = None
    """associative: symbols of one key."""
    value_tokens: PositiveInt | None = None
    """associative: symbols of one value."""
    segment_tokens: PositiveInt | None = None
    """associative: tokens of one segment, which holds one pair at most; the last one holds the queries."""
    digits: Annotated[int, Field(gt=0, le=64)] | None = None
    """passkey, needle_*: digits of the number."""
    hops: PositiveInt | None = None
    """variables: assignments of a chain after its first."""
    facts: PositiveInt | None = None
    """qa1 to qa5: sentences that are told about the world."""
    depth: float | None = Field(default=None, ge=0, le=1)
    """passkey, needle_*, copy, reverse, sort: where the fact stands, 0 the beginning, 1 the end; null: anywhere, evenly."""
    background: str | None = None
    """Tasks in words but needle_haystack: a text file whose sentences stand around the facts; null: sentences of the task's own."""
    curriculum: Annotated[tuple[Stage, ...], Field(strict=False)] = ()
    """Stages {from_step: 0, pairs: 1}, {from_step: 500, pairs: 4} ... in order of from_step; held-out data are of the last one."""

    @model_validator(mode="after")
    def _check_curriculum(self) -> SyntheticSection:
        steps = [stage.from_step for stage in self.curriculum]
        if steps and (steps[0] != 0 or any(b <= a for a, b in pairwise(steps))):
            raise ValueError(f"curriculum has stages from steps {steps}; the first begins at 0, each later one after the one before")
        return self

    def refused(self, task: str) -> str | None:
        """Why ``task`` cannot be made with these settings; None if none of them is foreign to it."""
        reads = DEFAULTS[task]
        for name in type(self).model_fields:
            if name not in _EVERY_TASK and name not in reads and getattr(self, name) is not None:
                return f"data.synthetic.{name} is not read by synthetic/{task}, which reads {', '.join((*_EVERY_TASK, *reads))}"
        if task in OF_IDS and self.loss == "all":
            return f"data.synthetic.loss all is of tasks in words: what follows in synthetic/{task} is drawn by chance; set it to answers"
        for stage in self.curriculum:
            for name in _IN_STAGES:
                if name != "length" and name not in reads and getattr(stage, name) is not None:
                    return f"data.synthetic.curriculum sets {name}, which synthetic/{task} does not read"
        return None

    def of(self, task: str) -> dict[str, Any]:
        """Every setting that ``task`` reads, with its default where it is null."""
        given = {name: getattr(self, name) for name in DEFAULTS[task]}
        return {name: DEFAULTS[task][name] if value is None else value for name, value in given.items()}

    def at(self, step: int) -> SyntheticSection:
        """The settings in force at an optimizer step, the curriculum worked in."""
        stage = next((stage for stage in reversed(self.curriculum) if stage.from_step <= step), None)
        set_now = {} if stage is None else {name: getattr(stage, name) for name in _IN_STAGES if getattr(stage, name) is not None}
        return self.model_copy(update={**set_now, "curriculum": ()})

    @property
    def stages(self) -> list[SyntheticSection]:
        """The settings of every stage in order; these alone without a curriculum."""
        return [self.at(stage.from_step) for stage in self.curriculum] or [self]
