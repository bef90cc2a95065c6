"""What is on its way while a rank computes: counted at every call of a kernel, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from memory_mgmt.offload import HostStore
from models import attention
from models.batch import Bounds
from parallel.allgather_kv import AllGatherKVAttention
from parallel.host_keys import HostKeysAttention
from parallel.hybrid import HybridAttention
from parallel.ring_attention import RingAttention
from parallel.sequence import ranges_for
from parallel.ulysses import UlyssesAttention
from tests.parallel.loopback import Lone, LoopbackDist
from tests.parallel.simulated import MODULES

RANKS, TOKENS = 4, 16


class _Message:
    """Work that is in flight from now until somebody waits for it."""

    def __init__(self, dist: _Counting) -> None:
        self.dist, self.done = dist, False
        dist.in_flight += 1

    def wait(self) -> None:
        self.dist.in_flight -= not self.done
        self.done = True


class _Counting(LoopbackDist):
    """Every message, and how many of them a kernel's call finds in flight."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.found: list[int] = []

    def batch_isend_irecv(self, ops: Any) -> Any:
        super().batch_isend_irecv(ops)
        return [_Message(self)]

    def all_gather(self, *args: Any, **how: Any) -> Any:
        super().all_gather(*args, **how)
        return _Message(self)

    def reduce_scatter(self, *args: Any, **how: Any) -> Any:
        super().reduce_scatter(*args, **how)
        return _Message(self)

    def all_to_all_single(self, *args: Any, **how: Any) -> Any:
        super().all_to_all_single(*args, **how)
        return _Message(self)


WHOLE: Any = Lone(RANKS)
HALF: Any = Lone(2)
CASES: dict[str, tuple[Callable[[], Any], list[int], list[int]]] = {
    # Of a ring all but the last hop; backward the next keys, one hop behind them gradients, and at last those of this rank.
    "ring": (lambda: RingAttention(WHOLE, "zigzag", None), [1, 1, 1, 0], [1, 2, 1, 1]),
    # A turn's first keys on their way across beside those inside.
    "double_ring": (lambda: RingAttention(WHOLE, "zigzag", None, rings=(HALF, HALF)), [2, 1, 1, 0], [1, 2, 1, 1]),
    "halo": (lambda: RingAttention(WHOLE, "contiguous", 5), [2, 2, 0], [0, 2, 2]),
    # The next heads; backward gradients of those before too.
    "allgather_kv": (lambda: AllGatherKVAttention(WHOLE, "contiguous", None), [1, 1, 0, 0], [1, 1, 1, 1]),
    "ulysses": (lambda: UlyssesAttention(WHOLE, "contiguous", None, 1), [1, 1], [1, 1]),
    # Of four stages: the ring's messages, the next heads in all but the last, what goes back in all but the first.
    "ring_x_ulysses": (lambda: HybridAttention(HALF, HALF, "zigzag", None, 1), [2, 1, 3, 2, 3, 2, 2, 1], [1, 2, 2, 3, 2, 3, 1, 2]),
    "host": (lambda: HostKeysAttention(WHOLE, "zigzag", None, HostStore("cpu"), TOKENS), [1, 1, 1, 0], [1, 2, 1, 1]),
}


@pytest.mark.parametrize("name", list(CASES))
def test_the_next_message_is_in_flight_while_a_block_computes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with monkeypatch.context() as patch:
        dist = _Counting()
        for module in MODULES:
            patch.setattr(module, "dist", dist)
        make, forward, backward = CASES[name]
        scheme = make()
        for kernel in ("block_attention", "block_attention_backward"):
            whole = getattr(attention, kernel)
            patch.setattr(attention, kernel, lambda *args, whole=whole: dist.found.append(dist.in_flight) or whole(*args))
        layout = "contiguous" if name in ("halo", "allgather_kv", "ulysses") else "zigzag"
        bounds = Bounds.whole(1, RANKS * TOKENS).with_ranges(
            ranges_for(layout, RANKS * TOKENS, 3 if name == "ring_x_ulysses" else 2, RANKS)
        )
        q, k, v = (torch.randn(1, n, TOKENS, 8, requires_grad=True) for n in (8, 2, 2))
        out = scheme(q, k, v, bounds)
        assert dist.found == forward
        dist.found.clear()
        out.sum().backward()
        assert dist.found == backward
        assert dist.in_flight == 0, "everything that was sent is waited for"
