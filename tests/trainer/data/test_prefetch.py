import gc
import threading
import time
from collections.abc import Iterator

import pytest

from trainer.data.prefetch import Prefetcher


def threads() -> int:
    return sum(thread.name == "data-prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_items_come_in_order_and_end(depth: int) -> None:
    with Prefetcher(iter(range(20)), depth) as items:
        assert list(items) == list(range(20))
        assert list(items) == []
    assert threads() == 0


@pytest.mark.parametrize("depth", [0, 2])
def test_error_is_raised_after_the_items_before_it(depth: int) -> None:
    def failing() -> Iterator[int]:
        yield from (1, 2)
        raise KeyError("broken")

    items = Prefetcher(failing(), depth)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(KeyError, match="broken"):
        next(items)
    assert threads() == 0


@pytest.mark.parametrize("depth", [0, 2])
def test_close_stops_the_thread_and_closes_the_source(depth: int) -> None:
    closed = []

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    items = Prefetcher(endless(), depth)
    next(items)
    items.close()
    items.close()
    assert closed == [True]
    assert threads() == 0
    with pytest.raises(StopIteration):
        next(items)


def test_dropped_prefetcher_ends_its_thread() -> None:
    items = Prefetcher(iter(range(10**9)), 1)
    next(items)
    del items
    gc.collect()
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == 0


def test_at_most_depth_items_are_made_ahead() -> None:
    made = []

    def counted() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    with Prefetcher(counted(), 3) as items:
        next(items)
        time.sleep(0.3)
        assert 4 <= len(made) <= 5  # one taken, three ready, one in the hand of the thread
