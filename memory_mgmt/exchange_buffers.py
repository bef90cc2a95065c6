"""Buffers of one layer's exchange under every sequence scheme, from shapes: what a rank holds in backward beside the kernel's own.

The formulas follow the schemes of parallel/ tensor by tensor, at their fullest moment in the backward pass, and are tested against the CPU
allocator's log. Imports no torch.

Legend: P ranks, U of a Ulysses group, S stages; H query and G key/value heads of the model; W query heads of all ranks in one stage, K the
key/value heads that these read; b bytes of a value, k of one of keys and values on their way, w of a gradient that is added up. Counted in
values of one head and this rank's tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from parallel.config import SequenceScheme
from parallel.head_plan import Stage, keys_are_shared, plan_stages


@dataclass(frozen=True)
class Exchange:
    """One layer of full attention on a rank.

    Args:
        scheme, size: how many ranks share the sequence, and by what.
        degree: ranks of a Ulysses group for ring_x_ulysses.
        heads, kv_heads: of the model.
        value, wide: bytes of a computed value, and of a gradient that is added up.
        head_chunk: as ``parallel.head_chunk``.
        staged: projections are made stage by stage (``memory_mgmt/staged_attention.py``).
        key: bytes of a value of keys and values on their way (``parallel.kv_dtype``); None: as computed.
    """

    scheme: SequenceScheme
    size: int
    degree: int
    heads: int
    kv_heads: int
    value: int
    wide: int
    head_chunk: int | None = None
    staged: bool = False
    key: int | None = None

    def bytes_per_token(self) -> int:
        """For every value of a head and token: times tokens and head size."""
        if self.scheme == "ring":
            return self._ring(self.size, self.heads, self.kv_heads)
        if self.scheme == "double_ring":  # a turn's first keys on their way across
            return self._ring(self.size, self.heads, self.kv_heads) + 2 * self.kv_heads * self._sent
        return self._gathered() if self.scheme == "allgather_kv" else self._by_heads()

    @property
    def tokens_together(self) -> int:
        """Of how many ranks a rank attends with queries and keys in one call."""
        return self._group if self.scheme in ("ulysses", "ring_x_ulysses") else 1

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Of the heads that a Ulysses group deals."""
        return plan_stages(self.heads, self.kv_heads, self._group, self.head_chunk)

    @property
    def stage_heads(self) -> tuple[int, int]:
        """(W, K) of the largest stage."""
        return max(_count(stage.q) for stage in self.stages), max(_count(stage.kv) for stage in self.stages)

    @property
    def _sent(self) -> int:
        """Bytes of a value of keys and values on their way."""
        return self.value if self.key is None else self.key

    @property
    def _read(self) -> int:
        """Of one that was narrow on its way, as it is computed with."""
        return self.value if self._sent < self.value else 0

    @property
    def _group(self) -> int:
        return self.size if self.scheme == "ulysses" else self.degree

    def _ring(self, size: int, heads: int, kv_heads: int) -> int:
        """Keys and values in hand and arriving, and those in hand as they are computed with where that is wider; their wide gradients,
        sent and arriving (a hop's own, of one call, are added to what arrived), and those of the queries."""
        more = 2 if size > 2 else 1
        return kv_heads * (more * 2 * self._sent + 4 * self.wide + 2 * self._read) + heads * self.wide

    def _gathered(self) -> int:
        """Keys and values of a chunk of heads from all ranks: here, in order, those of the next chunk on their way in two places; wide
        gradients: sums, in order and on their way."""
        chunk = min(self.head_chunk or 1, self.kv_heads)
        several = math.ceil(self.kv_heads / chunk) > 1
        return 2 * self.size * chunk * (2 * self.value + (2 if several else 1) * self._sent + 3 * self.wide)

    def _by_heads(self) -> int:
        """The fullest stage: its q, k, v, out and dout, those of the next one sent and arriving; what the kernel has made of it, and
        gradients of keys that another stage reads too; those of the stage before, sent home and arriving."""
        stages, gradient = self.stages, self.wide if keys_are_shared(self.heads, self.kv_heads, self._group) else self.value
        home = [_count(stage.q) * self.value + 2 * _count(stage.leaving) * gradient for stage in stages]
        if len(stages) == 1:
            queries, keys = self.stage_heads
            here, back = (3 * queries + 2 * keys) * self.value, 2 * home[0]
            ordered = (
                2 * here - 2 * (queries + keys) * self.value
            )  # as it came and in order, before the kernel makes as much as counts there
            return max(here + self._inner_ring(queries, keys), ordered, back) + self._projected(stages[0], home[0])
        most = 0
        for i, stage in enumerate(stages):
            queries, keys = _count(stage.q), _count(stage.kv)
            total = (3 * queries + 2 * keys) * self.value + (queries + 2 * keys) * self.value + self._inner_ring(queries, keys)
            if i + 1 < len(stages):
                total += 2 * (3 * _count(stages[i + 1].q) * self.value + 2 * _count(stages[i + 1].arriving) * self._sent)
                total += self._projected(stages[i + 1], 0)
            total += 2 * keys * self.wide if stage.arriving != stage.kv or stage.leaving != stage.kv else 0
            total += 2 * home[i - 1] if i else 0
            most = max(most, total + (home[i - 1] if self.staged and i else 0))
        return most

    def _projected(self, stage: Stage, landing: int) -> int:
        """Of projections that a stage makes itself: q, k, v until they are sent, and where their gradients land."""
        return (_count(stage.q) + 2 * _count(stage.arriving)) * self.value + landing if self.staged else 0

    def _inner_ring(self, queries: int, keys: int) -> int:
        """A ring whose members have the tokens of a group, and of its heads one rank's; the own keys in one piece."""
        if self.scheme != "ring_x_ulysses":
            return 0
        return self._ring(self.size // self.degree, queries, keys) + 2 * keys * self._sent


def _count(by_rank: tuple[tuple[int, int], ...]) -> int:
    return sum(last - first for first, last in by_rank)
