"""Run a function on real gloo ranks from inside a test.

``run_distributed(fn, world_size, *args)`` calls ``fn(*args)`` on every rank of a fresh gloo group and returns the list of
results by rank. Processes come from a fork server that imported torch once, so a group starts in tens of milliseconds; what torch
learns in its first step (which operation on which shards gives what) takes it most of a second more.
``run_on_kept_ranks`` is the same on processes that are kept for the next call from the same module: for many cases in one file.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import gc
import multiprocessing as mp
import pickle
import queue
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

_PRELOAD = [
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "torch._dynamo",
    "numpy.random",
    "pytest",
    "trainer.build",
]
"""Imported once by the fork server, so that a rank does not spend seconds on it; ``trainer.build`` reaches every room. torch imports
``_dynamo`` when the first optimizer is built, and a rank imports the test's module, which imports pytest."""
_context: Any = None


def _forkserver() -> Any:
    global _context
    if _context is None:
        _context = mp.get_context("forkserver")
        _context.set_forkserver_preload(_PRELOAD)
    return _context


def _worker(rank: int, world_size: int, tasks: Any, results: Any) -> None:
    """A rank: one task after another, each in a group of its own, until there is no more, one fails or the test's process is gone."""
    import numpy
    import torch
    import torch.distributed as dist

    def seeds() -> tuple:
        return torch.get_rng_state(), random.getstate(), numpy.random.get_state()

    def begin(first: tuple) -> None:
        """What a new process begins with."""
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        torch.set_rng_state(first[0])
        random.setstate(first[1])
        numpy.random.set_state(first[2])

    first = seeds()
    parent = mp.parent_process()
    assert parent is not None
    try:
        while tasks in wait([tasks, parent.sentinel]) and (task := tasks.recv()) is not None:
            work, store, timeout = task
            begin(first)
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=timeout),
            )
            fn, args = pickle.loads(work)
            # Pickled here: the queue would pass tensors as shared-memory handles that die with this process.
            answer = pickle.dumps(fn(*args))
            del fn, args
            dist.barrier()
            dist.destroy_process_group()
            gc.collect()
            results.put((rank, True, answer))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise


class Ranks:
    """Processes that are the ranks of one group after another."""

    def __init__(self, world_size: int) -> None:
        context = _forkserver()
        self._results = context.Queue()
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        self._tasks = [sending for _, sending in pipes]
        self._folder = tempfile.TemporaryDirectory(prefix="gloo-")
        self._calls = 0
        self._processes = [
            context.Process(target=_worker, args=(rank, world_size, tasks, self._results), daemon=True)
            for rank, (tasks, _) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()
        for tasks, _ in pipes:
            tasks.close()

    def begin(self, fn: Callable, args: tuple, timeout: float) -> None:
        """Call ``fn`` on every rank and do not wait for it; ``timeout``: of the group, in seconds."""
        self._calls += 1
        work = pickle.dumps((fn, args))
        try:
            for tasks in self._tasks:
                tasks.send((work, f"{self._folder.name}/store_{self._calls}", timeout))
        except OSError as error:
            raise AssertionError(f"a rank of {len(self._tasks)} has ended by itself") from error

    def run(self, fn: Callable, args: tuple, timeout: float) -> list[Any]:
        """Results by rank. Raises AssertionError; then these ranks are of no use any more."""
        self.begin(fn, args, timeout)
        answers: dict[int, Any] = {}
        try:
            while len(answers) < len(self._tasks):
                rank, ok, value = self._results.get(timeout=timeout)
                assert ok, f"rank {rank} of {len(self._tasks)} failed:\n{value}"
                answers[rank] = pickle.loads(value)
        except queue.Empty:
            silent = sorted(set(range(len(self._tasks))) - set(answers))
            raise AssertionError(f"ranks {silent} gave no result in {timeout} s") from None
        return [answers[rank] for rank in range(len(self._tasks))]

    def alive(self) -> bool:
        """Whether all still run."""
        return all(process.is_alive() for process in self._processes)

    def kill(self) -> None:
        """kill -9 for all of them, which must not have ended before."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            assert process.exitcode == -signal.SIGKILL
        self._folder.cleanup()

    def end(self, patience: float) -> None:
        """Let them end, kill those that do not."""
        for tasks in self._tasks:
            with contextlib.suppress(OSError):  # it has ended by itself
                tasks.send(None)
        deadline = time.monotonic() + patience
        for process in self._processes:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


def run_distributed(fn: Callable, world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``fn(*args)`` on ``world_size`` gloo ranks; results by rank (picklable, tensors as numpy or CPU tensors).

    Raises AssertionError with the failing rank's traceback, or when a rank gives no result within ``timeout`` seconds.
    """
    ranks, patience = Ranks(world_size), 0.5
    try:
        answers = ranks.run(fn, args, timeout)
        patience = 10.0
        return answers
    finally:
        ranks.end(patience)


_kept: dict[int, Ranks] = {}
"""By world size, for the module ``_kept_for``."""
_kept_for = ""


def run_on_kept_ranks(fn: Callable, world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """``run_distributed`` on processes that calls of the same module share: each call has a group, seeds and settings of torch as in a
    new process. Not for what leaves its mark on a process, such as memory that is measured, and not where meshes of many shapes follow one
    another: torch's caches of sharding rules hold meshes of former calls, whose groups are gone. Ranks that failed are not used again."""
    global _kept_for
    if fn.__module__ != _kept_for:
        _end_kept()
        _kept_for = fn.__module__
    ranks = _kept.pop(world_size, None) or Ranks(world_size)
    try:
        answers = ranks.run(fn, args, timeout)
    except BaseException:
        ranks.end(0.5)
        raise
    _kept[world_size] = ranks
    return answers


@atexit.register
def _end_kept() -> None:
    while _kept:
        _kept.popitem()[1].end(10.0)
