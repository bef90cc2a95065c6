"""The fault battery: ``python -m tests.faults [ROW ...]`` injects each fault and prints what was promised and what was observed.

Slurm's rows need root and Slurm's packages (``tests/slurm/cluster.py``). Everything takes about half an hour on two idle cores. Exit code 1
when a promise does not hold.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import pytest

from tests.faults.rows import ROWS, Row

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


def run(rows: Sequence[Row], stream: TextIO) -> int:
    """Inject the faults of ``rows``, print the table; 1 if one did not hold."""
    results = _Results()
    tests = list(dict.fromkeys(test for row in rows for test in row.tests))
    pytest.main(
        ["-q", "-n0", "-p", "no:cacheprovider", "--show-capture=no", f"--rootdir={ROOT}", *(str(ROOT / t) for t in tests)],
        plugins=[results],
    )
    broken = 0
    for row in rows:
        held, text = _observed(row, results)
        broken += not held
        print(f"\n{row.number:>2}  {row.fault}   [{row.injected}]\n    promised: {row.promised}\n    observed: {text}", file=stream)
        if row.not_injected:
            print(f"    not injected: {row.not_injected}", file=stream)
    print(f"\n{len(rows)} faults, {len(rows) - broken} promises held", file=stream, flush=True)
    return int(broken > 0)


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
    wanted = {int(word) for word in sys.argv[1:]}
    sys.exit(run([row for row in ROWS if not wanted or row.number in wanted], sys.stdout))
