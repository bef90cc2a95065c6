"""What stands beside the text of a document in sources with columns or keys: how long its prefix is, which cluster it belongs to.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.clusters import Clusters
from trainer.data.documents import BadDocument, Document, Item
from trainer.data.prefixes import Prefixes


@dataclass(frozen=True)
class Beside:
    """What a source reads beside texts; nothing by default."""

    prefixes: Prefixes | None = None
    clusters: Clusters | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Columns or JSON keys, in the order in which ``checked`` takes their values."""
        return tuple(one.key for one in (self.prefixes, self.clusters) if one is not None)

    def checked(self, item: Item, values: Sequence[Any], origin: str) -> Item:
        """``item`` with what ``values`` of ``keys`` say of it, or why they do not; what is no document stays as it is."""
        for one, value in zip((one for one in (self.prefixes, self.clusters) if one is not None), values, strict=True):
            if not isinstance(item, Document):
                return item
            item = one.checked(item, value, origin)
        return item

    def missing(self, names: Sequence[str], path: str) -> BadDocument | None:
        """What to report where a table has no column of a key; None if all are there."""
        for one, setting, reason in ((self.prefixes, "data.prefix_key", "bad_prefix"), (self.clusters, "data.cluster_key", "bad_cluster")):
            if one is not None and one.key not in names:
                return BadDocument(reason, path, f"no column {one.key!r} (columns: {', '.join(names)}); {setting} names it")
        return None

    def fingerprint(self) -> list[str]:
        """What a source's fingerprint says of it: nothing where there is nothing."""
        found = [] if self.prefixes is None else [self.prefixes.key, self.prefixes.unit]
        return found if self.clusters is None else [*found, f"clusters {self.clusters.key}", str(self.clusters.count)]


NOTHING = Beside()
