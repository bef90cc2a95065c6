"""What a memory layer's exchange over ranks consists of, in numbers that follow from the settings alone. Imports no torch.

Legend: H heads, A states (several per head for Mixture of Memories), K key size, V value size, M slots.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.config import ModelConfig
from models.memory.titans_shapes import TitansShapes
from models.memory_config import AFFINE, HEADWISE


@dataclass(frozen=True)
class ExchangeShapes:
    """One layer and row. A transition that is ``dense`` is a matrix; others are factors."""

    heads: int
    states: int
    dense: bool
    transition: int
    """Numbers of one state's transition."""
    state: int
    """Numbers of one state."""
    columns: int
    """Of the side of a state on which transitions do not act: those that can go around by themselves."""
    to_heads: int
    """Numbers of a token that go to heads."""
    to_tokens: int
    """Numbers of a token that come back."""
    per_chunk: int = 0
    """Numbers that are added up over ranks once per chunk."""
    chunk: int = 0


def exchange_shapes(config: ModelConfig, ranks: int) -> ExchangeShapes | None:
    """Of the memory layers of ``config``, whose heads ``ranks`` ranks may share; None where a family has one exchange only."""
    memory, H, K, V = config.memory, config.memory_heads, config.memory_key_dim, config.memory_value_dim
    if memory.kind not in HEADWISE or memory.attach == "mac":
        return None
    if memory.kind == "titans":
        shapes = TitansShapes.of(config, ranks)
        sums = H * shapes.parts * shapes.fast_weights
        return ExchangeShapes(H, H, False, 0, 0, 1, shapes.features, H * V, sums, memory.titans.chunk_size)
    assert memory.kind in AFFINE
    if memory.kind == "gsa":
        M = memory.gsa.n_slots
        return ExchangeShapes(H, H, False, M, M * (K + V), K + V, H * (2 * K + V + M), H * V)
    if memory.kind == "mamba2":
        shared = sum(_groups(H, memory.mamba2.n_groups, r * H // ranks, (r + 1) * H // ranks) for r in range(ranks))
        return ExchangeShapes(H, H, False, 1, K * V, V, H * (V + 1) + 2 * K * shared, H * V)
    if memory.kind == "infini":
        delta = memory.infini.delta
        return ExchangeShapes(H, H, delta, K * K if delta else 1, K * (K + 1), K + 1, 3 * H * K, H * K)
    copies = memory.mom.n_memories + memory.mom.shared if memory.kind == "mom" else 1
    A, router = copies * H, ranks * memory.mom.n_memories if memory.kind == "mom" else 0
    return ExchangeShapes(H, A, True, K * K, K * V, V, H * K + A * (K + V + 2) + router, A * V)


def _groups(heads: int, groups: int, first: int, last: int) -> int:
    """How many copies of a group's keys the heads [first, last) are sent (`Mamba2._groups_of`)."""
    per_group = heads // groups
    each = [head // per_group for head in range(first, last)]
    whole = first % per_group == last % per_group == 0
    return len(set(each)) if whole or len(set(each)) == 1 else len(each)
