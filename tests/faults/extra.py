"""Faults that take too long for the suite; run by ``python -m tests.faults``."""

from __future__ import annotations

import contextlib
import io
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from slurm.attempts import read_records
from tests.distributed import _forkserver, _worker, run_distributed
from tests.slurm.test_on_a_cluster import ROOT, Place, place, state_of, steps  # noqa: F401 (a fixture)
from tests.trainer.guarded_run import make_run, train, trajectory
from tests.trainer.test_checkpoint_kill import _save_for_ever
from trainer import engine
from trainer.checkpoint import CheckpointManager
from trainer.config import CheckpointSection
from trainer.run_dir import RunDir

pytestmark = pytest.mark.timeout(900)


def test_fifty_kills_at_random(tmp_path: Path) -> None:
    """Two ranks that do nothing but save, killed at 50 moments; the newest good checkpoint is whole."""
    chance, results = random.Random(0), _forkserver().Queue()
    moments = set()
    for number in range(50):
        run = RunDir(tmp_path / f"run{number}")
        arguments = [(_save_for_ever, rank, 2, str(tmp_path / f"store{number}"), (str(run.path),), 60.0, results) for rank in range(2)]
        processes = [_forkserver().Process(target=_worker, args=each, daemon=True) for each in arguments]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 60
        while not run.checkpoint_steps() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.5))
        for process in processes:
            process.kill()
            process.join()
        moments.add(tuple(path.name.split("_")[0] for path in run.checkpoints.iterdir()))
        checkpoints = CheckpointManager(run, CheckpointSection())
        checkpoints.clean()
        good = checkpoints.latest_good()
        assert good is not None and good.refused == []
        state = {"w": torch.zeros(100)}
        checkpoints.load(good, {"model": state})
        assert torch.equal(state["w"], torch.full((100,), float(good.step)))
    assert len(moments) > 1, "kills hit different moments"


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


def test_a_node_goes_down(place: Place) -> None:  # noqa: F811
    cluster = place.cluster
    run_dir, job = place.submit("homeless", "parallel.cp=1", "train.steps=200", "checkpoint.save_every_steps=20", nodes=1)
    place.wait_step(run_dir, job, 25)
    node = read_records(run_dir)[0]["nodes"]
    try:
        cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        place.wait(run_dir, job, lambda: cluster.restarts(job) == 1, "requeue after the node went")

        def ended() -> bool:
            # On a machine too busy to start a job in time Slurm holds it, and a person releases it (docs/runbook.md).
            if "launch_failed_requeued_held" in cluster.run("squeue", "-h", "-j", job, "-o", "%r"):
                cluster.run("scontrol", "release", job)
            return cluster.state(job) in ("COMPLETED", "FAILED")

        place.wait(run_dir, job, ended, "end on the other node")
        assert cluster.state(job) == "COMPLETED", place.account(run_dir, job)
    finally:
        cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
    nodes = [record["nodes"] for record in read_records(run_dir) if "started" in record]
    assert nodes[0] == node and nodes[-1] != node
    assert steps(run_dir) == list(range(1, 201)) and state_of(run_dir).status == "done"


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
