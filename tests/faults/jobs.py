"""Long stories of jobs on a real Slurm: everything that happens to one run of four ranks on two nodes, a run of the second engine, and
a controller that lost its memory. Run by ``python -m tests.faults``."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from slurm.attempts import read_records
from slurm.submission import read_submission
from tests.slurm.cluster import Cluster
from tests.slurm.test_on_a_cluster import SETTINGS, Place, losses, place, placed, ranks, state_of, steps  # noqa: F401 (a fixture)
from trainer.run_dir import RunDir

pytestmark = pytest.mark.timeout(3600)


def flip_one_bit(run_dir: RunDir) -> int:
    """Of the newest checkpoint, whose step is returned."""
    newest = run_dir.checkpoint_steps()[-1]
    shard = max(run_dir.checkpoint(newest).glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    return newest


def test_everything_happens_to_one_run(place: Place) -> None:  # noqa: F811
    """Two nodes, two ranks on each: the time limit, preemption, a rank killed and the newest checkpoint damaged, a node drained, cancelled,
    a loop without progress; each time it is submitted or starts again by itself, and in the end it is the run that nothing happened to."""
    cluster = place.cluster
    # The learning rate must not ask for the number of steps, which is not known before.
    shape = ["parallel.cp=2", "parallel.dp_shard=2", "optim.schedule.kind=constant", "checkpoint.save_every_steps=20"]
    run_dir, job = place.submit("eventful", *shape, "train.steps=1000000", "--time", "2")
    assert {line for line in (run_dir.slurm / "job.sbatch").read_text().splitlines() if "nodes=" in line} >= {"#SBATCH --nodes=2"}

    place.wait(run_dir, job, lambda: cluster.restarts(job) >= 1, "requeue at the time limit")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10:00:00")
    first = run_dir.checkpoint_steps()[-1]
    assert first == steps(run_dir)[-1] > 0 and "Slurm warns of the end" in (run_dir.slurm / f"job_{job}.log").read_text()
    place.wait_step(run_dir, job, first + 5)
    assert len(ranks(run_dir)) == 4

    restarts = cluster.restarts(job)
    high = cluster.run("sbatch", "--parsable", "-p", "high", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1").strip()
    place.wait(run_dir, job, lambda: cluster.restarts(job) == restarts + 1, "requeue after preemption")
    place.wait(run_dir, job, lambda: cluster.state(high) == "COMPLETED", "end of the job that preempted it")
    preempted = run_dir.checkpoint_steps()[-1]
    assert preempted == steps(run_dir)[-1] > first

    place.wait_step(run_dir, job, preempted + 21)
    ranks(run_dir)[0].kill()
    place.wait(run_dir, job, lambda: cluster.restarts(job) == restarts + 2, "requeue after a rank was killed")
    damaged = flip_one_bit(run_dir)
    place.wait(run_dir, job, lambda: (run_dir.checkpoints / f".damaged-step_{damaged:08d}").exists(), "damaged checkpoint set aside")
    place.wait_step(run_dir, job, damaged + 5)

    cluster.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    place.wait_step(run_dir, job, steps(run_dir)[-1] + 10)
    assert cluster.state(job) == "RUNNING" and cluster.restarts(job) == restarts + 2, "it goes on where a node is drained"
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    place.wait(run_dir, job, lambda: cluster.restarts(job) == restarts + 3, "requeue after the warning")
    time.sleep(8)  # longer than a requeued job has to wait
    assert cluster.state(job) == "PENDING", "there is one node only that takes jobs"
    cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    drained = run_dir.checkpoint_steps()[-1]
    place.wait_step(run_dir, job, drained + 5)

    assert place.longstride("cancel", "eventful").returncode == 0
    assert place.wait_state(run_dir, job, "CANCELLED", "COMPLETED", "FAILED") == "CANCELLED"
    cancelled = run_dir.checkpoint_steps()[-1]
    assert cancelled == steps(run_dir)[-1] > drained and state_of(run_dir).status == "stopped"
    place.wait(run_dir, job, lambda: not cluster.run("squeue", "-h").strip(), "empty queue: it stays cancelled")
    assert cluster.restarts(job) == restarts + 3

    job = place.resubmit("eventful")
    for count in (1, 2):
        place.wait(run_dir, job, lambda: len(ranks(run_dir)) == 4, "ranks")
        ranks(run_dir)[0].kill()
        place.wait(run_dir, job, lambda wanted=count: cluster.restarts(job) == wanted, f"requeue {count}")
    assert place.wait_state(run_dir, job, "FAILED", "COMPLETED") == "FAILED"
    assert f"2 attempts in a row brought no new checkpoint after step {cancelled}" in state_of(run_dir).reason

    end = cancelled + 30
    done = place.longstride("resume", "eventful", f"train.steps={end}", "--submit", "--time", "2:00:00")
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[1]
    assert place.wait_state(run_dir, job, "COMPLETED", "FAILED") == "COMPLETED", place.account(run_dir, job)
    words = [record["decision"] for record in read_records(run_dir) if "decision" in record]
    assert words[-1] == "done" and {"wait", "requeue", "cancel"} < set(words) and state_of(run_dir).status == "done"

    done = place.longstride("train", "debug_cpu", "run.name=uneventful", *SETTINGS, *shape, f"train.steps={end}", timeout=900)
    assert done.returncode == 0, done.stderr
    whole = losses(RunDir(place.folder / "runs" / "uneventful"))
    assert losses(run_dir) == whole, "losses in every bit, and the position in the data after each step"
    assert [step for step, *_ in whole] == list(range(1, end + 1))


def test_a_job_of_the_second_engine(place: Place) -> None:  # noqa: F811
    """``engine: deepspeed`` on two nodes: warned, killed, and equal to its uninterrupted run in every bit."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    settings = ["engine=deepspeed", "parallel.cp=1", "parallel.dp_shard=2", "memory.plan=trace", "train.steps=120"]
    cluster = place.cluster
    run_dir, job = place.submit("zero", *settings, "checkpoint.save_every_steps=20")
    place.wait_step(run_dir, job, 2)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    place.wait(run_dir, job, lambda: cluster.restarts(job) == 1, "requeue after the warning")
    saved = steps(run_dir)[-1]
    assert run_dir.checkpoint_steps()[-1] == saved
    place.wait_step(run_dir, job, saved + 1)
    ranks(run_dir)[0].kill()
    place.wait(run_dir, job, lambda: cluster.restarts(job) == 2, "requeue after a rank was killed")
    assert place.wait_state(run_dir, job, "COMPLETED", "FAILED") == "COMPLETED", place.account(run_dir, job)
    assert [record["decision"] for record in read_records(run_dir) if "decision" in record] == ["requeue", "requeue", "done"]
    done = place.longstride("train", "debug_cpu", "run.name=zero_whole", *SETTINGS, *settings, timeout=600)
    assert done.returncode == 0, done.stderr
    assert losses(run_dir) == losses(RunDir(place.folder / "runs" / "zero_whole")) and len(losses(run_dir)) == 120


