"""Prefixes of documents: the number in the data, what it means in tokens, and what becomes of it in a sequence.

A prefix is what a document begins with and what all of its tokens see (``models/batch.Bounds.prefixes``), such as a prompt. The data say
for every document how long it is (``data.prefix_key``), 0 for none. In characters: the document is tokenised as a whole, and those of its
first tokens that end inside the first n characters are the prefix; a token that reaches past them is not, so that nothing behind the
prefix is ever seen from inside it. Imports no torch. Try alone: ``python -c "from trainer.data.prefixes import *;
from trainer.data.tokenizers import ByteTokenizer; print(Prefixes('prompt').measured('añb', 2, ByteTokenizer()))"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from trainer.data.documents import BadDocument, Item
from trainer.data.tokenizers import Tokenizer

PREFIX = np.dtype([("tokens", "<i8"), ("bytes", "<i8")])
"""Of one document's prefix: its tokens, and the UTF-8 bytes that they stand for."""


@dataclass(frozen=True)
class Prefixes:
    """Where a source says how long each document's prefix is, and in what it counts."""

    key: str
    unit: Literal["characters", "tokens"] = "characters"

    def checked(self, item: Item, value: Any, origin: str) -> Item:
        """``item`` with the prefix that ``value`` gives it, or why it gives none; what is no document stays as it is."""
        if isinstance(item, BadDocument):
            return item
        if isinstance(value, bool) or not isinstance(value, int):
            said = "is missing" if value is None else f"is {_short(value)}"
            return BadDocument("bad_prefix", origin, f"{self.key!r} (data.prefix_key) {said}, not a number of {self.unit}, 0 for no prefix")
        if value < 0:
            return BadDocument("bad_prefix", origin, f"{self.key!r} (data.prefix_key) is {value}, below 0: 0 stands for no prefix")
        if self.unit == "characters" and value > len(item.text):
            return self._too_long(int(value), len(item.text), origin)
        return replace(item, prefix=int(value))

    def measured(self, text: str, prefix: int, tokenizer: Tokenizer, origin: str = "") -> tuple[int, int] | BadDocument:
        """(tokens, bytes) of the prefix of ``text``, both 0 for none; a BadDocument where it has more tokens than the document."""
        if prefix == 0:
            return 0, 0
        ends = np.maximum.accumulate(tokenizer.character_ends(text))  # a token of nothing, or out of order, ends where those before it do
        if self.unit == "tokens" and prefix > len(ends):
            return self._too_long(prefix, len(ends), origin)
        tokens = prefix if self.unit == "tokens" else int(np.searchsorted(ends, prefix, side="right"))
        return tokens, len(text[: int(ends[tokens - 1])].encode()) if tokens else 0

    def _too_long(self, prefix: int, length: int, origin: str) -> BadDocument:
        return BadDocument("bad_prefix", origin, f"{self.key!r} (data.prefix_key) is {prefix}, and the document has {length} {self.unit}")


@dataclass(frozen=True)
class PrefixUse:
    """What becomes of prefixes in a sequence. ``mask``: every token of a document sees its prefix, later tokens of it included.
    ``loss``: tokens of a prefix are predicted like any others."""

    mask: bool = True
    loss: bool = False


CAUSAL = PrefixUse(mask=False, loss=True)
"""Of data without prefixes."""


def left_of(prefix: int, start: int, stop: int) -> int:
    """How many of a document's tokens [start, stop) are of its prefix of ``prefix`` tokens; one that a sequence's end cuts goes on."""
    return min(max(prefix - start, 0), stop - start)


def ends_of(starts: Sequence[int], prefixes: Sequence[int], seq_len: int) -> tuple[int, ...]:
    """Where the prefix of every document of a sequence ends, for ``Bounds.prefixes``; padding has none. Empty when no document has one."""
    lengths = [*prefixes, *[0] * len(starts)][: len(starts)]
    return tuple(min(start + n, seq_len) for start, n in zip(starts, lengths, strict=True)) if any(lengths) else ()


def predicted_bytes_per_label(documents: np.ndarray, prefixes: np.ndarray | None, use: PrefixUse) -> float:
    """UTF-8 bytes of ``documents`` (DOCUMENT records) per token that is predicted, those of prefixes left out where they are not."""
    given, given_bytes = (0, 0) if prefixes is None or use.loss else (prefixes["tokens"], prefixes["bytes"])
    labels = documents["tokens"] - np.maximum(given, 1)  # nothing comes before the first one
    return float((documents["bytes"] - given_bytes).sum() / max(1, labels.sum()))


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 40 else f"{words[:37]}..."
