"""Faults that take too long for the suite; run by ``python -m tests.faults``."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from slurm.attempts import read_records
from tests.distributed import _forkserver, _worker, run_distributed
from tests.slurm.cluster import Cluster
from tests.slurm.test_on_a_cluster import ROOT, SETTINGS, Place, losses, place, placed, state_of, steps  # noqa: F401 (a fixture)
from tests.trainer.guarded_run import make_run, train, trajectory
from trainer import engine
from trainer.checkpoint import CheckpointManager
from trainer.config import CheckpointSection
from trainer.run_dir import RunDir

pytestmark = pytest.mark.timeout(900)


KILLS, SAVE_EVERY = 50, 2


def _go_on(folder: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()):
        return train(RunDir(folder), resume=True)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["saving", "saving in the background"])
def test_fifty_kills_at_random(tmp_path: Path, asynchronous: bool) -> None:
    """A run of two ranks that saves at every other step, all its ranks killed at 50 moments around saves. After each the newest
    checkpoint is whole and near the last step, and the run goes on from it; in the end it is the run that was never killed, bit for bit."""
    settings = ["parallel.cp=2", "train.steps=500", f"checkpoint.save_every_steps={SAVE_EVERY}", "checkpoint.keep_last=2"]
    whole = make_run(tmp_path, "whole", *settings, "checkpoint.save_every_steps=500")
    assert run_distributed(_go_on, 2, str(whole.path)) == ["", ""]
    run_dir = make_run(tmp_path, "killed", *settings, f"checkpoint.asynchronous={str(asynchronous).lower()}")
    chance, results, left = random.Random(int(asynchronous)), _forkserver().Queue(), []
    for number in range(KILLS):
        arguments = [(_go_on, rank, 2, str(tmp_path / f"store{number}"), (str(run_dir.path),), 120.0, results) for rank in range(2)]
        before = set(os.listdir(run_dir.checkpoints))
        processes = [_forkserver().Process(target=_worker, args=each, daemon=True) for each in arguments]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 120
        while not set(os.listdir(run_dir.checkpoints)) - before:  # the first save of this attempt has begun
            assert time.monotonic() < deadline and all(process.is_alive() for process in processes)
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
            assert process.exitcode == -signal.SIGKILL, "the run was over before it was killed"
        left.append(" ".join(sorted(name.split("_")[0] for name in os.listdir(run_dir.checkpoints) if name.startswith("."))))
        lost = trajectory(run_dir)[-1][0]
        if steps := run_dir.checkpoint_steps():
            good = CheckpointManager(run_dir, CheckpointSection()).latest_good()
            assert good is not None and good.refused == [] and good.step == steps[-1], "the newest one is good"
            lost -= good.step
        assert 0 <= lost <= SAVE_EVERY * (1 + asynchronous)
    assert run_distributed(_go_on, 2, str(run_dir.path)) == ["", ""]
    assert trajectory(run_dir) == trajectory(whole) and run_dir.checkpoint_steps()[-1] == 500
    print({kind: left.count(kind) for kind in left})
    assert sum(".tmp-step" in kind for kind in left) >= 5, "kills hit the middle of saves"


def _sleeping(folder: str) -> str:
    real = engine.forward

    def slow(*arguments, **more):
        if dist.get_rank() == 1:
            time.sleep(0.3)
        return real(*arguments, **more)

    engine.forward = slow
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert train(RunDir(folder)) == ""
    return told.getvalue()


def test_a_rank_that_sleeps_is_named(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "slow", "parallel.cp=2", "train.steps=12", "guards.report_every_steps=3")
    told, _ = run_distributed(_sleeping, 2, str(run_dir.path))
    assert "straggler: rank 1 on" in told and "straggler: rank 0" not in told, told
    ranks = json.loads(run_dir.ranks.read_text())["ranks"]
    assert ranks[1]["own_seconds"] > 0.3 and ranks[1]["slow_reports"] >= 2 and ranks[0]["slow_reports"] == 0


def test_a_read_only_place_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("mount is not permitted here")
    try:
        command = [
            sys.executable,
            str(ROOT / "longstride.py"),
            "train",
            "debug_cpu",
            f"run.root={folder}",
            "run.name=a",
            "memory.plan=estimate",
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == 2 and "Read-only file system" in done.stderr and "run.root" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_the_clock_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["train.steps=8", "checkpoint.save_every_steps=4", "guards.hang_min_seconds=60", "guards.report_every_steps=2"]
    whole = make_run(tmp_path, "whole", *settings)
    assert train(whole) == ""
    run_dir = make_run(tmp_path, "jumps", *settings)
    real, calls = time.time, iter(range(1_000_000))
    monkeypatch.setattr(time, "time", lambda: real() + 7200 * (-1) ** next(calls))  # two hours on, two hours back
    assert train(run_dir) == ""
    monkeypatch.undo()
    assert trajectory(run_dir) == trajectory(whole) and run_dir.checkpoint_steps() == [4, 8]


# ---- on a real Slurm


def test_a_time_limit_crossed_twice(place: Place) -> None:  # noqa: F811
    """Slurm looks at limits now and then: the warning comes 30 to 60 s before the end of the only minute."""
    run_dir, job = place.submit("limited", "parallel.cp=1", "train.steps=1000000", "--time", "1", nodes=1)
    place.wait(run_dir, job, lambda: place.cluster.restarts(job) >= 1, "first requeue at the limit")
    place.wait(run_dir, job, lambda: place.cluster.restarts(job) >= 2, "second requeue at the limit")
    place.cluster.run("scancel", job)
    place.wait_state(run_dir, job, "CANCELLED")
    place.wait(run_dir, job, lambda: not place.cluster.run("squeue", "-h").strip(), "empty queue")
    decisions = [record["decision"] for record in read_records(run_dir) if "decision" in record]
    assert decisions[:2] == ["requeue", "requeue"], place.account(run_dir, job)
    assert steps(run_dir) == list(range(1, len(steps(run_dir)) + 1)), "no step lost or doubled"


def test_nodes_are_lost_drained_and_set_down(tmp_path: Path) -> None:
    """One run of one node: its node loses power, the next one is drained and warned, the next one is set DOWN while it lives."""
    many = ["parallel.cp=1", "train.steps=600", "checkpoint.save_every_steps=20"]
    with placed(tmp_path, cluster := Cluster(slurmd_seconds=12)) as here:
        assert here.longstride("train", "debug_cpu", "run.name=whole", *SETTINGS, *many).returncode == 0
        run_dir, job = here.submit("homeless", *many, nodes=1)
        here.wait_step(run_dir, job, 25)
        first, second = ("n1", "n2") if read_records(run_dir)[0]["nodes"] == "n1" else ("n2", "n1")
        cluster.lose_node(first)
        reached = steps(run_dir)[-1]
        here.wait(run_dir, job, lambda: cluster.restarts(job) == 1, "requeue after the node was lost")
        assert reached - run_dir.checkpoint_steps()[-1] <= 20
        here.wait_step(run_dir, job, reached + 5)
        cluster.start_node(first)

        cluster.run("scontrol", "update", f"NodeName={second}", "State=DRAIN", "Reason=test")
        here.wait_step(run_dir, job, steps(run_dir)[-1] + 30)
        assert cluster.restarts(job) == 1, "a job goes on where its node is drained"
        cluster.run("scancel", "--batch", "--signal=USR1", job)
        here.wait(run_dir, job, lambda: cluster.restarts(job) == 2, "requeue after the warning")
        reached = steps(run_dir)[-1]
        here.wait_step(run_dir, job, reached + 5)
        cluster.run("scontrol", "update", f"NodeName={second}", "State=RESUME")

        cluster.run("scontrol", "update", f"NodeName={first}", "State=DOWN", "Reason=test")
        here.wait(run_dir, job, lambda: cluster.restarts(job) == 3, "requeue after the node was set DOWN")
        assert here.wait_state(run_dir, job, "COMPLETED", "FAILED") == "COMPLETED", here.account(run_dir, job)
        found = read_records(run_dir)
        assert [record["nodes"] for record in found if "started" in record] == [first, second, first, second]
        assert {record["attempt"]: record["decision"] for record in found if "decision" in record} == {2: "requeue", 3: "wait", 4: "done"}
        assert losses(run_dir) == losses(RunDir(tmp_path / "runs" / "whole")) and state_of(run_dir).status == "done"


def test_the_controller_is_gone_for_a_while(place: Place) -> None:  # noqa: F811
    """A submission meets no controller: it says so, and the same run is submitted once when there is one again."""
    cluster = place.cluster
    controller = next(process for process in cluster._processes if "slurmctld" in process.name())
    controller.kill()
    controller.wait()
    cluster._processes.remove(controller)
    small = ["data.source=jsonl", "data.path=text.jsonl", "data.cache_dir=tokens", "data.seq_len=64", "train.eval_sequences=0"]
    arguments = ["debug_cpu", "run.name=orphan", *small, "memory.plan=estimate", "train.device=cpu", "train.steps=2", "--nodes", "1"]
    try:
        done = place.longstride("submit", *arguments)
        assert done.returncode == 2 and "nothing was queued" in done.stderr and "Traceback" not in done.stderr, done.stderr
        shown = place.longstride("runs")
        assert shown.returncode == 0 and "orphan\tfailed" in shown.stdout
    finally:
        (cluster.folder / "slurmctld.log").unlink()
        cluster._daemon("slurmctld", [])
    run_dir = RunDir(place.folder / "runs" / "orphan")
    deadline = time.monotonic() + 60
    while subprocess.run(["scontrol", "ping"], env=cluster.env, capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    job = place.resubmit("orphan")
    assert place.wait_state(run_dir, job, "COMPLETED", "FAILED") == "COMPLETED", place.account(run_dir, job)
    assert len([line for line in cluster.run("squeue", "--states=all", "-h", "-o", "%j").splitlines() if line == "orphan"]) == 1
