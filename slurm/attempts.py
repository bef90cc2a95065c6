"""What happened each time Slurm started a run, and what its job does next. Imports no torch.

``slurm/attempts.jsonl`` in the run directory has one line for the start of an attempt and one for its end; every rank leaves a note
when it ends by itself (``trainer/rank_notes.py``). The batch script calls ``start`` and ``end`` and does what they answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.errors import RunFailed, UserError
from slurm import client, health
from slurm.submission import jobs_of, read_submission, write_submission
from trainer.rank_notes import RankNote, read_notes
from trainer.run_dir import RunDir

DONE = "done"
MOST_EXCLUDED = 8
"""So many nodes may be left out of one run's jobs before something else is suspected."""


@dataclass(frozen=True)
class Decision:
    """What the batch script does when the ranks have ended."""

    word: str
    """done: exit 0; requeue: start again; wait: be ended by Slurm; cancel: end this job; moved: exit 1, and another job goes on;
    fail: exit 1."""
    reason: str

    def __str__(self) -> str:
        return f"{self.word}: {self.reason}"


def start(run_dir: RunDir, job_id: str, nodes: str) -> str:
    """Note the beginning of an attempt; its number, or ``DONE`` when the run has all its steps.

    Raises RunFailed when the job has been started too often without getting further.
    """
    from trainer import config_file  # here: longstride runs reads attempts, and starts in half the time without

    state = run_dir.read_state()
    steps = config_file.resolve(run_dir.config).train.steps
    if state is not None and state.status == "done" and state.step >= steps:
        return DONE
    records = read_records(run_dir)
    saved = run_dir.newest_step()
    submission = read_submission(run_dir)
    idle = _idle_attempts(records, {job_id, *submission.chain, *([submission.job_id] if submission.chain else [])}, saved)
    if idle >= submission.idle_attempts:
        last = next((record["reason"] for record in reversed(records) if "reason" in record), "it left no reason")
        reason = f"{idle} attempts in a row brought no new checkpoint after step {saved}; the last one: {last}"
        run_dir.write_state("failed", step=saved, reason=f"not requeued any more: {reason}")
        raise RunFailed(f"{reason}\nlogs: {run_dir.logs}; when the cause is gone: longstride resume {run_dir.path} --submit")
    number = 1 + max((record["attempt"] for record in records), default=0)
    _append(run_dir, {"attempt": number, "job": job_id, "nodes": nodes, "saved_step": saved, "started": time.time()})
    return str(number)


def end(run_dir: RunDir, job_id: str, attempt: int, exit_code: int) -> Decision:
    """Note the end of an attempt and decide what its job does now. ``exit_code``: of the ranks' launcher.

    On a node that was given up while it lived an attempt can end after the next one has begun: it decides nothing then.
    """
    if max((record["attempt"] for record in read_records(run_dir)), default=0) > attempt:
        return Decision("wait", "a later attempt has begun")
    decision = decide(read_notes(run_dir, attempt), exit_code, cancelled=cancel_marker(run_dir, job_id).exists())
    unfit = health.unfit_nodes(run_dir, attempt)
    if unfit and decision.word in ("requeue", "fail"):
        decision = _move(run_dir, job_id, unfit)
    saved = run_dir.newest_step()
    _append(run_dir, {"attempt": attempt, "job": job_id, "ended": time.time(), "saved_step": saved, **_as_dict(decision)})
    if decision.word in ("done", "cancel", "fail"):
        with contextlib.suppress(UserError):  # what is not cancelled ends when it starts: the run is done, or makes no progress
            for link in _behind(run_dir, job_id):
                client.cancel(link)
    if decision.word == "requeue" and exit_code:
        state = run_dir.read_state()
        reason = state.reason if state is not None and state.status == "failed" else decision.reason  # else they could not write why
        run_dir.write_state("stopped", step=saved, reason=f"{reason}; requeued")
    if decision.word == "cancel" and not exit_code:  # more than the signal that it came by
        run_dir.write_state("stopped", step=saved, reason=decision.reason)
    return decision


def _behind(run_dir: RunDir, job_id: str) -> list[str]:
    """The jobs of a chain that wait, the last one first."""
    submission = read_submission(run_dir)
    if not submission.chain:
        return []
    return [job.id for job in reversed(jobs_of(submission, client.queue())) if job.id != job_id]


