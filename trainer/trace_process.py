"""A process that traces training steps and ends: fake tensors, a fake process group, and where needed a pretended CUDA.

``python -m trainer.trace_process REQUESTS.json PARENT`` runs every request of the file and writes each trace to the path it names. It
is a process of its own because the pretences must be set up before torch is imported and must not leak into anything that computes.
``trainer/tracing.py``, process number PARENT, starts it; when that dies, this one does.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from memory_mgmt.fake_cuda import install, preload
from parallel.launcher import die_with_parent


def main(path: str, parent_pid: int) -> int:
    """Run all requests. Returns the exit code."""
    die_with_parent(parent_pid)
    requests: list[dict[str, Any]] = json.loads(Path(path).read_text())
    wants_cuda = any(request["device_type"] == "cuda" for request in requests)
    if wants_cuda and _torch_lacks_cuda():
        preload()
    import torch

    if wants_cuda:
        install(max(request["world_size"] for request in requests))
    torch.set_num_threads(1)
    from trainer.step_trace import trace_request

    for request in requests:
        started = time.perf_counter()
        trace = trace_request(request)
        trace.notes["seconds"] = time.perf_counter() - started
        trace.save(Path(request["out"]))
    return 0


def _torch_lacks_cuda() -> bool:
    """Whether this torch was built without CUDA, found out without importing it."""
    from importlib.util import find_spec

    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None, "torch is not installed"
    return not any(Path(spec.origin).parent.glob("lib/libtorch_cuda*"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
