"""What ``longstride runs`` makes of a real sacct, and that its text and its JSON are read alike."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longstride import main
from slurm import client
from slurm.answers import ended_from_json, queued_from_json
from slurm.submission import Submission, comment_of, write_submission
from tests.slurm.accounting import AccountingCluster
from tests.slurm.cluster import CannotStart
from trainer.run_dir import RunDir


@pytest.fixture(scope="module")
def cluster() -> Iterator[AccountingCluster]:
    cluster = AccountingCluster()
    try:
        try:
            cluster.up()
        except CannotStart as error:
            pytest.skip(f"no accounting here: {error}")
        yield cluster
    finally:
        cluster.down()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_runs_whose_jobs_are_gone(
    cluster: AccountingCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def submit(name: str, work: str, *options: str, comment: bool = True) -> str:
        """A run that says it trains, and a job for it that does something else."""
        token = name.replace("|", "0")
        said = [f"--comment={comment_of(token)}"] if comment else []
        run_dir = RunDir(tmp_path / "runs" / name)
        run_dir.create()
        run_dir.write_state("running", step=3, total_steps=9)
        number = cluster.run("sbatch", "--parsable", "-o", "/dev/null", "-J", name, *said, *options, "--wrap", work).strip()
        task = "1" if "--array=0-1" in options else ""
        job = f"{number}_{task}" if task else number
        write_submission(run_dir, Submission(token, job, 3, task=task))
        return job

    jobs = {
        "failed|3": submit("failed|3", "exit 3"),
        "killed": submit("killed", "kill -9 $$", comment=False),
        "task": submit("task", "exit $SLURM_ARRAY_TASK_ID", "--array=0-1"),
        "held": submit("held", "true", "--hold"),
        "waits": submit("waits", "sleep 300", "--no-requeue"),
        "runs": submit("runs", "sleep 300", "--no-requeue"),
        "again": submit("again", "sleep 300"),
    }
    for name in ("waits", "runs", "again"):
        until(lambda name=name: cluster.state(jobs[name]) == "RUNNING")
    cluster.run("scontrol", "requeue", jobs["again"])
    cluster.run("scancel", jobs["held"], jobs["waits"])
    monkeypatch.chdir(tmp_path)
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    gone = {jobs[name] for name in ("failed|3", "killed", "task", "held", "waits")}
    until(lambda: {job.id for job in client.ended([*jobs.values()])} == gone)  # slurmdbd hears of the end after the controller

    assert main(["runs"]) == 0
    told = {line.split("\t")[0]: line.split("\t") for line in capsys.readouterr().out.splitlines()[1:]}
    ends = {
        "failed|3": "FAILED (exit code 3:0) on n",
        "killed": "FAILED (exit code 0:9) on n",
        "task": "FAILED (exit code 1:0) on n",
        "held": "CANCELLED; its job is no longer in the queue",
        "waits": "CANCELLED",
    }
    for name, end in ends.items():
        assert told[name][1] == "died" and told[name][-1].startswith(f"job {jobs[name]} ended {end}"), told[name]
    assert told["runs"][1] == "running" and told["again"][1] in ("queued", "running"), told

    # sacct 22.05 itself gives 0 for another exit code in JSON
    ended = {dataclasses.replace(job, exit_code="") for job in client.ended([*jobs.values()])}
    everything = ",".join(jobs.values())
    shown = ended_from_json(cluster.run("sacct", "--json", f"--jobs={everything}"))
    assert {dataclasses.replace(job, exit_code="") for job in shown} == ended and len(shown) == len(ended) == 5
    assert set(queued_from_json(cluster.run("squeue", "--me", "--json"))) == set(client.queue())
