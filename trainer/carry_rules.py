"""Which runs can carry memory states from sequence to sequence. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.config import RunConfig


def refused_carrying(config: RunConfig) -> str | None:
    """Why states cannot be carried from sequence to sequence with these settings; None if they can, or are not to be."""
    if config.train.carry_state == "none":
        return None
    wrong = [
        remedy
        for held, remedy in (
            (not config.data.source.startswith("synthetic/"), "documents that go on (generated samples do not)"),
            (
                "memory" in config.model.layer_kinds or config.model.memory.around_stack,
                "a layer of kind memory in model.layers or a memory around them",
            ),
            (config.data.shuffle != "sequences", "data.shuffle documents or none (shuffled sequences do not follow one another)"),
            (not config.data.streaming, "data.streaming false (the rows of a step are neighbours in a stream)"),
            (config.data.document_mask, "data.document_mask true (without it no document begins or ends)"),
            (config.memory.plan != "estimate", "memory.plan trace (formulas know no carried states)"),
            (config.guards.on_not_finite == "stop", "guards.on_not_finite stop (what passes over data leaves a gap in documents)"),
            (config.guards.on_spike in ("report", "stop"), "guards.on_spike report or stop (likewise)"),
        )
        if not held
    ]
    return f"train.carry_state {config.train.carry_state} needs " + " and ".join(wrong) if wrong else None
