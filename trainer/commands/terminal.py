"""What every verb prints with: text or a rendering of it, a progress bar, a line on standard error. Imports no torch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any


def show(text: str, rendered: Callable[[], Any] | None) -> None:
    """Print ``text``, or on a terminal what ``rendered`` makes, if anything."""
    if rendered is None or not sys.stdout.isatty():
        print(text, end="")
        return
    from rich.console import Console

    Console().print(rendered())


@contextlib.contextmanager
def progress(text: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal as a function of (done, total); None elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def tell(line: str) -> None:
    """One line on standard error."""
    with contextlib.suppress(OSError):  # a closed terminal or pipe must not end a run
        print(line, file=sys.stderr, flush=True)
