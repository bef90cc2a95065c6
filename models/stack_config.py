"""Settings of memories that stand around the whole stack of layers: a sequence is read segment after segment. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import model_validator

from models.section import PositiveInt, Section

STACK_KINDS = ("rmt", "armt", "hmt")
"""Kinds of ``model.memory.kind`` that are no layers: every layer of ``model.layers`` works inside one segment of them."""


class RmtConfig(Section):
    """What only the Recurrent Memory Transformer reads (arXiv 2207.06881)."""

    segment: PositiveInt = 512
    """Tokens that the layers see at once, counted from a document's start. Part of the model: another length is another model."""
    tokens: PositiveInt = 16
    """Memory tokens, read at a segment's start and written at its end."""


class ArmtConfig(Section):
    """What only the Associative Recurrent Memory Transformer reads (arXiv 2407.04841)."""

    segment: PositiveInt = 512
    """Tokens that the layers see at once, counted from a document's start. Part of the model: another length is another model."""
    tokens: PositiveInt = 16
    """Memory tokens behind every segment, whose outputs each layer writes into its memory."""
    key_dim: PositiveInt = 64
    """Size of queries and keys."""
    features: PositiveInt = 3
    """Of the feature map: a layer's memory has 2 x key_dim x features rows of d_model numbers."""


class HmtConfig(Section):
    """What only the Hierarchical Memory Transformer reads (arXiv 2405.06067)."""

    segment: PositiveInt = 512
    """Tokens that the layers see at once, counted from a document's start. Part of the model: another length is another model."""
    summary: PositiveInt | None = None
    """Tokens before a segment from which the query is made; null: half a segment."""
    sensory: PositiveInt = 32
    """Tokens before a segment that its tokens see."""
    cache: PositiveInt = 128
    """Memory embeddings of earlier segments that are recalled from."""

    @model_validator(mode="after")
    def _check_lengths(self) -> HmtConfig:
        for name, value in (("summary", self.summary_tokens), ("sensory", self.sensory)):
            if value > self.segment:
                raise ValueError(f"{name} {value} is more than the segment of {self.segment} tokens before; lower it")
        return self

    @property
    def summary_tokens(self) -> int:
        """``summary`` after defaults."""
        return self.summary or max(1, self.segment // 2)


def refused_pattern(kind: str, layers: Sequence[str], feedforward: Sequence[str]) -> str | None:
    """Why a memory of ``kind`` cannot stand around such layers; None if it can."""
    if "memory" in layers:
        return f"memory.kind {kind} stands around the whole stack and is no layer of it: name full or swa in layers, not memory"
    if tables := [kind for kind in feedforward if kind != "dense"]:
        return f"memory.kind {kind} runs the layers segment by segment, which feedforward {tables[0]} does not know: name dense"
    return None
