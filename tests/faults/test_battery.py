"""The battery names real tests, covers every row, and says so when one does not hold."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from tests.faults.__main__ import _line, _observed, _Results, write_table
from tests.faults.rows import MATRIX, ROWS, SAMPLE

ROOT = Path(__file__).resolve().parents[2]


@cache
def functions(path: str) -> set[str]:
    return {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_row_has_tests_that_exist() -> None:
    assert [row.number for row in ROWS] == list(range(1, len(ROWS) + 1)) and len(ROWS) >= MATRIX
    real = [row for row in ROWS[:MATRIX] if row.real]
    assert len(real) >= 30 and all(row.real or row.not_injected for row in ROWS)
    for row in ROWS:
        assert row.tests and row.promised and row.injected
        for test in row.tests:
            path, _, name = test.partition("::")
            assert name in functions(path), test


def test_a_sample_of_the_battery_holds() -> None:
    command = [sys.executable, "-m", "tests.faults", *map(str, SAMPLE)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(SAMPLE)} faults, {len(SAMPLE)} promises held" in done.stdout and "promised: repaired" in done.stdout


def test_rows_that_are_run_again_take_their_places_in_the_table(tmp_path: Path) -> None:
    table = tmp_path / "faults.md"
    write_table(table, [_line(row, row.number != 3, "held") for row in ROWS])
    assert f"{len(ROWS)} faults, {len(ROWS) - 1} promises held" in table.read_text()
    write_table(table, [_line(ROWS[2], True, "held at last")])
    lines = [line for line in table.read_text().splitlines() if line.startswith("| ") and line.split()[1].isdigit()]
    assert [int(line.split()[1]) for line in lines] == [row.number for row in ROWS] and "held at last" in lines[2]
    assert f"{len(ROWS)} faults, {len(ROWS)} promises held" in table.read_text()


def test_what_fails_or_does_not_run_is_no_promise_held() -> None:
    row, results = ROWS[9], _Results()
    assert _observed(row, results)[0] is False
    for outcome, held in (("passed", True), ("failed", False), ("skipped: no Slurm here", False)):
        results.found = {row.tests[0]: [(outcome, 1.0, "")]}
        assert _observed(row, results)[0] is held
