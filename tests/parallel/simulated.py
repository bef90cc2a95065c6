"""Ranks that are threads of one process, for the attention schemes: many ranks, many cases, no process start.

``run_simulated(fn, size, *args)`` calls ``fn(*args)`` on every rank with the ``dist`` of the schemes' modules replaced by one that
passes tensors between threads; results by rank. The code between the messages is the real one, its autograd included (a backward pass on
the CPU runs in the thread that asks for it). What gloo itself does with buffers is for the tests on real ranks.
"""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel import allgather_kv, halo, head_exchange, host_keys, hybrid, ring_attention, ring_links, sequence_mask

MODULES = (allgather_kv, halo, head_exchange, host_keys, hybrid, ring_attention, ring_links, sequence_mask)
TIMEOUT = 60.0


class Group:
    """Some of the ranks, by their numbers."""

    def __init__(self, members: Sequence[int]) -> None:
        self.members = list(members)


class _Receiving:
    """Work that is done by ``wait``: take what was sent and put it where it belongs."""

    def __init__(self, actions: Sequence[Callable[[], None]]) -> None:
        self._actions = actions

    def wait(self) -> None:
        for action in self._actions:
            action()


class SimulatedDist:
    """The part of ``torch.distributed`` that the schemes use."""

    def __init__(self, size: int) -> None:
        self._here = threading.local()
        self._boxes: dict[tuple, queue.Queue] = defaultdict(queue.Queue)
        self._lock = threading.Lock()
        self.group = SimpleNamespace(WORLD=Group(range(size)))
        self.ProcessGroup = Group
        self.isend, self.irecv = "send", "receive"

    def enter(self, rank: int) -> None:
        """This thread is ``rank`` from now on."""
        self._here.rank = rank

    def is_initialized(self) -> bool:
        return True

    def get_rank(self, group: Group | None = None) -> int:
        members = (group or self.group.WORLD).members
        return members.index(self._here.rank) if self._here.rank in members else -1

    def get_world_size(self, group: Group | None = None) -> int:
        return len((group or self.group.WORLD).members)

    def _box(self, group: Group | None, source: int, target: int, kind: Any) -> queue.Queue:
        members = (group or self.group.WORLD).members
        with self._lock:
            return self._boxes[tuple(members), members[source], members[target], kind]

    def _send(self, x: torch.Tensor, group: Group | None, target: int, kind: Any) -> None:
        self._box(group, self.get_rank(group), target, kind).put(x.detach().clone())

    def _receive(self, into: torch.Tensor, group: Group | None, source: int, kind: Any, add: bool = False) -> Callable[[], None]:
        box = self._box(group, source, self.get_rank(group), kind)

        def act() -> None:
            x = box.get(timeout=TIMEOUT)
            assert x.shape == into.shape and x.dtype == into.dtype, "sender and receiver agree"
            into.add_(x) if add else into.copy_(x)

        return act

    def P2POp(self, op: str, tensor: torch.Tensor, group: Group | None = None, tag: int = 0, group_peer: int = 0) -> tuple:
        return op, tensor, group, tag, group_peer

    def batch_isend_irecv(self, ops: Sequence[tuple]) -> list[_Receiving]:
        for op, tensor, group, tag, peer in ops:
            if op == "send":
                self._send(tensor, group, peer, tag)
        return [_Receiving([self._receive(tensor, group, peer, tag)]) for op, tensor, group, tag, peer in ops if op == "receive"]

    def _finish(self, receiving: _Receiving, async_op: bool) -> _Receiving | None:
        if async_op:
            return receiving
        receiving.wait()
        return None

    def all_gather(self, parts: list[torch.Tensor], x: torch.Tensor, group: Group | None = None, async_op: bool = False):
        for target in range(self.get_world_size(group)):
            self._send(x, group, target, "gather")
        return self._finish(_Receiving([self._receive(part, group, source, "gather") for source, part in enumerate(parts)]), async_op)

    def reduce_scatter(self, out: torch.Tensor, parts: list[torch.Tensor], group: Group | None = None, async_op: bool = False):
        for target, part in enumerate(parts):
            self._send(part, group, target, "scatter")
        actions = [self._receive(out, group, source, "scatter", add=source > 0) for source in range(len(parts))]
        return self._finish(_Receiving(actions), async_op)

    def all_to_all_single(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        out_sizes: list[int],
        in_sizes: list[int],
        group: Group | None = None,
        async_op: bool = False,
    ):
        for target, part in enumerate(x.split(in_sizes)):
            self._send(part, group, target, "all to all")
        return self._finish(
            _Receiving([self._receive(part, group, source, "all to all") for source, part in enumerate(out.split(out_sizes))]), async_op
        )


def run_simulated(monkeypatch: pytest.MonkeyPatch, fn: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """Call ``fn(dist, *args)`` on ``size`` ranks; results by rank. The first rank's error is raised."""
    dist = SimulatedDist(size)
    for module in MODULES:
        monkeypatch.setattr(module, "dist", dist)
    results: list[Any] = [None] * size
    errors: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        dist.enter(rank)
        try:
            results[rank] = fn(dist, *args)
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise min(errors.items(), key=lambda item: (isinstance(item[1], queue.Empty), item[0]))[1]
    return results
