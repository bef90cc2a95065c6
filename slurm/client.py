"""Slurm's own commands, called with lists of arguments (never through a shell) and with a time limit. Imports no torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from models.errors import UserError
from slurm.answers import EndedJob, QueuedJob, ended_from_json, ended_from_text, queued_from_json, queued_from_text

TIMEOUT_SECONDS = 30.0
_FIELDS = "%i|%T|%N|%r|%k"
_ENDED_FIELDS = "JobID,State,ExitCode,NodeList,JobName,Comment"


def has_slurm() -> bool:
    """Whether Slurm's commands are on PATH."""
    return shutil.which("squeue") is not None


def need_slurm() -> None:
    """Raise UserError where nothing can be queued, before anything is planned or made for it."""
    if shutil.which("sbatch") is None:
        raise UserError(_not_found("sbatch"))


def _not_found(command: str) -> str:
    return f"{command}: not found; is this a machine with Slurm? longstride train runs without it"


def sbatch(script: Path, *options: str) -> str:
    """Submit ``script``; the job id. ``options`` win over those in it. Raises UserError with Slurm's own words."""
    answer = _call(["sbatch", "--parsable", *options, "--", str(script)])
    match = re.match(r"(\d+)(;|$)", answer.strip())
    if match is None:
        raise UserError(f"sbatch: cannot read the job id in its answer: {answer.strip()[:200]!r}; see squeue --me")
    return match[1]


def queue(ids: Sequence[str] | None = None, timeout: float = TIMEOUT_SECONDS) -> list[QueuedJob]:
    """The user's jobs that are queued or running (``ids``: only those of them). Raises UserError when Slurm does not answer."""
    jobs = queued_from_text(_call(["squeue", "--me", "--array", "--noheader", f"--format={_FIELDS}"], timeout))
    if jobs is None:
        jobs = queued_from_json(_call(["squeue", "--me", "--json"], timeout))
    return jobs if ids is None else [job for job in jobs if job.id in ids]


def ended(ids: Sequence[str], timeout: float = TIMEOUT_SECONDS) -> list[EndedJob]:
    """What accounting remembers of jobs by number, the latest of each number last. Raises UserError where there is no accounting."""
    numbers = f"--jobs={','.join(ids)}"
    jobs = ended_from_text(_call(["sacct", "--allocations", "--parsable2", "--noheader", f"--format={_ENDED_FIELDS}", numbers], timeout))
    return ended_from_json(_call(["sacct", "--json", numbers], timeout)) if jobs is None else jobs


def has_accounting() -> bool:
    """Whether sacct is on PATH."""
    return shutil.which("sacct") is not None


def cancel(job_id: str) -> None:
    """End a job, queued or running."""
    _call(["scancel", "--", job_id])


def leave_out(job_id: str, nodes: Sequence[str]) -> None:
    """Ask for other nodes than these in a job that waits."""
    _call(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(nodes)}"])


def node_addresses(nodes: str, timeout: float = 5.0) -> dict[str, str]:
    """By which name or number Slurm itself reaches each of ``nodes``, such as ``n[1-4]``."""
    lines = _call(["scontrol", "--oneliner", "show", "nodes", nodes], timeout).splitlines()
    found = [(re.search(r"\bNodeName=(\S+)", line), re.search(r"\bNodeAddr=(\S+)", line)) for line in lines]
    return {name[1]: address[1] for name, address in found if name and address}


def warn(job_id: str) -> None:
    """Send the batch script of a running job the signal that comes before a time limit."""
    _call(["scancel", "--batch", "--signal=USR1", "--", job_id])


def _call(command: list[str], timeout: float = TIMEOUT_SECONDS) -> str:
    try:
        # What a job's own environment says of it is not meant for another job that it submits.
        env = {name: value for name, value in os.environ.items() if name == "SLURM_CONF" or not name.startswith(("SLURM_", "SBATCH_"))}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, errors="replace", stdin=subprocess.DEVNULL,
            env=env if command[0] == "sbatch" and "SLURM_JOB_ID" in os.environ else None,
        )  # fmt: skip
    except FileNotFoundError:
        raise UserError(_not_found(command[0])) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: no answer in {timeout:.0f} s; is Slurm's controller up? (scontrol ping)") from None
    if done.returncode:
        raise UserError(f"{command[0]}: {_said(command[0], done.stderr) or f'exit code {done.returncode}'}")
    return done.stdout


def _said(command: str, text: str) -> str:
    """What Slurm wrote to its error stream as one line: each of its lines once, without its own name and rank before it."""
    lines = [re.sub(rf"^({re.escape(command)}: )?((error|fatal): )?", "", " ".join(line.split())) for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line))
