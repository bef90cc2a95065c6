"""Is this node fit to train on? Looked at on every node before its ranks start, in a second or two. Imports no torch.

Each node leaves ``slurm/health/attempt_N/NODE.json``: what was measured, and what is wrong. A node that is not fit ends the attempt before
anything is trained; its job is submitted again without it (``attempts.decide``). What a cluster knows better, such as the links of its
network, it checks with commands of its own: ``health`` in site.yaml.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memory_mgmt.plan import MemoryPlan, gib
from slurm.submission import read_submission
from trainer.run_dir import RunDir, write_atomic

UNFIT = 76
"""Exit code of a node that is not fit; no rank ends with it."""
SKEW_SECONDS = 5.0
COPY_BYTES = 64 << 20
LEAST_COPY_GIB_PER_SECOND = 0.2
"""Of host memory, by one core. Ten times less than any healthy machine: one that is throttled to a crawl."""
WRITE_BYTES = 1 << 20
LEAST_SCRATCH_BYTES = 64 << 20
COMMAND_SECONDS = 120.0


@dataclass
class Health:
    """One node."""

    node: str
    problems: list[str] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)

    def need(self, what: str, found: float, least: float, text: str) -> None:
        """Note ``found``, and a problem when it is below ``least``."""
        self.measured[what] = found
        if found < least:
            self.problems.append(text)


def check(run_dir: RunDir, folder: Path, gpus: int, ranks: int, commands: Sequence[str], clock: Callable[[], float] = time.time) -> Health:
    """Look at this node, which is to run ``ranks`` ranks, with ``gpus`` GPUs (0: on CPU); write the note into ``folder``."""
    health = Health(node_name())
    plan = _plan(run_dir)
    _memory(health, plan, ranks, on_cpu=not gpus)
    if gpus:
        _gpus(health, gpus, plan)
    _disk(health, run_dir, plan)
    _file_server(health, folder, clock)
    _bandwidth(health)
    for command in commands:
        _site_command(health, command)
    write_atomic(folder / f"{health.node}.json", (json.dumps(vars(health)) + "\n").encode())
    return health


def node_name() -> str:
    """As Slurm calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def folder_of(run_dir: RunDir, attempt: int) -> Path:
    """Where the nodes of one attempt leave their notes."""
    return run_dir.slurm / "health" / f"attempt_{attempt:03d}"


def unfit_nodes(run_dir: RunDir, attempt: int) -> dict[str, str]:
    """Nodes of an attempt that are not fit, each with its first problem."""
    found = {}
    for path in sorted(folder_of(run_dir, attempt).glob("*.json")):
        try:
            note = json.loads(path.read_bytes())
            if note["problems"]:
                found[str(note["node"])] = str(note["problems"][0])
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            continue
    return found


def _plan(run_dir: RunDir) -> MemoryPlan | None:
    try:
        return MemoryPlan.from_json(run_dir.memory_plan.read_text())
    except (OSError, ValueError):
        return None


