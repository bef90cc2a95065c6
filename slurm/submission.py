"""What a run remembers of its submission: ``slurm/submission.json``. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from models.errors import UserError
from slurm.answers import EndedJob, QueuedJob
from trainer.run_dir import RunDir, write_atomic


@dataclass(frozen=True)
class Submission:
    """How a run was given to Slurm, last time."""

    token: str
    """In the comment of its jobs: an id that Slurm gave again to another job is told by it."""
    job_id: str
    """Empty until sbatch has answered."""
    idle_attempts: int
    """Attempts in a row without a new checkpoint after which it is no longer requeued."""
    options: dict[str, Any] = field(default_factory=dict)
    """Command-line options by name; a resubmission repeats them."""
    task: str = ""
    """Of a job array: which of its tasks runs this run; its jobs share a token."""
    node_check: bool = True
    """Every node is looked at before training."""
    health: tuple[str, ...] = ()
    """Commands of the site that have to succeed on every node."""
    excluded: tuple[str, ...] = ()
    """Nodes that were found unfit and are not asked for again."""
    chain: tuple[str, ...] = ()
    """Further jobs, each of which may start when the one before has ended."""


def comment_of(token: str) -> str:
    """What stands in the comment of a submission's jobs."""
    return f"longstride {token}"


def jobs_of(submission: Submission, jobs: Iterable[QueuedJob]) -> list[QueuedJob]:
    """The submission's jobs while Slurm knows them: told by their comment, because Slurm gives numbers again. One that runs goes before
    those that wait: a job that gave up a node is still there for a moment when the next one is queued. Of a chain all are there."""
    task = f"_{submission.task}" if submission.task else ""
    own = [job for job in jobs if job.comment == comment_of(submission.token) and job.id.endswith(task)]
    return sorted(own, key=lambda job: (job.state != "RUNNING", len(job.id), job.id))


def job_of(submission: Submission, jobs: Iterable[QueuedJob]) -> QueuedJob | None:
    """The first of ``jobs_of``, if there is one."""
    return next(iter(jobs_of(submission, jobs)), None)


def ended_job_of(submission: Submission, name: str, jobs: Iterable[EndedJob]) -> EndedJob | None:
    """The submission's job in accounting: by its comment where the cluster keeps comments, else by number and name."""
    own = [job for job in jobs if job.id == submission.job_id]
    told = [job for job in own if job.comment == comment_of(submission.token)]
    return next(iter(told or [job for job in own if not job.comment and job.name == name]), None)


def write_submission(run_dir: RunDir, submission: Submission) -> None:
    """Replace the record."""
    run_dir.slurm.mkdir(exist_ok=True)
    write_atomic(run_dir.slurm / "submission.json", (json.dumps(dataclasses.asdict(submission), indent=1) + "\n").encode())


def has_submission(run_dir: RunDir) -> bool:
    """Whether the run was ever given to Slurm."""
    return (run_dir.slurm / "submission.json").is_file()


def read_submission(run_dir: RunDir) -> Submission:
    """The record. Raises UserError when the run was never submitted or the record cannot be read."""
    path = run_dir.slurm / "submission.json"
    try:
        record = json.loads(path.read_bytes())
        options = record["options"]
        if not isinstance(options, dict):
            raise TypeError
        lists = {name: tuple(str(word) for word in record.get(name, ())) for name in ("health", "excluded", "chain")}
        task, check = str(record.get("task", "")), bool(record.get("node_check", True))
        return Submission(str(record["token"]), str(record["job_id"]), int(record["idle_attempts"]), options, task, check, **lists)
    except FileNotFoundError:
        raise UserError(f"run {run_dir.path} was not given to Slurm: longstride submit CONFIG, or longstride resume RUN --submit") from None
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{path}: cannot be read; remove it, and submit the run anew with longstride resume RUN --submit") from None
