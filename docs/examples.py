"""Run the commands of a document and put their output below them: ``python docs/examples.py docs/memory_budget.md``.

An example is an indented block whose first line is ``$ longstride ...``; everything after that line is replaced.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = re.compile(r"^    \$ longstride (?P<command>.*)\n(?:    .*\n|\n(?=    [^$]))*", re.MULTILINE)


def refreshed(match: re.Match[str]) -> str:
    """The block with what its command prints now. Raises SystemExit when the command fails."""
    command = match["command"]
    done = subprocess.run([sys.executable, "longstride.py", *shlex.split(command)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"longstride {command}\n{done.stderr}")
    lines = [f"    {line}".rstrip() for line in [f"$ longstride {command}", *done.stdout.strip("\n").splitlines()]]
    return "\n".join(lines) + "\n"


def refresh(document: Path) -> None:
    """Refresh every example of ``document``, one after the other; what is done stays when a later one fails."""
    text, start = document.read_text(), 0
    while (match := EXAMPLE.search(text, start)) is not None:
        print(match["command"], file=sys.stderr)
        block = refreshed(match)
        text, start = text[: match.start()] + block + text[match.end() :], match.start() + len(block)
        document.write_text(text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        refresh(Path(name))
