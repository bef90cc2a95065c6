"""Clusters of documents: the number in the data, and what a sequence has of them.

The data say for every document which cluster of the lowest level it belongs to (``data.cluster_key``), counted from 0 through the whole
hierarchy (``model.hierarchical.branching``), so that its clusters of the levels above follow by division. Layers that fetch parameters by
document read them (``models/hierarchical.py``). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trainer.data.documents import BadDocument, Document, Item

CLUSTER = np.dtype("<i8")
NONE = -1
"""Of padding."""


@dataclass(frozen=True)
class Clusters:
    """Where a source says which cluster each document belongs to, and how many there are."""

    key: str
    count: int

    def checked(self, item: Document, value: Any, origin: str) -> Item:
        """``item`` with the cluster that ``value`` gives it, or why it gives none."""
        if isinstance(value, bool) or not isinstance(value, int):
            said = "is missing" if value is None else f"is {str(value)[:40]!r}"
            return BadDocument("bad_cluster", origin, f"{self.key!r} (data.cluster_key) {said}, not the number of a cluster")
        if not 0 <= value < self.count:
            detail = f"{self.key!r} (data.cluster_key) is {value}, and model.hierarchical.branching has clusters 0 to {self.count - 1}"
            return BadDocument("bad_cluster", origin, detail)
        return replace(item, cluster=int(value))


def stretches(starts: Sequence[int], clusters: Sequence[int], seq_len: int) -> tuple[tuple[int, int], ...]:
    """For ``Bounds.clusters``: (first token, cluster) of the stretches of a sequence whose fragments begin at ``starts`` and have
    ``clusters``; what follows the last one is padding, of none."""
    found: list[tuple[int, int]] = []
    for start, cluster in zip(starts, [*clusters, NONE], strict=True):
        if start < seq_len and (not found or found[-1][1] != cluster):
            found.append((start, cluster))
    return tuple(found)
