"""The directory of one run: every path in it, its status file, and the one way in which files are written.

Imports no torch: ``longstride runs`` and the Slurm commands read run directories without it. What each file holds is
known by the module that writes it; this one knows names, atomic writes and who is alive.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.errors import UserError

Status = Literal["queued", "running", "stopped", "done", "failed"]
ROOMS = ("trainer", "parallel", "memory_mgmt", "optim", "models", "slurm")
SOURCES = (".py", ".cpp", ".h", ".html", ".js", ".sbatch")
"""Files of the rooms that a run needs."""
STEP_NAME = re.compile(r"step_(\d{8,})")


def fsync_directory(path: Path) -> None:
    """Make renames and new names in ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: after a crash at any moment the file is the old one or the new one, never a mixture.

    Raises OSError (disk full, no permission) with the old file intact and no temporary file left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)  # less the umask
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


@dataclass(frozen=True)
class Process:
    """Which process runs a run, precisely enough to tell a dead one from another one with the same number."""

    pid: int
    host: str
    boot_id: str
    """Kernel's boot identity; empty where the kernel tells none."""
    namespace: str
    """Process-number namespace: a number means nothing in another container."""
    started_ticks: int
    """Kernel clock ticks from boot to the start of the process; 0 where unknown."""

    @classmethod
    def current(cls) -> Process:
        """The calling process."""
        boot = _read_text("/proc/sys/kernel/random/boot_id")
        return cls(os.getpid(), socket.gethostname(), boot, _pid_namespace(), _start_ticks(os.getpid()))

    def is_dead(self) -> bool:
        """True only if it certainly does not run any more; False if it runs or cannot be seen from here."""
        here = Process.current()
        if self.host != here.host:
            return False
        if self.boot_id != here.boot_id:
            return bool(self.boot_id and here.boot_id)
        if self.namespace != here.namespace:
            return False
        return _start_ticks(self.pid) != self.started_ticks if self.started_ticks else not Path(f"/proc/{self.pid}").exists()