def _move(run_dir: RunDir, job_id: str, unfit: dict[str, str]) -> Decision:
    """Give the run to another job, without the nodes that are not fit: a job that has begun cannot change what it asks for."""
    why = "; ".join(f"node {node} is not fit: {problem}" for node, problem in unfit.items())
    submission = read_submission(run_dir)
    excluded = tuple(dict.fromkeys([*submission.excluded, *unfit]))

    def fail(reason: str) -> Decision:
        run_dir.write_state("failed", step=run_dir.newest_step(), reason=reason)
        return Decision("fail", reason)

    if len(excluded) > MOST_EXCLUDED:
        return fail(f"{why}; {len(excluded)} nodes were not fit, so what they have in common is to blame")
    task = [f"--array={submission.task}"] if submission.task else []
    try:
        if waiting := _behind(run_dir, job_id):
            for link in waiting:
                client.leave_out(link, excluded)
            write_submission(run_dir, replace(submission, excluded=excluded))
            return Decision("moved", f"{why}; job {waiting[-1]} goes on without it")
        number = client.sbatch(run_dir.slurm / "job.sbatch", f"--exclude={','.join(excluded)}", *task)
    except UserError as error:
        return fail(f"{why}; it could not be submitted again without it: {error}")
    job = f"{number}_{submission.task}" if submission.task else number
    write_submission(run_dir, replace(submission, job_id=job, excluded=excluded))
    run_dir.write_state("queued", step=run_dir.newest_step(), reason=f"job {job}; {why}")
    return Decision("moved", f"{why}; job {job} goes on without it")


def decide(notes: dict[int, RankNote], exit_code: int, *, cancelled: bool = False) -> Decision:
    """From what the ranks left to what the job does; pure.

    A rank that refuses (bad settings, a loss that is not finite) would refuse again: the job fails. Ranks that were lost may find a
    better node: the job is requeued. Asked by SIGTERM, the job is not ours any more: Slurm cancels or requeues it.
    """
    refused = [note for note in notes.values() if note.refused]
    if refused:
        return Decision("fail", refused[0].reason)
    first = notes.get(0)
    if exit_code == 0 and first is not None and first.code == 0:
        return Decision("done", "all steps are done")
    if exit_code == 0 and first is not None and first.signal_number:
        name = signal.Signals(first.signal_number).name
        if cancelled:
            return Decision("cancel", f"saved at step {first.step}, as longstride cancel asked")
        if first.signal_number == signal.SIGTERM:
            return Decision("wait", f"saved at step {first.step} after {name}")
        return Decision("requeue", f"saved at step {first.step} after {name}")
    told = [f"rank {rank}: {note.reason}" for rank, note in sorted(notes.items()) if note.reason]
    reason = told[0] if told else f"ranks were killed (exit code {exit_code})"
    return Decision("cancel" if cancelled else "requeue", reason)


def cancel_marker(run_dir: RunDir, job_id: str) -> Path:
    """A file that says that ``longstride cancel`` asked this job to save and end."""
    return run_dir.slurm / f"cancel_{job_id}"


def read_records(run_dir: RunDir) -> list[dict[str, Any]]:
    """All starts and ends of attempts, oldest first; a torn line is left out."""
    try:
        lines = (run_dir.slurm / "attempts.jsonl").read_bytes().splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("attempt"), int):
            records.append(record)
    return records


def _idle_attempts(records: list[dict[str, Any]], jobs: set[str], saved: int) -> int:
    """The latest attempts in a row of a job, or of a chain's ``jobs``, that began at the checkpoint step ``saved``, still the newest."""
    starts = [record for record in records if record.get("job") in jobs and "started" in record]
    count = 0
    for record in reversed(starts):
        if record.get("saved_step") != saved:
            break
        count += 1
    return count


def _as_dict(decision: Decision) -> dict[str, str]:
    return {"decision": decision.word, "reason": decision.reason}


def _append(run_dir: RunDir, record: dict[str, Any]) -> None:
    with (run_dir.slurm / "attempts.jsonl").open("ab") as stream:
        if stream.tell() and not _ends_line(run_dir.slurm / "attempts.jsonl"):
            stream.write(b"\n")  # the one before was torn
        stream.write((json.dumps(record) + "\n").encode())
        stream.flush()
        os.fsync(stream.fileno())


def _ends_line(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"
