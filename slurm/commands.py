"""The verbs that ask Slurm: ``runs`` and ``cancel``, and what the batch script calls. Imports no torch."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from models.errors import UserError
from slurm import attempts, client
from slurm.submission import has_submission, job_of, read_submission
from trainer import runs_table
from trainer.commands.guard import guarded
from trainer.commands.places import find_run
from trainer.run_dir import RunDir, write_atomic
from trainer.runs_table import RunRow

QUEUE_SECONDS = 5.0
"""How long a table of runs waits for Slurm's controller."""
UNFINISHED = ("queued", "running", "stopped", "died", "unknown")


def list_runs(args: argparse.Namespace) -> int:
    """``longstride runs``."""
    rows = runs_table.read_runs(find_run(args.name, args.root).path if args.name else args.root)
    if rows:
        runs_table.render(with_jobs(rows))
    else:
        print(f"no runs in {args.root}")
    return 0


def with_jobs(rows: list[RunRow]) -> list[RunRow]:
    """``rows`` with what Slurm says of the jobs of runs that have any. Asked once, and only if some run may be in the queue."""
    tokens: dict[Path, str] = {}
    for row in rows:
        run_dir = RunDir(row.path)
        if has_submission(run_dir):
            try:
                submission = read_submission(run_dir)
            except UserError:
                continue
            tokens[row.path] = submission.token
    if not tokens or not client.has_slurm() or not any(row.status in UNFINISHED for row in rows if row.path in tokens):
        return rows
    try:
        jobs = client.queue(timeout=QUEUE_SECONDS)
    except UserError as error:
        print(f"note: {error}; the table shows what run directories say", file=sys.stderr)
        return rows
    return [_with_job(row, tokens.get(row.path), jobs) for row in rows]


def _with_job(row: RunRow, token: str | None, jobs: list[client.QueuedJob]) -> RunRow:
    """A run that waits or should be running, compared with the queue. Jobs are told by their token, not by their number."""
    if token is None or row.status not in UNFINISHED:
        return row
    job = job_of(token, jobs)
    if job is None:
        if row.status in ("stopped", "died"):  # saved or killed, and its job ended: cancelled, or not requeued
            return row
        return replace(row, status="died", reason="its job is no longer in the queue; longstride resume RUN --submit goes on")
    where = f"job {job.id} {job.state.lower()}" + (f" on {job.nodes}" if job.nodes else f" ({job.reason})" if job.reason else "")
    if row.status != "running" or job.state == "PENDING":
        status = {"PENDING": "queued", "RUNNING": "starting"}.get(job.state, row.status)
        before = row.reason if row.status == "stopped" else ""
        return replace(row, status=status, reason="; ".join(part for part in (where, before) if part))
    return replace(row, reason=where)


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
    job = job_of(submission.token, client.queue())
    if job is None:
        raise UserError(f"run {run_dir.name} has no job in the queue; longstride runs shows how it stands")
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
