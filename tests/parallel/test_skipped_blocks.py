"""What documents and windows hide is not computed, under every scheme: scores of all kernel calls of all ranks, counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models import attention
from models.batch import Bounds
from models.block import MaskKind
from parallel.allgather_kv import AllGatherKVAttention
from parallel.hybrid import HybridAttention
from parallel.ring_attention import RingAttention
from parallel.sequence import ranges_for
from parallel.ulysses import UlyssesAttention
from tests.parallel.simulated import Group, run_simulated

RANKS, TOKENS, HEADS = 4, 2048, 4
DOCUMENTS = tuple(range(0, TOKENS, TOKENS // 8))
CASES: dict[str, tuple[tuple[int, ...], int | None, float]] = {
    "one document": ((0,), None, 1.0),
    "eight documents": (DOCUMENTS, None, 1 / 8),
    "a window longer than a shard": ((0,), 520, 0.75),
    "window and documents": (DOCUMENTS, 64, 0.11),
}
"""By name: documents, window, and the share of a causal sequence's scores that may be computed."""


def _attention(dist: Any, scheme: str, window: int | None) -> Any:
    rank, whole = dist.get_rank(), Group(range(RANKS))
    near, far = Group([rank // 2 * 2, rank // 2 * 2 + 1]), Group([rank % 2, rank % 2 + 2])
    made = {
        "ring": lambda: RingAttention(whole, "zigzag", window),  # type: ignore[arg-type]
        "double_ring": lambda: RingAttention(whole, "zigzag", window, rings=(near, far)),  # type: ignore[arg-type]
        "ulysses": lambda: UlyssesAttention(whole, "zigzag", window, 1),  # type: ignore[arg-type]
        "ring_x_ulysses": lambda: HybridAttention(near, far, "zigzag", window),  # type: ignore[arg-type]
        "allgather_kv": lambda: AllGatherKVAttention(whole, "zigzag", window, 1),  # type: ignore[arg-type]
    }
    return made[scheme]()


def _on_a_rank(dist: Any, scheme: str, documents: tuple[int, ...], window: int | None) -> None:
    ranges = ranges_for("zigzag", TOKENS, dist.get_rank(), RANKS)
    bounds = Bounds(TOKENS, ((0, TOKENS),), (documents,)).with_ranges(ranges)
    q, k, v = (torch.randn(1, HEADS, TOKENS // RANKS, 8, requires_grad=True) for _ in range(3))
    _attention(dist, scheme, window)(q, k, v, bounds).sum().backward()


@pytest.mark.parametrize("scheme", ["ring", "double_ring", "ulysses", "ring_x_ulysses", "allgather_kv"])
def test_hidden_blocks_are_not_computed(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    counted: dict[str, list[float]] = {}

    def counting(name: str, at: int) -> None:
        kernel = getattr(attention, name)

        def call(*args: Any) -> Any:
            q, k, mask = args[at], args[at + 1], next(x for x in args if isinstance(x, attention.BlockMask))
            share = 0.5 if mask.kind is MaskKind.CAUSAL else 1.0
            counted.setdefault(name, []).append(share * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
            return kernel(*args)

        monkeypatch.setattr(attention, name, call)

    counting("block_attention", 0)
    counting("block_attention_backward", 1)
    whole = HEADS * TOKENS**2 / 2
    for name, (documents, window, share) in CASES.items():
        counted.clear()
        run_simulated(monkeypatch, _on_a_rank, RANKS, scheme, documents, window)
        forward, backward = (sum(calls) / whole for calls in counted.values())
        assert forward == backward, name
        if window is None:
            assert forward == share, f"{name}: every visible score once and no other"
        else:
            assert forward < share, name
