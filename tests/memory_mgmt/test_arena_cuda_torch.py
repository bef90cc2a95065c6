"""The arena behind torch's real CUDA caching allocator, over the fake runtime: needs a CUDA build of torch, no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memory_mgmt.arena_cuda import SUPPORTED
from tests.memory_mgmt.fake_gpu import build_fake_runtime

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.version.cuda is None or sys.platform != "linux", reason="needs a CUDA build of torch")
@pytest.mark.skipif(torch.__version__.rsplit(".", 1)[0] not in SUPPORTED, reason="needs a release of torch that the arena knows")
def test_torchs_tensors_are_served(tmp_path: Path) -> None:
    fake = build_fake_runtime(tmp_path, "libcuda.so.1")  # torch asks the driver for one function
    environment = os.environ | {
        "LD_PRELOAD": str(fake),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64",
    }
    command = [sys.executable, "-W", "ignore", "-m", "tests.memory_mgmt.arena_on_fake_gpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "served by the arena" in done.stdout, done.stdout[-500:] + done.stderr[-3000:]
