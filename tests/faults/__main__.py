"""The fault battery: ``python -m tests.faults [ROW ...] [--table FILE]`` injects each fault and prints what was promised and what was
observed; FILE gets the same as a table in Markdown, with machine and versions. Rows that are given alone take their places in it.

Slurm's rows need root and Slurm's packages (``tests/slurm/cluster.py``), the file systems' btrfs-progs and bindfs, the network's iproute2,
the second engine's deepspeed. Everything takes about three quarters of an hour on two idle cores. Exit code 1 when a promise does not hold.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import psutil
import pytest

from tests.faults.rows import MATRIX, ROWS, Row
from tests.slurm.cluster import SEARCH

ROOT = Path(__file__).resolve().parents[2]


class _Results:
    """Outcome and seconds of each test, by its name without parameters."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[str, float, str]]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            outcome = f"{report.outcome} in {report.when}" if report.when != "call" else report.outcome
            reason = report.longrepr[2] if report.outcome == "skipped" and isinstance(report.longrepr, tuple) else ""
            self.found.setdefault(report.nodeid.split("[")[0], []).append((outcome, report.duration, reason))


def run(rows: Sequence[Row], stream: TextIO, table: Path | None = None) -> int:
    """Inject the faults of ``rows``, print what was seen and write it to ``table``; 1 if a promise did not hold."""
    results = _Results()
    tests = list(dict.fromkeys(test for row in rows for test in row.tests))
    pytest.main(
        ["-q", "-n0", "-p", "no:cacheprovider", "--show-capture=no", f"--rootdir={ROOT}", *(str(ROOT / t) for t in tests)],
        plugins=[results],
    )
    broken, lines = 0, []
    for row in rows:
        held, text = _observed(row, results)
        broken += not held
        lines.append(_line(row, held, text))
        print(f"\n{row.number:>2}  {row.fault}   [{row.injected}]\n    promised: {row.promised}\n    observed: {text}", file=stream)
        if row.not_injected:
            print(f"    not injected: {row.not_injected}", file=stream)
    print(f"\n{len(rows)} faults, {len(rows) - broken} promises held", file=stream, flush=True)
    if table is not None:
        write_table(table, lines)
    return int(broken > 0)


def write_table(table: Path, lines: Sequence[str]) -> None:
    """Put ``lines`` (``_line``) into ``table``; rows that are there and not among them stay."""
    rows = {}
    for line in [*(table.read_text().splitlines() if table.exists() else []), *lines]:
        if found := re.match(r"\| (\d+) \|", line):
            rows[int(found[1])] = line
    real = sum(row.real for row in ROWS[:MATRIX] if row.number in rows)
    held = sum(BROKEN not in line for line in rows.values())
    summary = f"{len(rows)} faults, {held} promises held; {real} of the first {MATRIX} injected with the real thing. Last on {_machine()}."
    table.write_text(f"{HEAD}\n{summary}\n\n" + "\n".join([*COLUMNS, *(rows[number] for number in sorted(rows)), ""]))


BROKEN = "**DOES NOT HOLD**"
HEAD = """# Fault battery

Written by `python -m tests.faults --table docs/faults.md` (root, Slurm's packages): every fault is injected, by the means named, and the
promise is what the tests under *observed* assert. `python -m tests.faults 8 26` injects some of them. Rows after the
36th go beyond the matrix that it began with.
"""
COLUMNS = ("| # | fault | injected by | promised | observed |", "|---|---|---|---|---|")


def _line(row: Row, held: bool, text: str) -> str:
    observed = ["" if held else BROKEN, *text.split("\n"), f"not injected: {row.not_injected}" if row.not_injected else ""]
    cells = [str(row.number), row.fault, row.injected, row.promised, "<br>".join(part.strip() for part in observed if part)]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _machine() -> str:
    """Where and with what the battery ran."""
    slurmd = shutil.which("slurmd", path=SEARCH)
    slurm = subprocess.run([slurmd, "-V"], capture_output=True, text=True, check=True).stdout.strip() if slurmd else "no Slurm"
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{os.cpu_count()} CPU cores and {memory:.0f} GiB of memory (load average {os.getloadavg()[2]:.0f}), {platform.system()} "
        f"{platform.release()}, Python {platform.python_version()}, torch {version('torch')}, {slurm}, {time.strftime('%Y-%m-%d')}"
    )


def _observed(row: Row, results: _Results) -> tuple[bool, str]:
    """Whether every test of a row ran and passed, and that in words."""
    lines, held = [], True
    for test in row.tests:
        found = results.found.get(test, [])
        passed = [seconds for outcome, seconds, _ in found if outcome == "passed"]
        others = [f"{outcome}{': ' + reason if reason else ''}" for outcome, _, reason in found if outcome != "passed"]
        held = held and bool(passed) and not others
        words = (
            f"held in {len(passed)} case{'s' * (len(passed) != 1)} ({sum(passed):.1f} s)"
            if passed and not others
            else "; ".join(others) or "did not run"
        )
        lines.append(f"{words}: {test.split('::')[1].removeprefix('test_').replace('_', ' ')}")
    return held, "\n              ".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="inject faults; print promised and observed")
    parser.add_argument("rows", metavar="ROW", type=int, nargs="*", help="default: all")
    parser.add_argument("--table", metavar="FILE", type=Path, help="write a table in Markdown, too")
    args = parser.parse_args()
    if unknown := set(args.rows) - {row.number for row in ROWS}:
        parser.error(f"no such row: {', '.join(map(str, sorted(unknown)))}; there are 1 to {len(ROWS)}")
    sys.exit(run([row for row in ROWS if not args.rows or row.number in args.rows], sys.stdout, args.table))
