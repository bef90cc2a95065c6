"""Processes that trace: kept and used again, the same traces whatever they traced before, ended with their parent, errors told."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memory_mgmt.trace import Trace
from models.errors import UserError
from trainer import trace_workers
from trainer.config import RunConfig
from trainer.tracing import TraceRequest

HOME = Path(__file__).resolve().parents[2]


def request(folder: Path, name: str, device="cuda", seq_len=256, **sections):
    model = {"d_model": 32, "n_heads": 2, "layers": ["full"], "n_layers": 1}
    config = RunConfig.model_validate({"model": model, "data": {"seq_len": seq_len}, **sections})
    return {**TraceRequest(config, 64, device).to_dict(), "out": str(folder / f"{name}.json.gz")}


def told(path: Path):
    trace = Trace.load(path)
    trace.notes.pop("seconds")
    return trace


@pytest.fixture(autouse=True)
def _no_workers():
    trace_workers.close()
    yield
    trace_workers.close()


def waiting() -> list[int]:
    return [worker._process.pid for workers in trace_workers._idle.values() for worker in workers]


def test_a_worker_is_used_again_and_traces_as_a_new_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(trace_workers, "MOST", 1)
    trace_workers.run([request(tmp_path, "first")])
    (worker,) = waiting()
    # Other lengths, ranks, precision and presets in between must leave nothing behind.
    others = [
        request(tmp_path, "ranks", parallel={"cp": 2, "dp_shard": 2}),
        request(tmp_path, "eight", optim={"preset": "adamw_8bit"}, train={"precision": "fp32"}),
        request(tmp_path, "long", seq_len=1024, memory={"recompute": "block"}),
    ]
    trace_workers.run([*others, request(tmp_path, "again"), {**others[0], "out": str(tmp_path / "ranks_again.json.gz")}])
    assert waiting() == [worker]
    for name in ("first", "ranks"):
        again = tmp_path / ("again.json.gz" if name == "first" else "ranks_again.json.gz")
        assert told(tmp_path / f"{name}.json.gz") == told(again)


def test_a_failure_is_told_when_the_others_are_done_and_its_worker_goes(tmp_path):
    broken = {**request(tmp_path, "broken", "cpu"), "vocab_size": -5}
    with pytest.raises(UserError, match="could not be traced: "):
        trace_workers.run([broken, request(tmp_path, "good", "cpu")])
    assert (tmp_path / "good.json.gz").exists() and not (tmp_path / "broken.json.gz").exists()
    assert len(waiting()) <= 1


def test_one_that_died_while_it_waited_is_replaced(tmp_path):
    worker = trace_workers._Worker("cpu")
    trace_workers._idle[(os.getpid(), "cpu")] = [worker]
    os.kill(worker._process.pid, signal.SIGKILL)
    trace_workers.run([request(tmp_path, "second", "cpu")])
    assert (tmp_path / "second.json.gz").exists() and worker._process.pid not in waiting()


def test_it_ends_with_its_parent_and_when_nobody_asks(tmp_path):
    code = (
        "import os, sys; from trainer import trace_workers as t\n"
        "w = t._Worker('cpu'); print(w._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, timeout=60)
    command = [sys.executable, "-m", "trainer.trace_process", "cpu", str(os.getpid()), "0.1"]
    assert subprocess.run(command, cwd=HOME, stdin=subprocess.PIPE, timeout=60).returncode == 0
    deadline = time.monotonic() + 30
    while Path(f"/proc/{done.stdout.strip()}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{done.stdout.strip()}").exists()
