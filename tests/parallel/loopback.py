"""One rank of a group that is alone: it receives its own messages, or zeros, so that every buffer has the size that it has in the group."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parallel.simulated import MODULES


class Lone:
    """A group of ``size`` ranks, of which this is the one in the middle."""

    def __init__(self, size: int) -> None:
        self.size = size


class _Done:
    def wait(self) -> None:
        pass


class LoopbackDist:
    """The part of ``torch.distributed`` that the schemes use."""

    ProcessGroup = Lone
    isend, irecv = "send", "receive"

    def get_rank(self, group: Lone) -> int:
        return group.size // 2

    def get_world_size(self, group: Lone) -> int:
        return group.size

    def P2POp(self, op: str, tensor: torch.Tensor, **where: Any) -> tuple[str, torch.Tensor]:
        return op, tensor

    def batch_isend_irecv(self, ops: list[tuple[str, torch.Tensor]]) -> list[_Done]:
        for op, tensor in ops:
            if op == self.irecv:
                tensor.zero_()
        return [_Done()]

    def all_gather(self, parts: list[torch.Tensor], x: torch.Tensor, **how: Any) -> _Done:
        for part in parts:
            part.copy_(x)
        return _Done()

    def reduce_scatter(self, out: torch.Tensor, parts: list[torch.Tensor], **how: Any) -> _Done:
        out.copy_(parts[0])
        return _Done()

    def all_to_all_single(self, out: torch.Tensor, x: torch.Tensor, *sizes: Any, **how: Any) -> _Done:
        out.zero_()
        out[: x.numel()].copy_(x[: out.numel()])
        return _Done()


def be_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the schemes' modules such a ``dist``; groups are ``Lone``."""
    for module in MODULES:
        monkeypatch.setattr(module, "dist", LoopbackDist())
