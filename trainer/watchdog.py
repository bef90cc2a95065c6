"""A rank that makes no step any more says where every thread of it stands, and ends, so that the run can go on elsewhere.

The limit follows the run: so many times the median step, never less than a minimum. Python's main thread may be stuck in a collective
for ever; the watchdog is a thread of its own, which needs the main thread only to let go of the interpreter while it waits, as torch,
file systems and sleeps do. Times are on the monotonic clock: a clock that is set does not end a run. Imports no torch.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from parallel.launcher import HUNG
from parallel.log_lines import native_descriptors, stamp

LONG = 3.0
"""Times the minimum: what the first steps, an evaluation or a save may take."""
KNOWN_STEPS = 3
"""From how many steps on there is a median to go by."""
_RECENT = 200
_TELL_SECONDS = 5.0
"""For the stacks, and as long for the account of the end: a log is a file, and one on a file system that hangs must not keep the rank from
ending."""


class Watchdog:
    """Watches from ``with`` to its end. ``beat`` after every step."""

    def __init__(
        self,
        times_median: float,
        min_seconds: float,
        account: Callable[[str], None] = lambda reason: None,
        *,
        peers_seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``times_median`` 0 switches it off. ``account``: called with the reason before the end, in a thread.

        ``peers_seconds``: waited before the end, because the other ranks hang too, and are ended when this one is: they get time to say
        where they stand.
        """
        self.times_median, self.min_seconds = times_median, min_seconds
        self._account, self._peers_seconds, self._clock = account, peers_seconds, clock
        self._steps: deque[float] = deque(maxlen=_RECENT)
        self._beat, self._long = clock(), True
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self.times_median:
            self._beat = self._clock()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def beat(self, *, step_seconds: float | None = None, long: bool = False) -> None:
        """Something was finished, a step if ``step_seconds`` is given. ``long``: what comes next is no step, and may take longer."""
        if step_seconds is not None:
            self._steps.append(step_seconds)
        self._beat, self._long = self._clock(), long

    @property
    def limit(self) -> float:
        """Seconds that may pass from the last beat to the next."""
        if self._long or len(self._steps) < KNOWN_STEPS:
            return max(LONG * self.min_seconds, self.times_median * max(self._steps, default=0.0))
        return max(self.min_seconds, self.times_median * statistics.median(self._steps))

    def overdue(self) -> str:
        """Why the rank counts as hung; empty while it does not."""
        waited, limit = self._clock() - self._beat, self.limit
        if waited <= limit:
            return ""
        median = f", the median step takes {statistics.median(self._steps):.3g} s" if self._steps else ""
        return f"no step for {waited:.0f} s (the limit is {limit:.0f} s{median})"

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.min_seconds / 10)):
            if reason := self.overdue():
                self._end(reason)

    def _end(self, reason: str) -> None:
        for tell, words in ((_write_stacks, reason), (self._account, f"hung: {reason}")):
            telling = threading.Thread(target=tell, args=(words,), daemon=True)
            telling.start()
            telling.join(_TELL_SECONDS)
        time.sleep(self._peers_seconds)
        os._exit(HUNG)


def _write_stacks(reason: str) -> None:
    for descriptor in native_descriptors():
        os.write(descriptor, f"{stamp()}error: hung: {reason}; every thread stands here:\n".encode())
        faulthandler.dump_traceback(file=descriptor, all_threads=True)
