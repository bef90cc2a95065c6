"""The memory timeline of a run: drawn by a process of its own while the ranks start, so that no rank waits for a picture.

``python -m trainer.run_timeline RUN`` draws it into the run's directory, from the plan that lies there and the kept trace that the plan
was made of. Nothing is traced for it. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from memory_mgmt.plan import MemoryPlan
from memory_mgmt.traced_plan import METHOD, step_addresses
from models.errors import UserError
from trainer import config_file
from trainer.plan_files import PAGE, PICTURE, kept_trace, write_timeline
from trainer.planning import ADDRESS_SECONDS
from trainer.run_dir import RunDir

HOME = Path(__file__).resolve().parent.parent
WAIT_SECONDS = 30.0
"""For a picture that is not finished when the run is."""
_NICE = 19


@contextlib.contextmanager
def drawn(run_dir: RunDir, tell: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, have the timeline drawn that belongs to the run's plan; one that is there already stays.

    ``tell`` gets the line that names it and, where it could not be drawn, a warning: no run fails for a picture.
    """
    drawing = None
    try:
        if _is_traced(run_dir):
            if not _is_current(run_dir):
                drawing = _start(run_dir)
            tell(f"memory timeline: {run_dir.path / PAGE}")
    except (OSError, ValueError) as error:
        tell(_warning(str(error)))
    yield
    if drawing is not None and (reason := drawing.failure()):
        tell(_warning(reason))


def draw(run_dir: RunDir) -> None:
    """Write picture and page of the run's plan. Raises UserError when the traced step is no longer kept, OSError or ValueError when
    files cannot be written or read."""
    plan = MemoryPlan.from_json(run_dir.memory_plan.read_text())
    trace = kept_trace(config_file.resolve(run_dir.config), plan)
    if trace is None:
        raise UserError("the traced step that the plan was made of is no longer kept")
    offsets, addresses = step_addresses(trace, ADDRESS_SECONDS)
    write_timeline(trace, replace(plan, addresses=addresses), run_dir.path, offsets)


def _is_traced(run_dir: RunDir) -> bool:
    return MemoryPlan.from_json(run_dir.memory_plan.read_text()).method == METHOD


def _is_current(run_dir: RunDir) -> bool:
    """Whether the page, which is written last, is as new as the plan."""
    page = run_dir.path / PAGE
    return page.exists() and page.stat().st_mtime_ns >= run_dir.memory_plan.stat().st_mtime_ns


class _Drawing:
    """The process that draws. A thread waits for it, so that it leaves no dead process beside a run of days."""

    def __init__(self, command: list[str]) -> None:
        # A session of its own: Ctrl-C is for the ranks.
        self._process = subprocess.Popen(
            command, cwd=HOME, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self._said = ""
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        _, self._said = self._process.communicate()

    def failure(self) -> str:
        """Why nothing was drawn; empty when it was. Waits for it."""
        self._thread.join(WAIT_SECONDS)
        if self._thread.is_alive():
            self._process.kill()
            self._thread.join()
            return f"not finished {WAIT_SECONDS:.0f} seconds after the run"
        if not self._process.returncode:
            return ""
        lines = [line for line in self._said.splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"exit code {self._process.returncode}"


def _start(run_dir: RunDir) -> _Drawing:
    for name in (PICTURE, PAGE):  # those of an earlier plan: better none than one of another step
        (run_dir.path / name).unlink(missing_ok=True)
    command = [sys.executable, "-m", "trainer.run_timeline", str(run_dir.path.resolve())]
    return _Drawing(command)


def _warning(reason: str) -> str:
    return f"warning: the memory timeline was not drawn ({reason}); longstride plan RUN/config.yaml --timeline DIR draws one"


def main(path: str) -> int:
    """Draw the timeline of the run at ``path``, after everything else that wants a processor. Returns the exit code."""
    os.nice(_NICE)
    try:
        draw(RunDir(path))
    except (UserError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
