"""Parameters and model FLOPs of each memory architecture, from its settings alone. Imports no torch.

A new kind of ``model.memory.kind`` needs one function in ``_COUNTS``; ``tests/models/test_flops.py`` holds it to the real module.

Legend: H heads, K key size, V value size, M slots, c taps of the convolution (0: none), d d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from models.config import ModelConfig
from models.memory.attached_shapes import AttachedShapes
from models.memory.context_shapes import ContextShapes
from models.memory.titans_shapes import TitansShapes


@dataclass(frozen=True)
class MemoryCounts:
    """One memory layer."""

    matmul: int
    """Parameters that are linear projections of every token."""
    other: int
    """Parameters outside projections: convolutions, gates' scales and biases, norms."""
    mixing: float
    """Forward and backward FLOPs per token outside projections, backward counted as twice forward (see ``models/flops.py``)."""


def _sizes(config: ModelConfig) -> tuple[int, int, int, int]:
    taps = config.memory.conv_kernel if config.memory.conv_kernel > 1 else 0
    return config.memory_heads, config.memory_key_dim, config.memory_value_dim, taps


def _gated_deltanet(config: ModelConfig) -> MemoryCounts:
    """Projections q, k, v, write strength, decay, gate, out. Mixing per head: k S, the rank-1 write and q S, 2 K V each, x 3."""
    H, K, V, c = _sizes(config)
    channels = H * (2 * K + V)
    return MemoryCounts(
        config.d_model * H * (2 * K + 3 * V + 2),
        c * channels + 2 * H + V,
        18.0 * H * K * V + 6.0 * c * channels,
    )


def _gsa(config: ModelConfig) -> MemoryCounts:
    """Projections q, k, v, decays, out. Mixing per head: writing and reading M slots of K + V numbers, 2 each, x 3."""
    H, K, V, c = _sizes(config)
    M, channels = config.memory.gsa.n_slots, H * (2 * K + V)
    return MemoryCounts(
        config.d_model * H * (2 * K + 2 * V + M),
        c * channels + H * V,
        12.0 * H * M * (K + V) + 6.0 * c * channels,
    )


def _mamba2(config: ModelConfig) -> MemoryCounts:
    """Projections x, gate, B, C, dt, out. Mixing per head: the rank-1 write and q S, 2 K V each, x 3, and the skip."""
    H, K, V, c = _sizes(config)
    shared = config.memory.mamba2.n_groups * K
    channels = H * V + 2 * shared
    return MemoryCounts(
        config.d_model * (3 * H * V + 2 * shared + H),
        c * channels + 3 * H + H * V,
        12.0 * H * K * V + 6.0 * H * V + 6.0 * c * channels,
    )


def _titans(config: ModelConfig) -> MemoryCounts:
    """See `models.memory.titans_shapes`: read, prediction, the error taken back and the outer products of every token, x 3."""
    shapes, (H, K, V, c) = TitansShapes.of(config), _sizes(config)
    return MemoryCounts(shapes.matmul_parameters(), shapes.other_parameters(), 3.0 * shapes.scan_flops() + 6.0 * c * H * (2 * K + V))


def _infini(config: ModelConfig) -> MemoryCounts:
    """Projections q, k, v, out, and a gate per head. Mixing per head: writing and reading K (K + 1) numbers, 2 each, with the delta rule
    one more product, and causal attention inside a segment, x 3."""
    H, K = config.memory_heads, config.memory_key_dim
    own = config.memory.infini
    memory = (3 if own.delta else 2) * 2 * H * K * (K + 1)
    return MemoryCounts(4 * config.d_model * H * K, H, 3.0 * (memory + 2 * H * K * (own.segment + 1)))


def _mom(config: ModelConfig) -> MemoryCounts:
    """Gated DeltaNet's with keys, values and gates for every memory, and the router. Mixing: the memories that a token goes to."""
    H, K, V, c = _sizes(config)
    own, d = config.memory.mom, config.d_model
    A, channels = (own.n_memories + own.shared) * H, H * K + (own.n_memories + own.shared) * H * (K + V)
    return MemoryCounts(
        d * (H * (K + 2 * V) + A * (K + V + 2) + own.n_memories),
        c * channels + 2 * A + V,
        18.0 * (own.top_k + own.shared) * H * K * V + 6.0 * c * channels,
    )


