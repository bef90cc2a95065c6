"""Runs given to a real Slurm of two virtual nodes: warned, preempted, cancelled, crashed, damaged; and equal to a run that was not."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from slurm.attempts import read_records
from slurm.script import Job, render
from slurm.site import Site
from slurm.submission import read_submission
from tests.slurm.cluster import CannotStart, Cluster
from trainer.run_dir import RunDir, RunState

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(900)  # a dozen starts of torch, on a machine that may be busy
SECRET = "canary-5d41402abc4b2a76"
SMALL = "data.source=jsonl data.path=text.jsonl data.cache_dir=tokens data.seq_len=64 model.d_model=16 model.n_heads=2 model.window=16"
STEPS = 400
SETTINGS = [
    *SMALL.split(),
    "train.eval_sequences=0",
    "memory.plan=estimate",
    "parallel.cp=2",
    "train.device=cpu",
    "train.threads_per_rank=1",
]


class Place:
    """A working directory, a user's site file, and the cluster."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"{n} " + "to be or not to be " * 20}) + "\n" for n in range(40)))
        site = folder / "config" / "longstride" / "site.yaml"
        site.parent.mkdir(parents=True)
        site.write_text(
            "rendezvous_host: 127.0.0.1\nwarn_seconds: 30\nidle_attempts: 2\n"
            "environment: {OMP_NUM_THREADS: '1'}\nexport: [HOME, PATH, XDG_CACHE_HOME]\n"
        )
        self.env = {**cluster.env, "XDG_CONFIG_HOME": str(folder / "config"), "HF_TOKEN": SECRET}

    def longstride(self, *arguments: str, more_of_site: str = "", timeout: float = 200) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "longstride.py"), *arguments]
        env = self.env
        if more_of_site:
            path = self.folder / "other" / "longstride" / "site.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text((self.folder / "config" / "longstride" / "site.yaml").read_text() + more_of_site)
            env = {**env, "XDG_CONFIG_HOME": str(self.folder / "other")}
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=timeout)

    def submit(self, name: str, *more: str, nodes: int = 2) -> tuple[RunDir, str]:
        """The run and its job id."""
        done = self.longstride("submit", "debug_cpu", f"run.name={name}", *SETTINGS, "--nodes", str(nodes), "--time", "1:00:00", *more)
        assert done.returncode == 0, done.stderr
        run_dir = RunDir(self.folder / "runs" / name)
        job = json.loads((run_dir.slurm / "submission.json").read_text())["job_id"]
        assert done.stdout.startswith(f"job {job} queued")
        return run_dir, job

    def resubmit(self, name: str) -> str:
        """The id of a run's next job."""
        done = self.longstride("resume", name, "--submit")
        assert done.returncode == 0, done.stderr
        return json.loads((self.folder / "runs" / name / "slurm" / "submission.json").read_text())["job_id"]

    def wait(self, run_dir: RunDir, job: str, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 400
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


@contextmanager
def placed(folder: Path, cluster: Cluster) -> Iterator[Place]:
    """``cluster`` brought up for tests in ``folder``, and taken down; they are skipped with the reason where it cannot be."""
    try:
        try:
            cluster.up()
        except CannotStart as error:
            pytest.skip(f"no Slurm here: {error}")
        yield Place(folder, cluster)
    finally:
        cluster.down()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with placed(tmp_path_factory.mktemp("slurm"), Cluster()) as found:
        yield found


@pytest.fixture(scope="module")
def uninterrupted(place: Place) -> RunDir:
    """The run that the others are compared with."""
    done = place.longstride("train", "debug_cpu", "run.name=whole", *SETTINGS, f"train.steps={STEPS}")
    assert done.returncode == 0, done.stderr
    return RunDir(place.folder / "runs" / "whole")


def state_of(run_dir: RunDir) -> RunState:
    state = run_dir.read_state()
    assert state is not None
    return state


def ranks(run_dir: RunDir) -> list[psutil.Process]:
    """The training processes of a run, wherever Slurm put them."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "_job_rank" in words and str(run_dir.path) in words and "torch.distributed.run" not in words:
            found.append(process)
    return found


@pytest.mark.parametrize("text", ["two words $(touch PWNED)", "-rf `touch PWNED`", "'q' \"d\" #x", "%x %j %%"])
def test_slurm_reads_every_value_as_data(place: Place, text: str) -> None:
    folder = place.folder / "nasty" / text
    (folder / "slurm").mkdir(parents=True)
    job = Job(text, text, folder, folder, "python", folder, nodes=1, ranks_per_node=1, gpus=False)
    head = render(job, Site()).split("set -u")[0]
    (folder / "job.sbatch").write_text(head + "pwd > here\n")
    number = place.cluster.run("sbatch", "--parsable", "--", str(folder / "job.sbatch")).strip()
    deadline = time.monotonic() + 60
    while (state := place.cluster.state(number)) != "COMPLETED":
        assert state in ("PENDING", "RUNNING", "COMPLETING"), place.cluster.run("scontrol", "show", "job", number)
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (folder / "here").read_text() == f"{folder}\n"
    assert (folder / "slurm" / f"job_{number}.log").read_bytes() == b""
    shown = place.cluster.run("squeue", "--states=all", f"--jobs={number}", "--noheader", "--format=%j|%k")
    assert shown == f"{text}|longstride {text}\n"
    assert not list(place.folder.rglob("PWNED"))


def test_warned_killed_damaged_and_preempted_it_ends_equal(place: Place, uninterrupted: RunDir) -> None:
    cluster = place.cluster
    run_dir, job = place.submit("stormy", f"train.steps={STEPS}", "checkpoint.save_every_steps=20")

    place.wait_step(run_dir, job, 2)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # what Slurm does at --signal=B:USR1@warn_seconds
    place.wait(run_dir, job, lambda: cluster.restarts(job) == 1, "requeue after the warning")
    saved = steps(run_dir)[-1]
    assert run_dir.checkpoint_steps()[-1] == saved

    place.wait_step(run_dir, job, saved + 21)
    ranks(run_dir)[0].kill()
    place.wait(run_dir, job, lambda: cluster.restarts(job) == 2, "requeue after a rank was killed")
    newest = run_dir.checkpoint_steps()[-1]
    assert newest > saved and newest % 20 == 0
    shard = max(run_dir.checkpoint(newest).glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)

    place.wait(run_dir, job, lambda: (run_dir.checkpoints / f".damaged-step_{newest:08d}").exists(), "damaged checkpoint set aside")
    place.wait(run_dir, job, lambda: len(state_of(run_dir).reason) == 0 and steps(run_dir)[-1] < STEPS - 5, "running state")
    high = cluster.run("sbatch", "--parsable", "-p", "high", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1").strip()
    place.wait(run_dir, job, lambda: cluster.restarts(job) == 3, "requeue after preemption")

    assert place.wait_state(run_dir, job, "COMPLETED", "FAILED") == "COMPLETED", place.account(run_dir, job)
    assert cluster.state(high) == "COMPLETED"
    assert losses(run_dir) == losses(uninterrupted)
    decisions = [record["decision"] for record in read_records(run_dir) if "decision" in record]
    assert decisions == ["requeue", "requeue", "wait", "done"], place.account(run_dir, job)
    assert {path.name for path in run_dir.logs.glob("attempt_*/*.log")} == {"rank_0.log", "rank_1.log"}
    assert f"stormy\tdone\t{STEPS}/{STEPS}" in place.longstride("runs").stdout
    written = [*run_dir.path.rglob("*"), *cluster.folder.rglob("*")]
    assert not [path for path in written if path.is_file() and SECRET.encode() in path.read_bytes()]


@pytest.fixture(scope="module")
def sweep(place: Place) -> list[tuple[RunDir, str]]:
    """Two runs as tasks of an array, which goes on beside other tests, and their first jobs. Node n1 fails the site's own check."""
    settings = [*SETTINGS, "parallel.cp=1", "train.steps=3", "--nodes", "1", "--time", "1:00:00"]
    unfit = "health: ['test $SLURMD_NODENAME != n1']\n"
    done = place.longstride("submit", "debug_cpu", "run.name=grid", *settings, "--sweep", "train.seed=0,1", more_of_site=unfit)
    assert done.returncode == 0 and "2 runs" in done.stdout, done.stderr
    runs = [RunDir(place.folder / "runs" / f"grid-{i}") for i in range(2)]
    number = done.stdout.split()[2]
    return [(run_dir, f"{number}_{i}") for i, run_dir in enumerate(runs)]


def test_cancelled_stays_cancelled_and_a_loop_without_progress_ends(place: Place, sweep: list[tuple[RunDir, str]]) -> None:
    cluster = place.cluster
    run_dir, job = place.submit("ended", "train.steps=1000000", "parallel.cp=1", nodes=1)
    place.wait_step(run_dir, job, 1)
    node = cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%N").strip()  # which one is free first is Slurm's choice
    assert "ended\trunning" in (shown := place.longstride("runs").stdout) and f"job {job} running on {node}\n" in shown
    assert node in ("n1", "n2")
    cluster.run("scancel", job)
    place.wait(run_dir, job, lambda: state_of(run_dir).status == "stopped", "saved state")
    place.wait(run_dir, job, lambda: "decision" in read_records(run_dir)[-1], "decision")
    assert read_records(run_dir)[-1]["decision"] == "wait"
    assert place.wait_state(run_dir, job, "CANCELLED") and cluster.restarts(job) == 0
    first = run_dir.checkpoint_steps()[-1]
    place.wait(run_dir, job, lambda: not cluster.run("squeue", "-h").strip(), "empty queue")

    job = place.resubmit("ended")
    place.wait_step(run_dir, job, first + 1)
    refused = place.longstride("resume", "ended", "--submit")
    assert refused.returncode == 2 and f"{job} is RUNNING" in refused.stderr
    assert place.longstride("cancel", "ended").returncode == 0
    assert place.wait_state(run_dir, job, "CANCELLED")
    assert state_of(run_dir).reason.endswith("as longstride cancel asked")
    second = run_dir.checkpoint_steps()[-1]
    assert second > first and steps(run_dir) == list(range(1, second + 1))
    place.wait(run_dir, job, lambda: not cluster.run("squeue", "-h").strip(), "empty queue")

    job = place.resubmit("ended")
    for restarts in (1, 2):
        place.wait(run_dir, job, lambda: bool(ranks(run_dir)), "ranks")
        ranks(run_dir)[0].kill()
        place.wait(run_dir, job, lambda wanted=restarts: cluster.restarts(job) == wanted, f"requeue {restarts}")
    assert place.wait_state(run_dir, job, "FAILED", "COMPLETED") == "FAILED"
    state = state_of(run_dir)
    assert state.status == "failed" and f"2 attempts in a row brought no new checkpoint after step {second}" in state.reason
    assert "no new checkpoint" in (run_dir.slurm / f"job_{job}.log").read_text()


def test_the_tasks_of_a_sweep_leave_a_node_that_is_not_fit(place: Place, sweep: list[tuple[RunDir, str]]) -> None:
    for run_dir, job in sweep:
        place.wait(
            run_dir, job, lambda run_dir=run_dir: (read_records(run_dir) or [{}])[-1].get("decision") == "done", "end on the other node"
        )
        found = read_records(run_dir)
        assert [record["nodes"] for record in found if "started" in record] == ["n1", "n2"]
        assert [record["decision"] for record in found if "decision" in record] == ["moved", "done"]
        assert "node n1 is not fit: site.health: test $SLURMD_NODENAME != n1" in found[1]["reason"]
        assert steps(run_dir) == [1, 2, 3] and place.cluster.state(job) == "FAILED"
        assert place.wait_state(run_dir, read_submission(run_dir).job_id, "COMPLETED")
        assert state_of(run_dir).status == "done"
    assert losses(sweep[0][0]) != losses(sweep[1][0]), "they differ in the seed"
