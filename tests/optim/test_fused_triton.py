"""The triton kernels of Adam in few bits in triton's interpreter, beside the eager path."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")


def test_a_step_has_the_bits_of_the_eager_path() -> None:
    run = Path(__file__).with_name("fused_triton_run.py")
    done = subprocess.run(
        [sys.executable, str(run)], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    cases = json.loads(done.stdout.splitlines()[-1])
    assert len(cases) == 10
    for case, found in cases.items():
        assert found["differ"] == 0, (case, found)
        assert found["update"] < 1e-4, (case, found)  # read off float32 weights, one hundredth of it
