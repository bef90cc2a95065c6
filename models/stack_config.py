"""Settings of memories that stand around the whole stack of layers: a sequence is read segment after segment. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from models.section import PositiveInt, Section

STACK_KINDS = ("rmt", "armt")
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


def refused_pattern(kind: str, layers: Sequence[str], feedforward: Sequence[str]) -> str | None:
    """Why a memory of ``kind`` cannot stand around such layers; None if it can."""
    if "memory" in layers:
        return f"memory.kind {kind} stands around the whole stack and is no layer of it: name full or swa in layers, not memory"
    if "product_keys" in feedforward:
        return f"memory.kind {kind} runs the layers segment by segment, which feedforward product_keys does not know: name dense"
    return None
