"""Run a function on real gloo ranks from inside a test.

``run_distributed(fn, world_size, *args)`` calls ``fn(*args)`` on every rank of a fresh gloo group and returns the list of
results by rank. Processes come from a fork server that imported torch once, so a group starts in tens of milliseconds.
"""

from __future__ import annotations

import datetime
import multiprocessing as mp
import pickle
import queue
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

_PRELOAD = [
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "torch._dynamo",
    "torch.testing",
    "pytest",
    "numpy.random",
    "trainer.build",
]
"""Imported once by the fork server, so that a rank does not spend seconds on it; ``trainer.build`` reaches every room."""
_context: Any = None


def _forkserver() -> Any:
    global _context
    if _context is None:
        _context = mp.get_context("forkserver")
        _context.set_forkserver_preload(_PRELOAD)
    return _context


def _worker(fn: Callable, rank: int, world_size: int, store: str, args: tuple, timeout: float, results: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        # Pickled here: the queue would pass tensors as shared-memory handles that die with this process.
        results.put((rank, True, pickle.dumps(fn(*args))))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise


def run_distributed(fn: Callable, world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``fn(*args)`` on ``world_size`` gloo ranks; results by rank (picklable, tensors as numpy or CPU tensors).

    Raises AssertionError with the failing rank's traceback, or when a rank gives no result within ``timeout`` seconds.
    """
    context = _forkserver()
    results = context.Queue()
    with tempfile.TemporaryDirectory(prefix="gloo-") as folder:
        processes = [
            context.Process(target=_worker, args=(fn, rank, world_size, f"{folder}/store", args, timeout, results), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        answers: dict[int, Any] = {}
        try:
            while len(answers) < world_size:
                rank, ok, value = results.get(timeout=timeout)
                assert ok, f"rank {rank} of {world_size} failed:\n{value}"
                answers[rank] = pickle.loads(value)
        except queue.Empty:
            raise AssertionError(f"ranks {sorted(set(range(world_size)) - set(answers))} gave no result in {timeout} s") from None
        finally:
            for process in processes:
                process.join(timeout=10 if len(answers) == world_size else 0.5)
                if process.is_alive():
                    process.kill()
    return [answers[rank] for rank in range(world_size)]
