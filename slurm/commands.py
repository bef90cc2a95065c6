"""The verbs that ask Slurm: ``runs`` and ``cancel``, and what the batch script calls. Imports no torch."""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import replace
from pathlib import Path

from models.errors import UserError
from slurm import attempts, client
from slurm.answers import EndedJob, QueuedJob
from slurm.submission import Submission, ended_job_of, has_submission, job_of, jobs_of, read_submission
from trainer import runs_table
from trainer.commands.guard import guarded
from trainer.commands.places import find_run
from trainer.run_dir import RunDir, write_atomic
from trainer.runs_table import RunRow

QUEUE_SECONDS = 5.0
"""How long a table of runs waits for Slurm's controller."""
GONE = "its job is no longer in the queue; longstride resume RUN --submit goes on"
UNFINISHED = ("queued", "running", "stopped", "died", "unknown")


def list_runs(args: argparse.Namespace) -> int:
    """``longstride runs``."""
    rows = runs_table.read_runs(find_run(args.name, args.root).path if args.name else args.root)
    if rows:
        runs_table.render(with_jobs(rows))
    else:
        print(f"no runs in directory {args.root} (--root DIR looks elsewhere)")
    return 0


def with_jobs(rows: list[RunRow]) -> list[RunRow]:
    """``rows`` with their jobs and what Slurm says of them. Slurm is asked once, and only if some run may be in the queue; accounting
    once, and only if some job is not in the queue that should be."""
    submissions: dict[Path, Submission] = {}
    for row in rows:
        if has_submission(run_dir := RunDir(row.path)):
            with contextlib.suppress(UserError):
                submissions[row.path] = read_submission(run_dir)
    rows = [_with_last_job(row, submissions.get(row.path)) for row in rows]
    if not client.has_slurm() or not any(row.status in UNFINISHED for row in rows if row.path in submissions):
        return rows
    try:
        jobs = client.queue(timeout=QUEUE_SECONDS)
    except UserError as error:
        print(f"note: {error}; the table shows what run directories say", file=sys.stderr)
        return rows
    rows = [_with_job(row, submissions.get(row.path), jobs) for row in rows]
    return _with_accounts(rows, submissions)


def _with_last_job(row: RunRow, submission: Submission | None) -> RunRow:
    """The number of the run's last job, and the nodes of its last attempt."""
    if submission is None:
        return row
    started = [record for record in attempts.read_records(RunDir(row.path)) if "started" in record]
    nodes = str(started[-1].get("nodes", "")) if started else ""
    links = [str(record["job"]) for record in started if record.get("job") in submission.chain]
    return replace(row, job=links[-1] if links else submission.job_id, nodes=nodes)


def _with_job(row: RunRow, submission: Submission | None, jobs: list[QueuedJob]) -> RunRow:
    """A run that waits or should be running, compared with the queue. Jobs are told by their token, not by their number."""
    if submission is None or row.status not in UNFINISHED:
        return row
    job = job_of(submission, jobs)
    if job is None:
        if row.status in ("stopped", "died"):  # saved or killed, and its job ended: cancelled, or not requeued
            return row
        return replace(row, status="died", reason=GONE)
    row = replace(row, job=job.id, nodes=job.nodes or row.nodes)
    where = f"job {job.id} {job.state.lower()}" + (f" on {job.nodes}" if job.nodes else f" ({job.reason})" if job.reason else "")
    if row.status == "stopped" and job.state == "RUNNING" and row.updated > _last_start(row):
        return replace(row, reason=f"{where}; {row.reason}")  # saved, and about to end
    if row.status != "running" or job.state == "PENDING":
        status = {"PENDING": "queued", "RUNNING": "starting"}.get(job.state, row.status)
        before = row.reason if row.status == "stopped" else ""
        return replace(row, status=status, reason="; ".join(part for part in (where, before) if part))
    return replace(row, reason=where)


def _last_start(row: RunRow) -> float:
    return max((float(record["started"]) for record in attempts.read_records(RunDir(row.path)) if "started" in record), default=0.0)


def _with_accounts(rows: list[RunRow], submissions: dict[Path, Submission]) -> list[RunRow]:
    """Why jobs ended whose runs could not say so themselves."""
    silent = [row for row in rows if row.status == "died" and row.job and row.path in submissions]
    if not silent or not client.has_accounting():
        return rows
    try:
        jobs = client.ended([row.job for row in silent], timeout=QUEUE_SECONDS)
    except UserError:  # most often: no accounting on this cluster
        return rows
    found = {row.path: ended_job_of(replace(submissions[row.path], job_id=row.job), row.name, jobs) for row in silent}
    return [replace(row, reason=f"{_account(job)}; {row.reason}") if (job := found.get(row.path)) else row for row in rows]


def _account(job: EndedJob) -> str:
    code = f" (exit code {job.exit_code})" if job.exit_code not in ("", "0:0") else ""
    return f"job {job.id} ended {job.state}{code}" + (f" on {job.nodes}" if job.nodes else "")


def write_report(args: argparse.Namespace) -> int:
    """``longstride report``."""
    from trainer import report

    run_dir = find_run(args.name, args.root)
    path = Path(args.output) if args.output else run_dir.path / "report.html"
    row = with_jobs([runs_table.read_run(run_dir.path)])[0]
    try:
        write_atomic(path, report.page(row, attempts.read_records(run_dir)).encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another place with --output") from None
    print(f"written: {path}")
    return 0


def cancel(args: argparse.Namespace) -> int:
    """``longstride cancel``: a running job saves first, unless ``--now``."""
    run_dir = find_run(args.name, args.root)
    submission = read_submission(run_dir)
    jobs = jobs_of(submission, client.queue())
    if not jobs:
        raise UserError(f"run {run_dir.name} has no job in the queue; longstride runs shows how it stands")
    job, *behind = jobs
    for link in reversed(behind):  # the last one first: none may start because the one before it is gone
        client.cancel(link.id)
    if job.state == "RUNNING" and not args.now:
        attempts.cancel_marker(run_dir, job.id).touch()
        client.warn(job.id)
        print(f"job {job.id}: saves after the step it is in, then ends; --now does not wait for that")
        return 0
    client.cancel(job.id)
    if job.state == "PENDING":
        state = run_dir.read_state()
        run_dir.write_state("stopped", step=state.step if state else 0, reason=f"job {job.id} cancelled before it started")
    print(f"job {job.id} cancelled")
    return 0


# --- called by the batch script


def job_start(path: str, job_id: str, nodes: str) -> int:
    """Print the number of the attempt that begins, or ``done``."""

    def run() -> int:
        print(attempts.start(RunDir(path), job_id, nodes))
        return 0

    return guarded(run, sys.stderr, debug=False)


def job_end(path: str, job_id: str, attempt: str, exit_code: str) -> int:
    """Print what the job does now, a word first."""

    def run() -> int:
        print(attempts.end(RunDir(path), job_id, int(attempt), int(exit_code)))
        return 0

    return guarded(run, sys.stderr, debug=False)
