"""A sample of what ``benchmarks/fuzz.py`` feeds with inputs, and that its harness sees what it looks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import json, socket, subprocess, time
from pathlib import Path
from benchmarks import fuzz

seen = fuzz._watch()
fuzz.CPU_SECONDS = 0.2

def started(data):
    subprocess.run(["true"])
    return "accepted"

def connected(data):
    with socket.socket() as one:
        one.connect_ex(("127.0.0.1", 9))
    return "refused"

def spun(data):
    while True:
        try:
            time.sleep(0)
        except Exception:
            pass

def left(data):
    Path(fuzz.CANARY).touch()
    return "refused"

checks = {"started": started, "connected": connected, "raised": lambda data: 1 / 0, "left": left, "spun": spun}
found = {name: fuzz.try_input(check, b"", seen) for name, check in checks.items()}
Path(fuzz.CANARY).unlink()
fuzz.CPU_SECONDS = 10.0
print(json.dumps([found, fuzz.sample(1200, 11)]))
"""


def test_a_sample_of_bad_inputs_ends_in_clean_errors(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    harness, rows = json.loads(done.stdout.splitlines()[-1])
    assert harness["started"].startswith("failed: subprocess.Popen") and harness["connected"].startswith("failed: socket.connect")
    assert harness["raised"].startswith("failed: ZeroDivisionError") and harness["left"] == "failed: executed was run"
    assert "processor time" in harness["spun"]
    assert sum(row["inputs"] for row in rows) >= 1200 and {row["failed"] for row in rows} == {0}, rows
    for row in rows:
        assert row["refused"] > row["inputs"] // 20, row
    assert sum(row["accepted"] for row in rows) > 50, "inputs that are read at all"
