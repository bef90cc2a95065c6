"""Start N ranks of one run on this machine, hand them signals once, and end them together.

Processes are started and held by torch's elastic multiprocessing layer; the policy is ours, because elastic's own agent kills
workers 30 s after a signal, dies of SIGUSR1 and takes exit code 75 (stopped, resumable) for a failure. No restarts, one machine:
several machines are started by torchrun or srun.

The rank's half is ``join_launcher``: it dies with the launcher and writes its output to its own log. Importing it imports no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import sysconfig
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from models.errors import RunFailed, UserError
from parallel.distributed import rank_variables
from parallel.log_lines import Stamped, native_lines_to, without_stamp, write_beside

STOPPED = 75
"""Exit code of a run that was stopped early and can be resumed (sysexits.h EX_TEMPFAIL)."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals after which ranks save and stop at the next step boundary."""
HUNG = 85
"""Exit code of a rank that made no step any more and was ended by its own watchdog (``trainer/watchdog.py``)."""
INTERRUPTED = 130
"""Exit code of a rank that a second Ctrl-C made leave in the middle of a step."""
FORCE_SECONDS = 3.0
POLL_SECONDS = 0.05
PEERS_SECONDS = 3.0
"""After a rank failed, what the others get to notice and write their own account before they are killed."""
TAIL_LINES = 12
_PR_SET_PDEATHSIG = 1


# --- the launcher's half


def launch_local(
    command: Sequence[str],
    logs: Sequence[Path],
    threads: int,
    drain_seconds: float = 900.0,
    notify: Callable[[str], None] = print,
    huge_pages: bool = False,
) -> int:
    """Run ``command`` as ``len(logs)`` connected ranks on this machine, each with its log, and wait for all of them.

    Returns 0 when every rank returned 0, ``STOPPED`` when one of them stopped for a signal. SIGTERM, SIGINT and SIGUSR1 are
    handed to every rank once each (SIGHUP, a closed terminal, as SIGTERM) and then waited for without limit: saving takes what
    it takes. When a rank fails, the others are ended within seconds; when one has ended well, the others have ``drain_seconds``
    to follow.

    Must run in the main thread. Raises UserError with the rank's own message when it refused its input (exit code 2),
    KeyboardInterrupt when ranks left in the middle of a step, RunFailed naming rank, exit code or signal, log file and the
    log's last lines otherwise.
    """
    import torch.distributed as dist

    nproc = len(logs)
    log_starts = [_size(log) for log in logs]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage] (documented)
    ranks = _Ranks(command, nproc, {rank: rank_variables(rank, nproc, store.port, threads, huge_pages) for rank in range(nproc)})
    hangup_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # nohup
    with _held_signals() as received:
        try:
            ranks.start()
            _note_signals(received, hangup_ignored)
            codes, failed = _wait(ranks, received, drain_seconds, notify)
        finally:
            ranks.end()
    if failed is None:
        return STOPPED if STOPPED in codes.values() else 0
    raise _account(failed, codes.get(failed), nproc, logs[failed], log_starts[failed])


def _wait(
    ranks: _Ranks, received: list[signal.Signals], drain_seconds: float, notify: Callable[[str], None]
) -> tuple[dict[int, int], int | None]:
    """Exit codes of the ranks that ended by themselves and the rank to blame, or None when all ended well."""
    codes: dict[int, int] = {}
    handed_on = 0
    deadline: float | None = None
    while len(codes) < ranks.nproc:
        for signum in received[handed_on:]:
            handed_on += 1
            notify(f"{signum.name}: the {ranks.nproc} ranks save and stop after the step they are in")
            ranks.send(signum)
        ended = ranks.ended(codes)
        codes.update(ended)
        bad = [rank for rank, code in ended.items() if code not in (0, STOPPED)]
        if any(codes[rank] == INTERRUPTED for rank in bad):
            raise KeyboardInterrupt
        if bad:
            # The first to go is to blame; of several seen at once, one that was killed: the others then lost their peer.
            blamed = min(bad, key=lambda rank: (codes[rank] >= 0, codes[rank] != UserError.exit_code, rank))
            _give_time(ranks, codes, PEERS_SECONDS)
            return codes, blamed
        if ended and deadline is None:
            deadline = time.monotonic() + drain_seconds
        if deadline is not None and time.monotonic() > deadline:
            return codes, min(set(range(ranks.nproc)) - codes.keys())
        time.sleep(POLL_SECONDS)
    return codes, None


