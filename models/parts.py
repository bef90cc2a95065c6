"""Parameters of which a rank holds a part by rows or by columns, as tensor parallelism deals them out.

``Transformer.parts`` says by name which they are; every other parameter is the same on all ranks of a tensor-parallel group. Sharding over
data-parallel ranks (FSDP2) is beside the point here: it deals out the rows of what this rank's group holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Of a parameter: equal parts along ``dim``, of which this rank's group holds number ``rank`` of ``ranks``."""

    dim: int
    rank: int
    ranks: int
    mesh: Any = None
    """The ``DeviceMesh`` (copies, parts, shards of a part) over which the parameter lies; None: no group is there."""
    model: Any = None
    """The ``DeviceMesh`` (copies, ranks that hold one together, parts varying fastest)."""

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of the parameter, from that of the part."""
        return tuple(size * self.ranks if dim == self.dim else size for dim, size in enumerate(shape))

    def of(self, whole: Tensor) -> Tensor:
        """The part of ``whole``, a view."""
        size = whole.shape[self.dim] // self.ranks
        return whole.narrow(self.dim, self.rank * size, size)
