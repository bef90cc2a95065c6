"""Stop requests: a signal sets a flag, the ranks agree at the step boundary, and the trainer saves and ends.

The handlers do nothing else (a save inside a handler can meet a half-done step), and may be called any number of times:
Slurm sends its warning twice when its controller restarts. Torch is imported only where ranks agree, so that a job can
install the handlers first of all.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True)
class StopRequest:
    """What all ranks agreed on at one step boundary."""

    signal_number: int
    """Signal to stop for; 0 if none. Of different signals on different ranks the largest number: TERM, USR1, INT."""
    failed: bool
    """Some rank reports a failure, such as a background save that could not write."""

    def __bool__(self) -> bool:
        return bool(self.signal_number or self.failed)

    @property
    def reason(self) -> str:
        """For state.json and the console."""
        if self.signal_number:
            return f"stopped by {signal.Signals(self.signal_number).name}"
        return "a rank reported a failure" if self.failed else ""


class StopSignal:
    """Catches SIGTERM, SIGINT and SIGUSR1 while used as a context manager (in the main thread).

    The first signal wins; later ones change nothing. Only a second Ctrl-C, at least ``force_after_seconds`` later (one
    Ctrl-C reaches a worker twice: from the terminal and from the launcher), raises KeyboardInterrupt, so that a person can
    leave a step that takes too long. A save that this interrupts is left unpublished.
    """

    def __init__(self, *, poll: Callable[[], int] | None = None, force_after_seconds: float = 3.0) -> None:
        """``poll``: called on every rank in ``agreed``, gives a signal number or 0; for a flag file that a batch script
        touches when the warning comes before Python can catch it (give it to rank 0 only)."""
        self.signal_number = 0
        self.agreed_number = 0
        """Signal that all ranks last agreed on in ``agreed``; 0 if none."""
        self._poll = poll
        self._force_after_seconds = force_after_seconds
        self._first_time = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the local launcher holds signals back until a rank can take them
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.signal_number:
            self.signal_number = number
            self._first_time = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._first_time >= self._force_after_seconds:
            raise KeyboardInterrupt

    def agreed(self, group: dist.ProcessGroup | None = None, *, failed: bool = False) -> StopRequest:
        """The largest request of all ranks; a collective call at the step boundary (none without a process group).

        ``group``: None means the default group. ``failed``: this rank has a failure to report (``manager.failure``), so
        that all ranks leave the loop at the same step instead of one raising alone.
        """
        if not self.signal_number and self._poll is not None:
            self.signal_number = self._poll()
        import torch
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            self.agreed_number = self.signal_number
            return StopRequest(self.signal_number, failed)
        on_cpu = "gloo" in str(dist.get_backend_config(group)) or "mpi" in str(dist.get_backend_config(group))
        device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
        request = torch.tensor([self.signal_number, int(failed)], dtype=torch.int32, device=device)
        dist.all_reduce(request, op=dist.ReduceOp.MAX, group=group)
        number, any_failed = request.tolist()
        self.agreed_number = number
        return StopRequest(number, bool(any_failed))