def _give_time(ranks: _Ranks, codes: dict[int, int], seconds: float) -> None:
    end = time.monotonic() + seconds
    while len(codes) < ranks.nproc and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
        codes.update(ranks.ended(codes))


@dataclass
class _Ranks:
    """The processes, held by torch's elastic multiprocessing layer; each leads a session of its own."""

    command: Sequence[str]
    nproc: int
    variables: Mapping[int, dict[str, str]]
    context: Any = field(default=None)

    def start(self) -> None:
        from torch.distributed.elastic.multiprocessing import start_processes
        from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs

        class OwnLogs(LogsSpecs):
            """Ranks open their logs themselves: elastic would truncate those of the run's earlier part and hide the terminal."""

            def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
                nowhere = dict.fromkeys(envs, "")
                return LogsDest(stdouts=nowhere, stderrs=dict(nowhere), error_files=dict(nowhere))

            @property
            def root_log_dir(self) -> str:
                return ""

        entrypoint, *arguments = self.command
        self.context = start_processes(
            name="longstride",
            entrypoint=entrypoint,
            args=dict.fromkeys(range(self.nproc), tuple(arguments)),
            envs=dict(self.variables),
            logs_specs=OwnLogs(),
        )

    def _processes(self) -> dict[int, Any]:
        return {rank: handler.proc for rank, handler in self.context.subprocess_handlers.items()}

    def ended(self, known: Mapping[int, int]) -> dict[int, int]:
        """Exit codes of ranks that have ended and are not in ``known``; minus the signal's number for one that was killed."""
        codes = {rank: process.poll() for rank, process in self._processes().items() if rank not in known}
        return {rank: code for rank, code in codes.items() if code is not None}

    def send(self, signum: signal.Signals) -> None:
        for process in self._processes().values():
            if process.poll() is None:
                process.send_signal(signum)

    def end(self) -> None:
        """Kill what is left: ranks, and whatever they started in their session."""
        if self.context is None:
            return
        for process in self._processes().values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
        self.context.close(death_sig=signal.SIGKILL, timeout=10)


@contextlib.contextmanager
def _held_signals() -> Iterator[list[signal.Signals]]:
    """Block the forwarded signals while ranks are being started and restore every handler at the end. Ranks inherit the block,
    so that a signal that arrives before a rank is ready waits instead of killing it; the rank's own handlers let it in."""
    former = {signum: signal.getsignal(signum) or signal.SIG_DFL for signum in (*FORWARDED, signal.SIGHUP, signal.SIGQUIT)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*FORWARDED, signal.SIGHUP})
    try:
        yield []
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _note_signals(received: list[signal.Signals], hangup_ignored: bool) -> None:
    """From now on note each forwarded signal once in ``received``, and a person's second Ctrl-C, which a rank takes as leave now.

    Replaces the handlers that elastic put in place.
    """

    last_interrupt = 0.0

    def note(signum: int, frame: object) -> None:
        nonlocal last_interrupt
        wanted = signal.SIGTERM if signum == signal.SIGHUP else signal.Signals(signum)
        again = wanted == signal.SIGINT and time.monotonic() - last_interrupt >= FORCE_SECONDS
        if wanted not in received or again:
            received.append(wanted)
            last_interrupt = time.monotonic() if wanted == signal.SIGINT else last_interrupt

    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    for signum in (*FORWARDED, signal.SIGHUP):
        if signum != signal.SIGHUP or not hangup_ignored:
            signal.signal(signum, note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*FORWARDED, signal.SIGHUP})


