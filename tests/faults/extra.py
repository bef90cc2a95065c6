"""Faults that take too long for the suite; run by ``python -m tests.faults``."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from slurm.attempts import read_records
from tests.distributed import Ranks, run_distributed
from tests.slurm.cluster import Cluster
from tests.slurm.test_on_a_cluster import ROOT, SETTINGS, Place, losses, place, placed, state_of, steps  # noqa: F401 (a fixture)
from tests.trainer.guarded_run import go_on, make_run, points, train, trajectory
from trainer import engine
from trainer.checkpoint import CheckpointManager
from trainer.config import CheckpointSection
from trainer.metrics_file import decode_record
from trainer.run_dir import RunDir

pytestmark = pytest.mark.timeout(900)


KILLS, SAVE_EVERY = 25, 2
"""Moments for each way of saving, and steps between saves."""


def _kill_ranks(run_dir: RunDir, moment: Callable[[], bool], seconds: float = 0.0) -> None:
    """Two ranks begin the run or go on in it; ``seconds`` after ``moment`` both are killed."""
    ranks = Ranks(2)
    ranks.begin(go_on, (str(run_dir.path),), 300.0)
    deadline = time.monotonic() + 300
    while not moment():
        assert time.monotonic() < deadline and ranks.alive()
        time.sleep(0.002)
    time.sleep(seconds)
    ranks.kill()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["saving", "saving in the background"])
def test_fifty_kills_at_random(tmp_path: Path, asynchronous: bool) -> None:
    """A run of two ranks that saves at every other step, both killed at 25 moments around saves, and as many for one that saves in the
    background. After each the newest checkpoint is whole and near the last step, and the run goes on from it: as if it never had been
    killed, bit for bit."""
    settings = ["parallel.cp=2", "train.steps=100000", "checkpoint.keep_last=2", f"checkpoint.asynchronous={str(asynchronous).lower()}"]
    run_dir = make_run(tmp_path, "killed", *settings, f"checkpoint.save_every_steps={SAVE_EVERY}")
    chance, left = random.Random(int(asynchronous)), []
    for _ in range(KILLS):

        def first_save_has_begun(before: frozenset[tuple[str, int]] = frozenset(_folders(run_dir))) -> bool:
            return bool(_folders(run_dir) - before)

        _kill_ranks(run_dir, first_save_has_begun, chance.uniform(0, 0.1))
        left.append(sorted({name.split("_")[0] for name in os.listdir(run_dir.checkpoints)}))
        lost = len(whole_lines(run_dir))
        if steps := run_dir.checkpoint_steps():
            good = CheckpointManager(run_dir, CheckpointSection()).latest_good()
            assert good is not None and good.refused == [] and good.step == steps[-1], "the newest one is good"
            lost -= good.step
        assert 0 <= lost <= SAVE_EVERY * (1 + asynchronous)
    reached = len(whole_lines(run_dir))
    _kill_ranks(run_dir, lambda: len(whole_lines(run_dir)) > reached)
    found = whole_lines(run_dir)
    whole = make_run(tmp_path, "whole", *settings)
    _kill_ranks(whole, lambda: len(whole_lines(whole)) >= len(found))
    assert whole_lines(whole)[: len(found)] == found and [step for step, *_ in found] == list(range(1, len(found) + 1))
    assert sum(".tmp-step" in names for names in left) >= 5, f"kills hit the middle of saves: {left}"


def _folders(run_dir: RunDir) -> set[tuple[str, int]]:
    """What lies beside the checkpoints, by name and inode: a save that is tried again takes the name of the one that was killed."""
    with os.scandir(run_dir.checkpoints) as found:
        return {(entry.name, entry.inode()) for entry in found}


def whole_lines(run_dir: RunDir) -> list[tuple[int, str, str, int]]:
    """``trajectory`` of a run whose last line may be torn, or which has none yet."""
    lines = run_dir.metrics.read_bytes().splitlines(keepends=True) if run_dir.metrics.exists() else []
    return points([record for line in lines if (record := decode_record(line)) is not None])


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
    endless = ["parallel.cp=1", "train.steps=1000000"]
    run_dir, job = place.submit("limited", *endless, "--time", "1", nodes=1)
    place.wait(run_dir, job, lambda: place.cluster.restarts(job) >= 1, "first requeue at the limit")
    place.wait(run_dir, job, lambda: place.cluster.restarts(job) >= 2, "second requeue at the limit")
    place.wait_step(run_dir, job, run_dir.checkpoint_steps()[-1] + 1)
    place.cluster.run("scancel", job)
    place.wait_state(run_dir, job, "CANCELLED")
    place.wait(run_dir, job, lambda: not place.cluster.run("squeue", "-h").strip(), "empty queue")
    decisions = [record["decision"] for record in read_records(run_dir) if "decision" in record]
    assert decisions[:2] == ["requeue", "requeue"], place.account(run_dir, job)
    found = losses(run_dir)
    assert [step for step, *_ in found] == list(range(1, len(found) + 1)), "no step lost or doubled"
    command = [sys.executable, str(ROOT / "longstride.py"), "train", "debug_cpu", "run.name=unlimited", *SETTINGS, *endless]
    whole = RunDir(place.folder / "runs" / "unlimited")
    with subprocess.Popen(command, cwd=place.folder, env=place.env, stdout=subprocess.DEVNULL) as process:
        place.wait(run_dir, job, lambda: len(steps(whole)) >= len(found), "as many steps of a run without a limit")
        process.terminate()
    assert losses(whole)[: len(found)] == found


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