def _slots(config: ModelConfig) -> MemoryCounts:
    """Projections q, k, v, out of tokens, with lm2 the gate of what is read. Those of slots, and gates of rewriting, are per segment:
    they are mixing, as attention between tokens and slots is, both ways."""
    own, d, A = config.memory.slots, config.d_model, config.memory_heads * config.memory_key_dim
    lm2, m = own.variant == "lm2", own.n_slots
    of_tokens = 4 * d * A + (A * A if lm2 else 0)
    of_slots = 4 * d * A + d * d
    per_segment = 2 * m * (of_slots + (0 if lm2 else 2 * d * A)) + (2 * d * d if lm2 else 0) + (4 * m * d * A if lm2 else 0)
    return MemoryCounts(
        of_tokens,
        of_slots + d + (d * d if lm2 else m * d),
        3.0 * (8 * m * A + per_segment / own.segment),
    )


def _fam(config: ModelConfig) -> MemoryCounts:
    """Projections q, k, v, out, and the first feedback. Mixing: a window of blocks and the feedback, 2 products, x 3; per block what
    feedback is written and read with."""
    own, d, A = config.memory.fam, config.d_model, config.memory_heads * config.memory_key_dim
    m, window = own.n_feedback, (own.memory_blocks + 0.5) * own.block
    per_block = 12 * m * d * A + 4 * m * (own.block + m) * A
    return MemoryCounts(4 * d * A, m * d, 3.0 * (4 * A * (window + m) + per_block / own.block))


def _neurocache(config: ModelConfig) -> MemoryCounts:
    """Projections: entries, queries, out; keys and values of entries, which meet queries and sums of every token. Mixing: the choice, which
    has no backward, and the entries read, two products, x 3."""
    own, d, H = config.memory.neurocache, config.d_model, config.memory_heads
    A, D, k = H * config.memory_key_dim, max(1, d // own.compression), min(own.top_k, own.cache_size) * own.neighborhood
    return MemoryCounts(d * D + 2 * d * A + 2 * A * D, 0, 2.0 * own.cache_size * D + 12.0 * H * D * (k + 1))


def _as_context(config: ModelConfig, seq_len: int) -> MemoryCounts:
    """See `models.memory.context_shapes`: attention inside a segment, and the memory's own."""
    shapes, (H, K, V, c) = ContextShapes.of(config), _sizes(config)
    mixing = 3.0 * shapes.mixing_flops(seq_len) + 6.0 * c * H * (2 * K + V)
    return MemoryCounts(shapes.matmul_parameters(), shapes.other_parameters(), mixing)


_COUNTS: dict[str, Callable[[ModelConfig], MemoryCounts]] = {
    "gated_deltanet": _gated_deltanet,
    "gsa": _gsa,
    "mamba2": _mamba2,
    "titans": _titans,
    "infini": _infini,
    "mom": _mom,
    "slots": _slots,
    "neurocache": _neurocache,
    "fam": _fam,
}


def memory_counts(config: ModelConfig, seq_len: int = 1) -> MemoryCounts:
    """Of one layer of kind ``memory``, attention beside the memory included; ``seq_len`` matters to that attention's ``mixing`` only.
    Raises KeyError for a kind that is not counted."""
    if config.memory.around_stack:
        return MemoryCounts(0, 0, 0.0)  # no layer: models/memory/stack_shapes.py
    if config.memory.attach == "mac":
        return _as_context(config, seq_len)
    memory = _COUNTS[config.memory.kind](config)
    if config.memory.attach == "mixer":
        return memory
    beside = AttachedShapes.of(config)
    return MemoryCounts(
        memory.matmul + beside.matmul_parameters(),
        memory.other + beside.other_parameters(),
        memory.mixing + beside.mixing_flops(seq_len),
    )
