"""Sequences made while the source is read: in file order, for sources too large to tokenise first.

The position is exact: it names the document (part and position in its source) and the token in it where the next sequence begins.
Tokens that were read ahead are not stored in it but read again. Sequence by sequence the result equals a token store's with
``shuffle: none`` and nothing held out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Literal

import numpy as np

from models.errors import UserError
from trainer.data.beside import NOTHING, Beside
from trainer.data.documents import BadDocument, Source
from trainer.data.packing import PackedSequence, pack
from trainer.data.prefixes import CAUSAL, PrefixUse, left_of
from trainer.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Place:
    """Where the next sequence begins; plain integers. ``skipped``: bad documents left out before it, by reason."""

    sequences: int = 0
    epoch: int = 0
    unit: int = 0
    position: int = 0
    offset: int = 0
    skipped: tuple[tuple[str, int], ...] = ()

    def to_cursor(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**vars(self), "skipped": dict(self.skipped)}

    @staticmethod
    def from_cursor(cursor: dict[str, Any]) -> Place:
        """Inverse of ``to_cursor``; other keys are left alone. Raises UserError when it is not one."""
        try:
            fields = {name: int(cursor[name]) for name in ("sequences", "epoch", "unit", "position", "offset")}
            return Place(**fields, skipped=tuple(sorted((str(k), int(v)) for k, v in cursor["skipped"].items())))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"the saved data position is damaged ({error!r}); resume from another checkpoint") from error


@dataclass
class _Held:
    """A document that has been read, of which tokens from ``offset`` on are not yet consumed."""

    unit: int
    position: int
    tokens: np.ndarray
    prefix: int
    cluster: int | None
    offset: int
    skipped: tuple[tuple[str, int], ...]


_Fragments = tuple[list[np.ndarray], list[int], list[int]]
"""Of one sequence; no clusters where documents have none."""


class SequenceStream:
    """All sequences of a source from a place on, epoch after epoch."""

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        document_mask: bool,
        on_bad_document: Literal["error", "skip"],
        key: str = "data.path",
        beside: Beside = NOTHING,
        prefix_use: PrefixUse = CAUSAL,
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.document_mask = document_mask
        self.on_bad_document = on_bad_document
        self.key = key
        self.prefixes, self.prefix_use = beside.prefixes, prefix_use
        self.units = source.units()

    def read(self, place: Place) -> Iterator[tuple[Callable[[], PackedSequence], Place]]:
        """(function that packs the sequence, place after it), for ever.

        Raises UserError at a bad document (unless they are skipped), when there is no document, or when the source is not the one
        that the place was taken in.
        """
        while True:
            for (fragments, prefixes, clusters), after in self._epoch(place):
                place = after
                made_of = fragments, self.seq_len, self.document_mask, self.tokenizer.pad_id, prefixes, self.prefix_use, clusters
                yield partial(pack, *made_of), place

    def _epoch(self, place: Place) -> Iterator[tuple[_Fragments, Place]]:
        """What each sequence is made of (T + 1 tokens, the last a mere label) to the end of the epoch, and the place after it."""
        skipped = dict(place.skipped)
        documents = self._documents(place, skipped)
        pending: deque[_Held] = deque()
        available = 0
        for sequences in count(place.sequences + 1):
            while available <= self.seq_len and (held := next(documents, None)) is not None:
                pending.append(held)
                available += len(held.tokens) - held.offset
            if not available:  # nothing at all: the last sequence of an epoch returns below
                raise UserError(f"{self.key}: no usable document; nothing to train on")
            fragments = _peek(pending, self.seq_len + 1)
            available -= _consume(pending, self.seq_len)
            if not pending:
                yield fragments, Place(sequences, place.epoch + 1, skipped=_frozen(skipped))
                return
            held = pending[0]
            yield fragments, Place(sequences, place.epoch, held.unit, held.position, held.offset, held.skipped)

    def _documents(self, place: Place, skipped: dict[str, int]) -> Iterator[_Held]:
        """Tokenised documents from a place to the end of the source; counts bad ones in ``skipped``."""
        offset = place.offset
        for unit in range(place.unit, len(self.units)):
            for position, item in self.source.read(self.units[unit], place.position if unit == place.unit else 0):
                if isinstance(item, BadDocument):
                    self._pass_over(item, skipped)
                    continue
                prefix = self.prefixes.measured(item.text, item.prefix, self.tokenizer, item.origin) if self.prefixes else (0, 0)
                if isinstance(prefix, BadDocument):
                    self._pass_over(prefix, skipped)
                    continue
                tokens = np.append(self.tokenizer.encode_batch([item.text])[0], self.tokenizer.eos_id)
                if offset >= len(tokens):
                    raise UserError(f"{item.origin}: shorter than when the run was saved; {self.key} must not change while streaming")
                yield _Held(unit, position, tokens, prefix[0], item.cluster, offset, _frozen(skipped))
                offset = 0

    def _pass_over(self, document: BadDocument, skipped: dict[str, int]) -> None:
        if self.on_bad_document == "error":
            raise document.error()
        skipped[document.reason] = skipped.get(document.reason, 0) + 1


def _frozen(counts: dict[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(counts.items()))


def _peek(pending: deque[_Held], n: int) -> _Fragments:
    """The next ``n`` tokens, or as many as there are, one array per document, how many of each are of a prefix, and its cluster."""
    found, prefixes, clusters = [], [], []
    for held in pending:
        if n <= 0:
            break
        found.append(held.tokens[held.offset : held.offset + n])
        prefixes.append(left_of(held.prefix, held.offset, held.offset + len(found[-1])))
        if held.cluster is not None:
            clusters.append(held.cluster)
        n -= len(found[-1])
    return found, prefixes, clusters


def _consume(pending: deque[_Held], n: int) -> int:
    """Drop the next ``n`` tokens, or as many as there are; how many they were."""
    left = n
    while left and pending:
        taken = min(left, len(pending[0].tokens) - pending[0].offset)
        pending[0].offset += taken
        left -= taken
        if pending[0].offset == len(pending[0].tokens):
            pending.popleft()
    return n - left
