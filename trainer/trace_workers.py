"""Processes that trace steps for this one: started when the first trace is wanted, kept for the next, ended when idle. Imports no torch.

Half of the time of a small trace is importing torch, and a choice of a policy asks for one trace after another. Several traces that are
wanted at once are made side by side.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from models.errors import UserError

HOME = Path(__file__).resolve().parent.parent
IDLE_SECONDS = 20.0
"""After which a worker ends by itself."""
MOST = 4
"""Workers at a time: each holds about half a GiB."""


class _Died(Exception):
    """A worker ended without an answer; says why, as far as is known."""


class _Worker:
    """One process that traces for a device type."""

    def __init__(self, device_type: str) -> None:
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  # it lives as long as the process
        command = [sys.executable, "-m", "trainer.trace_process", device_type, str(os.getpid()), str(IDLE_SECONDS)]
        self._process = subprocess.Popen(
            command, cwd=HOME, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, start_new_session=True
        )

    def trace(self, request: dict[str, Any]) -> str:
        """Have the trace of ``request`` written where it says. Returns why it could not be, or nothing. Raises _Died."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer.endswith("\n"):
            raise _Died(self._last_words())
        return json.loads(answer)["failed"]

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {code}"

    def kill(self) -> None:
        """Stop its trace: nothing but finished ones, which appear by a rename, is worth keeping."""
        self._process.kill()

    def end(self) -> None:
        """Kill it and forget it."""
        self.kill()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                assert stream is not None
                stream.close()
        self._process.wait()


_idle: dict[tuple[int, str], list[_Worker]] = {}
"""By process (a fork must not use its parent's) and device type."""
_busy: set[_Worker] = set()
_lock = threading.Lock()


def run(requests: Sequence[dict[str, Any]]) -> None:
    """Have every request traced, several at a time where there are cores.

    Raises UserError with the reason of the first that could not be, when all others are done.
    """
    stopped = threading.Event()
    threads = ThreadPoolExecutor(max(1, min(len(requests), _cores(), MOST)))
    try:
        answers = [threads.submit(_traced, request, stopped) for request in requests]
        failures = [answer.result() for answer in answers]
    except BaseException:  # an interrupt must not wait for a long trace
        stopped.set()
        with _lock:
            for worker in _busy:
                worker.kill()
        raise
    finally:
        threads.shutdown(cancel_futures=True)
    for reason in failures:
        if reason:
            raise UserError(f"the training step could not be traced: {reason[:400]}\nmemory.plan=estimate plans by formulas instead")


def close() -> None:
    """End this process's idle workers: before it trains, or ends."""
    with _lock:
        workers = [worker for (process, _), waiting in _idle.items() if process == os.getpid() for worker in waiting]
        _idle.clear()
    for worker in workers:
        worker.end()


atexit.register(close)


def _traced(request: dict[str, Any], stopped: threading.Event) -> str:
    """Why ``request`` could not be traced, or nothing."""
    worker, fresh = _worker(request["device_type"])
    try:
        reason = worker.trace(request)
    except _Died as death:
        reason = str(death)
        # One that waited may have ended because nobody asked; a new one must say the same before it is believed.
        if not (fresh or stopped.is_set()):
            return _traced(request, stopped)
    finally:
        with _lock:
            _busy.discard(worker)
    if reason:
        worker.end()  # whatever the failed step left behind goes with it
    else:
        with _lock:
            _idle.setdefault((os.getpid(), request["device_type"]), []).append(worker)
    return reason


def _worker(device_type: str) -> tuple[_Worker, bool]:
    """One that waits or a new one, and whether it is new."""
    with _lock:
        waiting = _idle.get((os.getpid(), device_type), [])
        fresh = not waiting
        worker = _Worker(device_type) if fresh else waiting.pop()
        _busy.add(worker)
    return worker, fresh


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
