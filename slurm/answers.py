"""What Slurm's commands say about jobs, read: lines of text, or JSON in the shapes that its releases have had. Imports no torch.

Text is asked for first: its fields have not changed in ten years. JSON changes with every release (22.05: a state is a text; 23.11: a list;
24.05: numbers are objects, node lists move), so it is read by what is there, and a job that cannot be read is left out, not guessed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "REVOKED",
    "LAUNCH_FAILED", "RECONFIG_FAIL",
}  # fmt: skip
"""States that a job does not leave."""


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue shows it."""

    id: str
    state: str
    """PENDING, RUNNING, COMPLETING, CANCELLED, ..."""
    nodes: str
    reason: str
    comment: str


@dataclass(frozen=True)
class EndedJob:
    """A job as sacct remembers it."""

    id: str
    name: str
    state: str
    """COMPLETED, FAILED, TIMEOUT, OUT_OF_MEMORY, NODE_FAIL, PREEMPTED, CANCELLED, ..."""
    exit_code: str
    """``1:0``: exit code and signal."""
    nodes: str
    comment: str
    """Empty where the cluster does not keep it."""


def queued_from_text(text: str) -> list[QueuedJob] | None:
    """``squeue --format=%i|%T|%N|%r|%k``, without lines that are not that (comments may hold line breaks); None when none is."""
    rows = [line.split("|", 4) for line in text.splitlines() if line.strip()]
    jobs = [QueuedJob(*(field.strip() for field in row)) for row in rows if len(row) == 5]
    return jobs if jobs or not rows else None


def ended_from_text(text: str) -> list[EndedJob] | None:
    """``sacct --parsable2 --format=JobID,State,ExitCode,NodeList,JobName,Comment``, without lines that are not that; None when none is.

    A name may hold the separator: it is read between the fields that may not. Jobs that have not ended (one that the controller has
    forgotten stays PENDING for ever) are left out."""
    rows = [line.split("|") for line in text.splitlines() if line.strip()]
    good = [row for row in rows if len(row) >= 6 and row[0].split("_")[0].isdigit()]
    jobs = [EndedJob(row[0], "|".join(row[4:-1]), _first_word(row[1]), row[2], _no_none(row[3]), row[-1]) for row in good]
    return [job for job in jobs if job.state in ENDED] if jobs or not rows else None


def queued_from_json(text: str) -> list[QueuedJob]:
    """``squeue --json`` of any release; it shows jobs for some minutes after their end, which are left out."""
    return [
        QueuedJob(number, state, _nodes(job), _text(job.get("state_reason")), _comment(job))
        for job in _jobs(text)
        if (state := _state(job.get("job_state"))) and state not in ENDED and (number := _number(job))
    ]


def ended_from_json(text: str) -> list[EndedJob]:
    """``sacct --json`` of any release: the latest record of each job (a requeued one has several), if it has ended."""
    latest: dict[str, tuple[int, EndedJob]] = {}
    for job in _jobs(text):
        if (state := _state(job.get("state"))) and (number := _number(job)):
            times = job.get("time")
            submitted = _text(times.get("submission")) if isinstance(times, dict) else ""
            when = int(submitted) if submitted.isdecimal() else 0
            found = EndedJob(number, _text(job.get("name")), state, _exit_code(job.get("exit_code")), _nodes(job), _comment(job))
            if number not in latest or when >= latest[number][0]:
                latest[number] = (when, found)
    return [job for _, job in latest.values() if job.state in ENDED]


def _number(job: dict[str, Any]) -> str:
    """``41``, or ``41_3`` of a task of an array, as in text. squeue: ``array_job_id`` and ``array_task_id``; sacct: both in ``array``."""
    array = job.get("array")
    within = array if isinstance(array, dict) else {}
    first = _text(job.get("array_job_id")) or _text(within.get("job_id"))
    task = _text(job.get("array_task_id")) or _text(within.get("task_id"))
    return f"{first}_{task}" if first not in ("", "0") and task else _text(job.get("job_id"))


def _jobs(text: str) -> Iterable[dict[str, Any]]:
    try:
        answer = json.loads(text)
    except ValueError:
        return []
    jobs = answer.get("jobs") if isinstance(answer, dict) else None
    return [job for job in jobs if isinstance(job, dict)] if isinstance(jobs, list) else []


def _state(value: Any) -> str:
    """``"RUNNING"``, ``["RUNNING", ...]``, ``{"current": either}``."""
    if isinstance(value, dict):
        return _state(value.get("current"))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _state(value[0]) if value else ""
    return _first_word(value) if isinstance(value, str) else ""


def _text(value: Any) -> str:
    """A text or number, also as ``{"set": true, "infinite": false, "number": 41}``."""
    if isinstance(value, dict):
        return _text(value.get("number")) if value.get("set", True) else ""
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _nodes(job: dict[str, Any]) -> str:
    """``nodes`` is a text, or ``{"list": ...}``; newer releases have it below ``job_resources`` too."""
    resources = job.get("job_resources")
    for value in (job.get("nodes"), resources.get("nodes") if isinstance(resources, dict) else None):
        if isinstance(value, str) and value:
            return _no_none(value)
        if isinstance(value, dict) and isinstance(value.get("list"), str):
            return value["list"]
    return ""


def _no_none(nodes: str) -> str:
    """Accounting says so of a job that never started."""
    return "" if nodes == "None assigned" else nodes


def _comment(job: dict[str, Any]) -> str:
    """squeue: a text. sacct: ``{"job": text, "administrator": ..., "system": ...}``."""
    value = job.get("comment")
    return _text(value.get("job")) if isinstance(value, dict) and "job" in value else _text(value)


def _exit_code(value: Any) -> str:
    if not isinstance(value, dict):
        return _text(value)
    signal = value.get("signal")
    number = _text((signal.get("id", signal.get("signal_id"))) if isinstance(signal, dict) else signal)
    return f"{_text(value.get('return_code')) or 0}:{number or 0}"


def _first_word(state: str) -> str:
    """``CANCELLED by 1000`` is CANCELLED."""
    return (state.split() or [""])[0].rstrip("+")
