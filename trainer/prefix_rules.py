"""Which runs can show a document its whole prefix (``data.prefix_key``). Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.config import RunConfig


def refused_prefixes(config: RunConfig) -> str | None:
    """Why prefixes that all of a document sees cannot be with these settings; None if they can, or are not to be."""
    if not config.data.bidirectional_prefixes:
        return None
    memory = config.model.memory
    wrong = [
        remedy
        for held, remedy in (
            (config.model.has_attention, "a layer of attention in model.layers or beside a memory (memories read in one direction)"),
            (not memory.around_stack, f"model.memory.kind other than {memory.kind}, which reads a segment before the next one is there"),
            (
                "memory" not in config.model.layer_kinds or memory.attach != "mac",
                "model.memory.attach mixer, mag, mal or after (mac reads a segment before the next one is there)",
            ),
            (config.train.segment_tokens is None, "train.segment_tokens null (a segment is read before the next one is there)"),
            (config.memory.plan != "estimate", "memory.plan trace (formulas know no prefixes)"),
        )
        if not held
    ]
    return f"data.prefix_mask bidirectional needs {' and '.join(wrong)}; or set data.prefix_mask=causal" if wrong else None
