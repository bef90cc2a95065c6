"""Files that several processes want at the same time, made by one of them while the others wait. Imports no torch.

A lock file lies beside every file that is being made. The kernel lets go of it when its holder ends in whatever way, so the next one
takes over from a maker that died; one that failed leaves its reason in the lock file for those who wait. Where files cannot be locked,
or a maker takes all too long, everyone makes the files for itself: they must appear by a rename.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from models.errors import UserError

POLL_SECONDS = 0.05
WAIT_SECONDS = 900.0
"""Longer than any trace takes; after it a maker counts as stuck, on another machine whose locks outlived it for instance."""
_REASON_BYTES = 4096
_HELD = (errno.EWOULDBLOCK, errno.EACCES)


def for_one_process(files: Iterable[Path], make: Callable[[Sequence[Path]], None]) -> None:
    """Have ``files`` exist when this returns: ``make(missing)`` is called for those that no other process makes at this moment.

    Raises what ``make`` raises; a UserError also in those who waited for the file that could not be made.
    """
    with contextlib.ExitStack() as locks:
        # All take their locks in the same order, so that no two wait for each other.
        held = {file: locks.enter_context(_lock(file)) for file in sorted(files)}
        missing = [file for file in held if not file.exists()]
        if not missing:
            return
        try:
            make(missing)
        except UserError as error:
            failed = next((file for file in missing if not file.exists()), missing[0])  # they are made in this order
            _leave_reason(held[failed], error)
            raise


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[int | None]:
    """Hold the lock beside ``file``: its descriptor, or None where there is nothing to wait for (the file exists, no locks here).

    Raises UserError when this process waited and the one before it could not make the file.
    """
    path = file.with_name(f"{file.name}.lock")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:  # a read-only place: making the file will say so
        yield None
        return
    try:
        waited = _acquire(descriptor, file)
        if waited is None:
            if file.exists():
                path.unlink(missing_ok=True)
            yield None
            return
        if waited and (reason := os.pread(descriptor, _REASON_BYTES, 0)):
            raise UserError(reason.decode(errors="replace"))
        os.truncate(descriptor, 0)
        try:
            yield descriptor
        finally:
            path.unlink(missing_ok=True)  # who waits has it open
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, file: Path) -> bool | None:
    """Whether the lock was waited for; None: it is not held, because ``file`` exists or cannot be waited for."""
    deadline = time.monotonic() + WAIT_SECONDS
    waited = False
    while not file.exists() and time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return waited
        except OSError as error:
            if error.errno not in _HELD:
                return None
        waited = True
        time.sleep(POLL_SECONDS)
    return None


def _leave_reason(descriptor: int | None, error: UserError) -> None:
    if descriptor is not None:
        with contextlib.suppress(OSError):
            os.pwrite(descriptor, str(error).encode()[:_REASON_BYTES], 0)
