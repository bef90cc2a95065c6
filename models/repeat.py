"""What the code tells whoever records its operations: loops of equal turns, work that is done again, messages that are not waited for.

A scan over 16,384 chunks takes minutes on fake tensors, and all its turns but the first and the last do the same to memory: such
loops are cut short where only shapes are followed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import groupby
from typing import TypeVar

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

T = TypeVar("T")

TURNS: ContextVar[int] = ContextVar("turns", default=1)
"""How many turns of a loop the present one stands for; a recorder of operations multiplies by it."""

AGAIN: ContextVar[bool] = ContextVar("again", default=False)
"""Whether the present work repeats work of the forward pass."""


IN_FLIGHT: ContextVar[int] = ContextVar("in_flight", default=0)
"""Of a message: how many of its layer, itself included, may be on their way while computation goes on; 0: it is waited for at once."""


@contextmanager
def in_flight(messages: int) -> Iterator[None]:
    """Around the start of a message; see ``IN_FLIGHT``."""
    token = IN_FLIGHT.set(messages)
    try:
        yield
    finally:
        IN_FLIGHT.reset(token)


@contextmanager
def again() -> Iterator[None]:
    """Around work of the forward pass that is done again in the backward pass."""
    token = AGAIN.set(True)
    try:
        yield
    finally:
        AGAIN.reset(token)


def repeated(n: int, x: Tensor) -> Iterator[int]:
    """``range(n)`` for a loop whose turns leave nothing allocated behind and differ only in the values they read.

    When ``x`` is a fake tensor only the first, the second (for all in between) and the last turn are taken.
    """
    if not isinstance(x, FakeTensor) or n <= 3:
        yield from range(n)
        return
    yield 0
    token = TURNS.set(TURNS.get() * (n - 2))
    try:
        yield 1
    finally:
        TURNS.reset(token)
    yield n - 1


def turns(items: Sequence[T], x: Tensor, kind: Callable[[T], Hashable]) -> Iterator[T]:
    """The items, as ``repeated`` takes each run of consecutive ones of equal ``kind``."""
    for _, group in groupby(items, kind):
        run = list(group)
        for i in repeated(len(run), x):
            yield run[i]