def _memory(health: Health, plan: MemoryPlan | None, ranks: int, on_cpu: bool) -> None:
    free = next(
        (int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:")), None
    )
    if free is None or plan is None:
        return
    needed = ranks * (plan.measurable_peak_bytes if on_cpu else plan.host_bytes)
    health.need("free_memory_bytes", free, needed, f"{gib(free)} of memory are free, {ranks} ranks are planned with {gib(needed)}")


def _gpus(health: Health, wanted: int, plan: MemoryPlan | None) -> None:
    """Through nvidia-smi: asking torch would take seconds and device memory."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        health.problems.append("nvidia-smi is not there, so neither are GPUs")
        return
    try:
        done = subprocess.run(
            [tool, "--query-gpu=index,memory.free", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
        )
    except subprocess.TimeoutExpired:
        health.problems.append(f"nvidia-smi gave no answer in {COMMAND_SECONDS:.0f} s")
        return
    rows = [line.split(",") for line in done.stdout.splitlines() if line.count(",") == 1]
    free = {row[0].strip(): int(row[1]) << 20 for row in rows if row[1].strip().isdigit()}
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    free = {name: size for name, size in free.items() if not visible or name in visible or not set(visible) <= free.keys()}
    health.need(
        "gpus", len(free), wanted, f"{len(free)} GPUs answer, {wanted} are needed: {' '.join(done.stderr.split())[:200]}".rstrip(": ")
    )
    for name, size in free.items():
        if plan is not None and size < plan.measurable_peak_bytes:
            health.problems.append(
                f"GPU {name} has {gib(size)} free, {gib(plan.measurable_peak_bytes)} are planned: is somebody else's process on it?"
            )


def _disk(health: Health, run_dir: RunDir, plan: MemoryPlan | None) -> None:
    kinds = plan.by_kind() if plan is not None else {}
    needed = kinds.get("parameters", 0) + kinds.get(
        "optimizer", 0
    )  # what one rank adds to a checkpoint; all of it is looked for at each save
    for name, place, least in (("run", run_dir.path, needed), ("scratch", Path(os.environ.get("TMPDIR", "/tmp")), LEAST_SCRATCH_BYTES)):
        try:
            found = os.statvfs(place)
        except OSError as error:
            health.problems.append(f"{place}: {error.strerror}")
            continue
        free = found.f_bavail * found.f_frsize
        if found.f_blocks:
            health.need(f"{name}_disk_free_bytes", free, least, f"{place} has {gib(free)} free, {gib(least)} are needed")


def _file_server(health: Health, folder: Path, clock: Callable[[], float]) -> None:
    """Write, sync and read back a file where the run is; its time is the file server's, the same for all nodes."""
    path = folder / f".{health.node}.probe"
    data = os.urandom(WRITE_BYTES)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        with path.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        seconds = time.perf_counter() - began
        written, now = path.stat().st_mtime, clock()
        if path.read_bytes() != data:
            health.problems.append(f"{folder}: a file does not read back as it was written")
    except OSError as error:
        health.problems.append(f"{folder}: {error.strerror or error}")
        return
    finally:
        path.unlink(missing_ok=True)
    health.measured["write_seconds"] = seconds
    skew = now - written
    health.measured["clock_skew_seconds"] = skew
    if abs(skew) > SKEW_SECONDS + seconds:
        health.problems.append(f"its clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the file server's")


def _bandwidth(health: Health) -> None:
    """In processor time: a neighbour on the node, or a load that goes away, is no defect of its memory."""
    source, target, best = memoryview(bytearray(COPY_BYTES)), memoryview(bytearray(COPY_BYTES)), float("inf")
    for _ in range(5):
        began = time.thread_time()
        target[:] = source
        best = min(best, max(time.thread_time() - began, 1e-6))
    rate = COPY_BYTES / 2**30 / best
    health.need("copy_gib_per_second", rate, LEAST_COPY_GIB_PER_SECOND, f"memory is copied at {rate:.2f} GiB/s: the node crawls")


def _site_command(health: Health, command: str) -> None:
    try:
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=COMMAND_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        health.problems.append(f"site.health: {command}: no end in {COMMAND_SECONDS:.0f} s")
        return
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[:200]
        health.problems.append(f"site.health: {command}: exit code {done.returncode}" + (f": {said}" if said else ""))


def node_run(path: str, attempt: str, gpus: str, ranks: str, *command: str) -> int:
    """Check this node and, if it is fit, become ``command``; else say why and return ``UNFIT``."""
    run_dir = RunDir(path)
    submission = read_submission(run_dir)
    problems: list[str] = []
    if submission.node_check:
        problems = check(run_dir, folder_of(run_dir, int(attempt)), int(gpus), int(ranks), submission.health).problems
    for problem in problems:
        print(f"node {node_name()} is not fit: {problem}", file=sys.stderr, flush=True)
    if not problems:
        from slurm import network  # here: longstride runs imports this module, and starts in half the time without psutil

        os.execve(command[0], command, {**os.environ, **network.variables(os.environ, int(gpus))})
    return UNFIT