def _account(rank: int, code: int | None, nproc: int, log: Path, log_start: int) -> UserError:
    """The error that tells why a run ended: the rank's own message if it left one, else the end of its log."""
    lines = [without_stamp(line) for line in _read_from(log, log_start).splitlines()]
    said = next((i for i in reversed(range(len(lines))) if lines[i].startswith("error: ")), None)
    if code == UserError.exit_code and said is not None:
        return UserError("\n".join(lines[said:])[len("error: ") :])
    if code is None:
        what = "did not end although others had"
    elif code < 0:
        what = f"was killed by {_signal_name(-code)}"
    elif code == HUNG:
        what = "hung and was ended by its watchdog"
    else:
        what = f"ended with exit code {code}"
    tail = lines[said:] if said is not None else lines[-TAIL_LINES:]
    shown = "".join(f"\n  {line}" for line in tail)
    failed = RunFailed(f"rank {rank} of {nproc} {what}; the other ranks were ended; its log: {log}{shown}")
    failed.exit_code = HUNG if code == HUNG else failed.exit_code
    return failed


def _signal_name(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} (signal {number})"
    except ValueError:
        return f"signal {number}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_from(path: Path, start: int) -> str:
    """What was appended to a log since ``start``, at most its last 64 KiB."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(start, _size(path) - 65536))
        return file.read().decode(errors="replace")


# --- the rank's half


def join_launcher(launcher_pid: int, rank: int, log_path: Path, *, stamped: bool = False, console_stamped: bool = False) -> TextIO:
    """Bind this process to its launcher: it dies when the launcher dies, and what it prints is appended to its log, which is
    returned.

    Rank 0 keeps the terminal: its standard output goes there, and to the log as well; of a terminal, where a bar moves, what is given to
    ``log_lines.beside``. Its Python standard error goes to both. Whatever libraries write to the error stream directly goes to the log
    only. ``stamped``: lines that Python writes begin with clock and step in the log, with ``console_stamped`` (where that is a log
    too) also on the terminal.
    """
    die_with_parent(launcher_pid)
    file = log_path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
    log: Any = Stamped(file) if stamped else file
    if rank == 0:
        console: Any = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace", buffering=1)
        sys.stderr = _Tee(Stamped(console) if console_stamped else console, log)
        if sys.stdout.isatty():
            write_beside(log)
        else:
            sys.stdout = _Tee(Stamped(sys.stdout) if console_stamped else sys.stdout, log)
    else:
        sys.stdout.flush()
        os.dup2(file.fileno(), 1)
        if stamped:
            sys.stdout = sys.stderr = log
    os.dup2(file.fileno(), 2)
    _keep_warnings_of_libraries_in(log)
    return log


@contextlib.contextmanager
def own_log(path: Path) -> Iterator[None]:
    """The log of a rank that nobody here has launched: what it prints, and the error that it ends with, go to ``path`` too."""
    try:
        file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
    except OSError as error:  # a disk that is full does not end a run for this
        print(f"cannot write {path} ({error.strerror}); training goes on without a log", file=sys.stderr)
        yield
        return
    log: Any = Stamped(file)
    before = sys.stdout, sys.stderr
    sys.stderr = _Tee(sys.stderr, log)
    if sys.stdout.isatty():
        write_beside(log)
    else:
        sys.stdout = _Tee(sys.stdout, log)
    native_lines_to(file.fileno())
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):
            log.write(f"error: {error}\n" if isinstance(error, UserError) else traceback.format_exc())
        raise
    finally:
        sys.stdout, sys.stderr = before
        write_beside(None)
        native_lines_to(2)
        with contextlib.suppress(OSError):
            file.close()


def _keep_warnings_of_libraries_in(log: TextIO) -> None:
    """What a library warns its programmer of is for the log; warnings of this project are for the person at the terminal too."""
    show = warnings.showwarning
    installed = sysconfig.get_path("purelib")

    def route(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
    ) -> None:
        show(message, category, filename, lineno, log if file is None and filename.startswith(installed) else file, line)

    warnings.showwarning = route


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux; elsewhere only a parent that is already gone is noticed)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the kernel was asked
        os._exit(1)


class _Tee:
    """A text stream that writes to the console and to a log; for everything else it is the console."""

    def __init__(self, console: Any, log: Any) -> None:
        self._console, self._log = console, log

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):  # nor a full disk
            self._log.write(text)
        with contextlib.suppress(OSError):  # a closed terminal or pipe must not end a run
            self._console.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._log.flush()
        with contextlib.suppress(OSError):
            self._console.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._console, name)
