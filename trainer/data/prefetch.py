"""Make items ready in a background thread. Nothing is lost: the position travels with each item, not with the thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")


class _End:
    """Put last by the thread; carries the error that ended it, if any."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Prefetcher(Iterator[Item], Generic[Item]):
    """The items of ``items`` in order, up to ``depth`` of them made before they are asked for; 0 makes each when asked.

    An error raised by ``items`` is raised here, after the items that came before it. ``close`` (also at the end of a ``with``
    block and when the object is dropped) stops the thread, closes a generator, and ends the iteration.
    """

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        self._items = items
        self._ready: queue.Queue[Item | _End] = queue.Queue(max(depth, 1))
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if depth > 0:
            # The thread knows the queue and not this object, so that dropping this object can end it.
            self._thread = threading.Thread(target=_fill, args=(items, self._ready, self._stop), name="data-prefetch", daemon=True)
            self._thread.start()

    def __next__(self) -> Item:
        if self._stop.is_set():
            raise StopIteration
        if self._thread is None:
            return next(self._items)
        item = self._ready.get()
        if not isinstance(item, _End):
            return item
        self.close()
        if item.error is not None:
            raise item.error
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it (at most 10 s, should it be stuck in a read); may be called twice."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
            if self._thread.is_alive():
                return  # a daemon thread: it does not keep the process alive
        close = getattr(self._items, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> Prefetcher[Item]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self._stop.set()


def _fill(items: Iterator[Item], ready: queue.Queue[Item | _End], stop: threading.Event) -> None:
    end = _End(None)
    try:
        for item in items:
            if not _put(ready, item, stop):
                return
    except BaseException as error:
        end = _End(error)
    _put(ready, end, stop)


def _put(ready: queue.Queue[Item | _End], item: Item | _End, stop: threading.Event) -> bool:
    """Wait for room unless told to stop."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.05)
            return True
        except queue.Full:
            continue
    return False