def _read_text(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _pid_namespace() -> str:
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def _start_ticks(pid: int) -> int:
    """Start time of a process from /proc/<pid>/stat, 0 if there is none or it is a zombie."""
    fields = _read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()  # the name before ")" may hold spaces
    if len(fields) < 20 or fields[0] in "ZX":
        return 0
    return int(fields[19])


@dataclass(frozen=True)
class RunState:
    """What state.json says; written at changes of status, not at every step."""

    status: Status
    step: int
    """Last finished optimizer step when the file was written (metrics.jsonl is newer while a run runs)."""
    total_steps: int
    reason: str
    """Why the run is in this status, one line; empty while all is well."""
    started: float
    """Unix time in seconds of the first start."""
    updated: float
    process: Process


@dataclass(frozen=True)
class RunDir:
    """Paths of one run. Making a RunDir touches nothing on disk; ``create`` does."""

    path: Path

    def __init__(self, path: Path | str) -> None:
        object.__setattr__(self, "path", Path(path))

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    @property
    def memory_plan(self) -> Path:
        """Where every byte was planned to live."""
        return self.path / "memory_plan.json"

    @property
    def state(self) -> Path:
        """Status for ``longstride runs``."""
        return self.path / "state.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def passed_over(self) -> Path:
        """Data that guards took out of training."""
        return self.path / "passed_over.jsonl"

    @property
    def ranks(self) -> Path:
        """Speed and memory of every rank, as last reported."""
        return self.path / "ranks.json"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def logs(self) -> Path:
        """Output of every rank."""
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        """One directory per saved step."""
        return self.path / "checkpoints"

    @property
    def code(self) -> Path:
        """Snapshot of the source that ran."""
        return self.path / "code"

    @property
    def slurm(self) -> Path:
        """Job script, job ids, attempts, output of the script."""
        return self.path / "slurm"

    @property
    def imported(self) -> Path:
        """Where an imported model came from; only in a directory that ``longstride import`` made."""
        return self.path / "imported.json"

    @property
    def huggingface(self) -> Path:
        """An imported model's files that are not weights."""
        return self.path / "huggingface"

    def log(self, global_rank: int, attempt: int | None = None) -> Path:
        """Output of one rank; ``attempt``: of one start by Slurm, which has logs of its own."""
        folder = self.logs if attempt is None else self.logs / f"attempt_{attempt:03d}"
        return folder / f"rank_{global_rank}.log"

    def checkpoint(self, step: int) -> Path:
        """Directory of a published checkpoint."""
        return self.checkpoints / f"step_{step:08d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps of all published checkpoint directories, ascending, whether or not their content is good."""
        if not self.checkpoints.is_dir():
            return []
        with os.scandir(self.checkpoints) as entries:  # knows what is a directory without another system call
            matches = [STEP_NAME.fullmatch(entry.name) for entry in entries if entry.is_dir()]
        return sorted(int(match[1]) for match in matches if match and match[0] == f"step_{int(match[1]):08d}")

    def newest_step(self) -> int:
        """Of the newest published checkpoint; 0 where there is none."""
        return max(self.checkpoint_steps(), default=0)

    def create(self, private: bool = True) -> None:
        """Make the directory and its folders; ``private``: for nobody else to look into.

        Raises UserError when it holds anything already (a run is resumed, never overwritten) or cannot be written.
        """
        try:
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise UserError(
                    f"run directory {self.path} exists and is not empty: "
                    f"continue it with 'longstride resume {self.path}' or choose another run.name"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            if private:
                self.set_private(True)
            for folder in (self.tensorboard, self.logs, self.checkpoints):
                folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create run directory {self.path}: {error.strerror or error}; choose another run.root") from None

    def set_private(self, private: bool) -> None:
        """Let nobody else look into the directory, or again everybody whom the umask lets."""
        umask = os.umask(0)  # there is no other way to read it
        os.umask(umask)
        self.path.chmod(0o700 if private else 0o777 & ~umask)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process (rank 0 takes it); the kernel lets go when the process dies.

        Raises UserError if another live process holds it: two trainers in one directory would destroy each other's files.
        """
        try:
            stream = (self.path / ".lock").open("a")
        except OSError as error:
            raise UserError(f"cannot write in run directory {self.path}: {error.strerror or error}") from None
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"run {self.path} is being trained by another process: stop that one first") from None
            except OSError as error:  # a file system without locks: say so, and go on
                warnings.warn(f"cannot lock {self.path} ({error.strerror}); start this run once only", RuntimeWarning, stacklevel=3)
            yield

    def wait_until_free(self, seconds: float) -> None:
        """Wait, at most that long, while another process holds the run. What ``lock`` says afterwards counts.

        A job that Slurm starts again can come before the end of the attempt before: one that still saves on a node that was given up,
        or one whose node lost power and whose locks the file server keeps until it notices (90 seconds on NFS).
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                with (self.path / ".lock").open("a") as stream:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.2)
            except OSError:  # ``lock`` tells what it is
                return

    def write_state(self, status: Status, *, step: int, total_steps: int = 0, reason: str = "") -> None:
        """Record the status of the calling process's run. A disk that is full warns and does not raise: nobody trains for this file."""
        previous = self.read_state()
        now = time.time()
        state = RunState(
            status=status,
            step=step,
            total_steps=total_steps or (previous.total_steps if previous else 0),
            reason=" ".join(reason.split()),
            started=previous.started if previous else now,
            updated=now,
            process=Process.current(),
        )
        try:
            write_atomic(self.state, (json.dumps(dataclasses.asdict(state), indent=1) + "\n").encode())
        except OSError as error:
            warnings.warn(f"cannot write {self.state}: {error.strerror or error}", RuntimeWarning, stacklevel=2)

    def read_state(self) -> RunState | None:
        """The recorded status; None if there is none or it cannot be read."""
        try:
            return _parse_state(json.loads(self.state.read_bytes()))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def snapshot_code(self, source: Path | None = None) -> int:
        """Copy the rooms' sources to ``code/`` and return their number; ``source`` is the folder that holds the rooms.

        An earlier snapshot is replaced: it tells which code ran last. A job that runs from its snapshot keeps it.
        """
        root = source or Path(__file__).resolve().parent.parent
        if self.code.exists() and root.samefile(self.code):
            return 0
        rooms = [file for room in ROOMS for file in sorted((root / room).rglob("*")) if file.suffix in SOURCES]
        files = [root / "longstride.py", *rooms]
        shutil.rmtree(self.code, ignore_errors=True)
        copied = 0
        for file in files:
            if file.is_file():
                target = self.code / file.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
                copied += 1
        return copied


def _parse_state(record: dict[str, Any]) -> RunState:
    process = record["process"]
    return RunState(
        status=record["status"],
        step=int(record["step"]),
        total_steps=int(record["total_steps"]),
        reason=str(record["reason"]),
        started=float(record["started"]),
        updated=float(record["updated"]),
        process=Process(
            int(process["pid"]), str(process["host"]), str(process["boot_id"]), str(process["namespace"]), int(process["started_ticks"])
        ),
    )
