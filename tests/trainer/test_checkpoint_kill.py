"""kill -9 at every moment of a save: there is always a whole checkpoint, and the next save works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.distributed import Ranks
from trainer.checkpoint import CheckpointManager
from trainer.config import CheckpointSection
from trainer.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[2]

# Every file operation below the checkpoints raises an audit event; the process dies before the N-th. Children are forked
# from one process, because importing torch takes seconds.
SCRIPT = """
import json, os, shutil, signal, sys
from pathlib import Path
import torch
from trainer.checkpoint import CheckpointManager
from trainer.config import CheckpointSection
from trainer.run_dir import RunDir

torch.set_num_threads(1)
base, work, asynchronous = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "async"
armed = [0, ""]

def hook(event, args):
    if not armed[0] or not (event.startswith(("os.", "shutil.")) or event in ("open", "test.write")):
        return
    paths = [os.fspath(value) for value in args if isinstance(value, (str, os.PathLike))]
    if event in ("test.write", "os.remove", "os.rmdir") or any("checkpoints" in path for path in paths):
        armed[1] = event
        armed[0] -= 1
        if armed[0] == 0:
            os.write(1, (event + chr(10)).encode())
            os.kill(os.getpid(), signal.SIGKILL)

class Counted:
    def __init__(self, stream): self.stream = stream
    def write(self, data):
        sys.audit("test.write")
        half = len(data) // 2
        self.stream.write(data[:half]); self.stream.flush()
        sys.audit("test.write")
        return half + self.stream.write(data[half:])
    def __getattr__(self, name): return getattr(self.stream, name)

class Manager(CheckpointManager):
    def _storage_writer(self, folder):
        import contextlib
        writer = super()._storage_writer(folder)
        create = writer.fs.create_stream
        @contextlib.contextmanager
        def counted(path, mode):
            with create(path, mode) as stream:
                yield Counted(stream)
        writer.fs.create_stream = counted
        return writer

def manager(path): return Manager(RunDir(path), CheckpointSection(keep_last=2, asynchronous=asynchronous))
def state(value):
    tensors = {"a": torch.full((50,), float(value)), "b": torch.full((3, 3), float(value), dtype=torch.float64)}
    return {"model": tensors, "train": {"step": value}}

for step in (1, 2):
    manager(base).save(step, state(step), block=True)
sys.addaudithook(hook)
outcomes = []
for moment in range(1, 500, int(sys.argv[4])):
    shutil.rmtree(work, ignore_errors=True); shutil.copytree(base, work)
    pid = os.fork()
    if pid == 0:
        armed[0] = moment
        manager(work).save(3, state(3), block=True)
        os._exit(0)
    finished = os.waitpid(pid, 0)[1] == 0
    checkpoints = manager(work)
    before = sorted(p.name for p in (work / "checkpoints").iterdir())
    left = checkpoints.clean()
    good = checkpoints.latest_good()
    found = state(0)
    checkpoints.load(good, found)
    exact = all(bool((t == good.step).all()) for t in found["model"].values()) and found["train"] == {"step": good.step}
    again = False
    if good.step == 2:
        checkpoints.save(3, state(3), block=True)
        again = checkpoints.latest_good().step == 3
    count = len(RunDir(work).checkpoint_steps())
    outcomes.append(dict(step=good.step, refused=len(good.refused), exact=exact, again=again, left=left, count=count))
    if finished:
        break
print("RESULT" + json.dumps(outcomes))
"""


@pytest.mark.parametrize(("mode", "stride"), [("sync", 1), ("async", 3)])
def test_killed_before_every_file_operation_of_a_save(tmp_path, mode, stride):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "base"), str(tmp_path / "work"), mode, str(stride)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    outcomes = json.loads(next(line for line in lines if line.startswith("RESULT")).removeprefix("RESULT"))
    if stride == 1:
        assert {"open", "os.rename", "test.write", "os.mkdir", "os.remove", "os.rmdir"} <= set(lines), "kills hit every kind of operation"
        assert len(outcomes) > 30
    assert all(outcome["exact"] and outcome["refused"] == 0 for outcome in outcomes), "loadable, bit for bit, none half-published"
    assert [outcome["step"] for outcome in outcomes] == sorted(outcome["step"] for outcome in outcomes)
    assert {outcome["step"] for outcome in outcomes} == {2, 3}
    assert all(outcome["again"] for outcome in outcomes if outcome["step"] == 2), "the same step can be saved after the crash"
    assert all(outcome["count"] >= 2 for outcome in outcomes), "there is always a predecessor"
    assert [".tmp-step_00000003"] in [outcome["left"] for outcome in outcomes]
    assert [".trash-step_00000001"] in [outcome["left"] for outcome in outcomes]
    assert outcomes[-1]["left"] == []


class _SlowManager(CheckpointManager):
    def _write_tensors(self, folder, content):
        time.sleep(0.05 * (1 + self.ranks.rank))
        super()._write_tensors(folder, content)
        time.sleep(0.05)


def _save_for_ever(folder: str) -> None:
    checkpoints = _SlowManager(RunDir(folder), CheckpointSection(keep_last=2))
    for step in range(1, 1000):
        checkpoints.save(step, {"model": {"w": torch.full((100,), float(step))}})


def test_killed_ranks_leave_a_whole_checkpoint(tmp_path):
    run = RunDir(tmp_path / "run")
    for number, delay in enumerate((0.0, 0.07, 0.13, 0.2)):
        before = run.checkpoint_steps()
        if number:
            for step in before:  # a new sequence begins at step 1
                run.checkpoint(step).rename(tmp_path / f"old-{number}-{step}")
        ranks = Ranks(2)
        ranks.begin(_save_for_ever, (str(run.path),), 60.0)
        deadline = time.monotonic() + 60
        while len(run.checkpoint_steps()) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        ranks.kill()
        checkpoints = CheckpointManager(run, CheckpointSection())
        checkpoints.clean()
        good = checkpoints.latest_good()
        assert good is not None
        assert good.refused == []
        state = {"w": torch.zeros(100)}
        checkpoints.load(good, {"model": state})
        assert torch.equal(state["w"], torch.full((100,), float(good.step)))
