"""What one micro-step is made of, in coordinates of the whole sequence.

A sequence-parallel rank holds some *ranges* of a sequence. Everything that depends on where a token stands (masks,
rotary positions, convolutions, carried states) reads these global coordinates and never the local index.

Legend: B batch row, T tokens held by this rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

IGNORE_INDEX = -100
"""Label of a token that does not count in the loss."""

Range = tuple[int, int]
"""Half-open range of global token indices."""


@dataclass(frozen=True)
class Bounds:
    """Which tokens this rank holds and where documents begin; plain integers, identical on CPU and GPU.

    ``ranges`` are the global ranges held here, in local order; ``documents`` holds, per batch row, the sorted global
    start index of every document in the *whole* sequence (the first is 0), identical on every rank. ``prefixes`` holds where the
    prefix of each of these documents ends, its start for none; empty when no document of any row has one. Attention lets all tokens
    of a document see its prefix (a prefix as long as the document: attention in both directions); memory layers stay causal.
    ``clusters`` holds, per row, (first token, cluster) of every stretch of the whole sequence whose documents are of one cluster, in
    order, for layers that fetch parameters by document (``models/hierarchical.py``); -1: of none; empty: no document of any row has one.
    """

    seq_len: int
    ranges: tuple[Range, ...]
    documents: tuple[tuple[int, ...], ...]
    prefixes: tuple[tuple[int, ...], ...] = ()
    clusters: tuple[tuple[tuple[int, int], ...], ...] = ()
    _cache: dict = field(default_factory=dict, compare=False, repr=False)
    """Scratch for derived host-side plans (tile lists), shared by all layers of one forward and backward pass."""

    @property
    def local_len(self) -> int:
        """Tokens held by this rank per row."""
        return sum(end - start for start, end in self.ranges)

    def with_ranges(self, ranges: tuple[Range, ...]) -> Bounds:
        """The same sequence seen by a rank that holds other ranges."""
        return Bounds(self.seq_len, ranges, self.documents, self.prefixes, self.clusters)

    @staticmethod
    def whole(batch_size: int, seq_len: int) -> Bounds:
        """One document per row, all of it on one rank."""
        return Bounds(seq_len, ((0, seq_len),), ((0,),) * batch_size)


@dataclass(frozen=True)
class Batch:
    """One micro-step. ``labels_BT[b, t]`` is the token that follows ``tokens_BT[b, t]`` or IGNORE_INDEX; shifting
    happens before any split. ``positions_BT`` counts from the start of the document. All tensors are of int32 (where
    a sequence is read in segments they are what grows with its length) or int64."""

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    positions_BT: torch.Tensor
    bounds: Bounds
    continued: tuple[bool, ...] = ()
    """Per row, whether its first token follows the last one of the same row of the step before in one document; empty: no row's does."""

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``."""
        return replace(
            self,
            tokens_BT=self.tokens_BT.to(device, non_blocking=True),
            labels_BT=self.labels_BT.to(device, non_blocking=True),
            positions_BT=self.positions_BT.to(device, non_blocking=True),
        )
