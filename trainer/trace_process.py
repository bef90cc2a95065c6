"""A process that traces training steps: fake tensors, a fake process group, and where needed a pretended CUDA.

``python -m trainer.trace_process DEVICE_TYPE PARENT IDLE_SECONDS`` reads requests from standard input, one per line, writes each trace to
the path it names and answers with a line. It ends when its input does, after IDLE_SECONDS without a request, and when PARENT is gone.
It is a process of its own because the pretences must be set up before torch is imported and must not leak into anything that computes.
``trainer/trace_workers.py`` starts it.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from memory_mgmt.fake_cuda import install, leave, preload

DEVICES = 1 << 20
"""Pretended, so that ranks of any number find theirs."""


def main(device_type: str, parent_pid: int, idle_seconds: float) -> int:
    """Answer all requests. Returns the exit code."""
    threading.Thread(target=_end_with, args=(parent_pid,), daemon=True).start()
    # Answers have a descriptor of their own: whatever a library prints goes to the log of errors.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if device_type == "cuda":
        preload()
    import torch

    if device_type == "cuda":
        install(DEVICES)
    torch.set_num_threads(1)
    while select.select([0], [], [], idle_seconds)[0] and (line := _line()):
        _answer(json.loads(line), answers)
    return 0


def _line() -> str:
    """The next line of standard input, read without a buffer that ``select`` would not see."""
    read = bytearray()
    while (byte := os.read(0, 1)) and byte != b"\n":
        read += byte
    return read.decode() if byte else ""


def _answer(request: dict[str, Any], answers: TextIO) -> None:
    from trainer.step_trace import trace_request

    failed = ""
    try:
        started = time.perf_counter()
        trace = trace_request(request)
        trace.notes["seconds"] = time.perf_counter() - started
        trace.save(Path(request["out"]))
    except Exception as error:
        failed = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    answers.write(json.dumps({"failed": failed}) + "\n")
    answers.flush()


def _end_with(parent_pid: int) -> None:
    """End when the parent is gone, also in the midst of a trace. (The kernel's own signal would come when the parent's *thread* ends.)"""
    while os.getppid() == parent_pid:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    leave(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