def test_a_chain_where_jobs_are_not_requeued(place: Place) -> None:  # noqa: F811
    """The cluster refuses to requeue: the job ends saved, the next one of the chain goes on, and what is left is cancelled at the end."""
    cluster, settings = place.cluster, ["parallel.cp=1", "train.steps=300"]
    run_dir, job = place.submit("chained", *settings, "--chain", "3", nodes=1)
    cluster.run("scontrol", "update", f"JobId={job}", "Requeue=0")
    place.wait_step(run_dir, job, 5)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    place.wait_state(run_dir, job, "FAILED")
    saved = run_dir.checkpoint_steps()[-1]
    assert "this cluster does not requeue" in (run_dir.slurm / f"job_{job}.log").read_text()
    second, third = read_submission(run_dir).chain
    assert place.wait_state(run_dir, second, "COMPLETED", "FAILED") == "COMPLETED", place.account(run_dir, second)
    assert place.wait_state(run_dir, third, "CANCELLED", "COMPLETED", "FAILED") == "CANCELLED"
    assert [record["job"] for record in read_records(run_dir) if "started" in record] == [job, second]
    assert steps(run_dir) == list(range(1, 301)) and 5 <= saved < 300 and state_of(run_dir).status == "done"


def test_the_controller_forgets_and_gives_the_number_again(tmp_path: Path) -> None:
    """It is killed, its memory is wiped, and somebody else's job gets the number of a run's job: nobody takes that one for the run's."""
    with placed(tmp_path, cluster := Cluster()) as here:
        run_dir, job = here.submit("forgotten", "parallel.cp=1", "train.steps=1000000", nodes=1)
        here.wait_step(run_dir, job, 3)
        controller = next(process for process in cluster._processes if "slurmctld" in process.name())
        controller.kill()
        controller.wait()
        cluster._processes.remove(controller)
        shutil.rmtree(cluster.folder / "state")
        (cluster.folder / "state").mkdir()
        (cluster.folder / "slurmctld.log").unlink()
        cluster._daemon("slurmctld", ["-c"])
        deadline = time.monotonic() + 90
        while subprocess.run(["scontrol", "ping"], env=cluster.env, capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        number = cluster.run("sbatch", "--parsable", "--hold", "-J", "forgotten", "-o", "/dev/null", "--wrap", "sleep 60").strip()
        assert number == job, "the number is given again, and the name is the same"
        shown = here.longstride("runs").stdout
        assert "forgotten\tdied" in shown and "no longer in the queue" in shown, shown
        done = here.longstride("cancel", "forgotten")
        assert done.returncode == 2 and "no job in the queue" in done.stderr, done.stderr
        assert cluster.state(number) == "PENDING", "the other one's job is left alone"
        for rank in ranks(run_dir):
            with contextlib.suppress(ProcessLookupError):
                rank.kill()
