"""Runs given to a real Slurm of two virtual nodes: warned, preempted, cancelled, crashed, damaged; and equal to a run that was not."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from slurm.attempts import read_records
from tests.slurm.cluster import CannotStart, Cluster
from trainer.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[2]
SECRET = "canary-5d41402abc4b2a76"
SMALL = "data.source=jsonl data.path=text.jsonl data.cache_dir=tokens data.seq_len=64 model.d_model=16 model.n_heads=2 model.window=16"
SETTINGS = [*SMALL.split(), "train.eval_sequences=0", "memory.plan=estimate", "parallel.cp=2", "train.device=cpu", "train.threads_per_rank=1"]


class Place:
    """A working directory, a user's site file, and the cluster."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"{n} " + "to be or not to be " * 20}) + "\n" for n in range(40)))
        site = folder / "config" / "longstride" / "site.yaml"
        site.parent.mkdir(parents=True)
        site.write_text(
            "rendezvous_host: 127.0.0.1\nwarn_seconds: 30\nidle_attempts: 2\n"
            "environment: {GLOO_SOCKET_IFNAME: lo, OMP_NUM_THREADS: '1'}\nexport: [HOME, PATH, XDG_CACHE_HOME]\n"
        )
        self.env = {**cluster.env, "XDG_CONFIG_HOME": str(folder / "config"), "HF_TOKEN": SECRET}

    def longstride(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "longstride.py"), *arguments]
        return subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=200)

    def submit(self, name: str, *more: str, nodes: int = 2) -> tuple[RunDir, str]:
        """The run and its job id."""
        done = self.longstride("submit", "debug_cpu", f"run.name={name}", *SETTINGS, "--nodes", str(nodes), "--time", "1:00:00", *more)
        assert done.returncode == 0, done.stderr
        run_dir = RunDir(self.folder / "runs" / name)
        job = json.loads((run_dir.slurm / "submission.json").read_text())["job_id"]
        assert done.stdout.startswith(f"job {job} queued")
        return run_dir, job

    def wait(self, run_dir: RunDir, job: str, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 200
        while not condition():
            assert time.monotonic() < deadline, f"no {what}\n{self.account(run_dir, job)}"
            time.sleep(0.2)

    def wait_state(self, run_dir: RunDir, job: str, *states: str) -> str:
        self.wait(run_dir, job, lambda: self.cluster.state(job) in states, f"{' or '.join(states)}")
        return self.cluster.state(job)

    def wait_step(self, run_dir: RunDir, job: str, step: int) -> None:
        self.wait(run_dir, job, lambda: steps(run_dir)[-1:] >= [step], f"step {step}")

    def account(self, run_dir: RunDir, job: str) -> str:
        """Everything a person would look at."""
        logs = [*run_dir.slurm.glob("job_*.log"), *sorted(run_dir.logs.rglob("*.log"))]
        return "\n".join([self.cluster.run("scontrol", "show", "job", job), *(f"--- {log}\n{log.read_text()[-3000:]}" for log in logs)])


def records(run_dir: RunDir) -> list[dict]:
    return [json.loads(line) for line in run_dir.metrics.read_text().splitlines()] if run_dir.metrics.exists() else []


def steps(run_dir: RunDir) -> list[int]:
    return [record["step"] for record in records(run_dir)]


def losses(run_dir: RunDir) -> list[tuple[int, str, float]]:
    """Step, loss in every bit, and the position in the data after it."""
    return [(record["step"], float(record["loss"]).hex(), record["data_cursor"]) for record in records(run_dir)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    cluster = Cluster()
    try:
        try:
            cluster.up()
        except CannotStart as error:
            pytest.skip(f"no Slurm here: {error}")
        yield Place(tmp_path_factory.mktemp("slurm"), cluster)
    finally:
        cluster.down()


@pytest.fixture(scope="module")
def uninterrupted(place: Place) -> RunDir:
    """The run that the others are compared with."""
    done = place.longstride("train", "debug_cpu", "run.name=whole", *SETTINGS, "train.steps=400")
    assert done.returncode == 0, done.stderr
    return RunDir(place.folder / "runs" / "whole")


def test_warned_before_the_time_limit_it_is_saved_requeued_and_ends_equal(place: Place, uninterrupted: RunDir) -> None:
    run_dir, job = place.submit("warned", "train.steps=400")
    place.wait_step(run_dir, job, 2)
    place.cluster.run("scancel", "--batch", "--signal=USR1", job)  # what Slurm does at --signal=B:USR1@warn_seconds
    place.wait(run_dir, job, lambda: place.cluster.restarts(job) == 1, "requeue")
    assert place.wait_state(run_dir, job, "COMPLETED", "FAILED") == "COMPLETED", place.account(run_dir, job)
    assert losses(run_dir) == losses(uninterrupted)
    notes = read_records(run_dir)
    assert [note["decision"] for note in notes if "decision" in note] == ["requeue", "done"]
    assert {path.name for path in run_dir.logs.glob("attempt_*/*.log")} == {"rank_0.log", "rank_1.log"}
