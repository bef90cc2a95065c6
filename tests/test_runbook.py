"""Every message with which a run ends, and every exit code, is in docs/runbook.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from models.errors import RunFailed, UserError
from parallel.launcher import HUNG, INTERRUPTED, STOPPED
from slurm.health import UNFIT

ROOT = Path(__file__).resolve().parents[1]
BOOK = (ROOT / "docs" / "runbook.md").read_text()
PHRASES = [phrase for phrase in re.findall(r"`([^`\n]+)`", BOOK) if len(phrase) >= 9]
ENDS_A_RUN = ("RunFailed", "DiskFull")
ALSO = (
    "slurm/client.py",
    "slurm/submission.py",
    "slurm/attempts.py",
    "trainer/checkpoint.py",
    "trainer/checkpoint_reader.py",
    "trainer/run_dir.py",
)
"""Here what a person did not type can be refused too."""


def constant_text(node: ast.AST) -> str:
    """The fixed parts of all texts in an expression."""
    return "".join(part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "" for part in ast.walk(node))


def messages() -> list[tuple[str, str]]:
    """Where, and the fixed words of, every error that a run can end with."""
    found = []
    for room in ("slurm", "trainer", "parallel", "memory_mgmt", "optim", "models"):
        for path in sorted((ROOT / room).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            for node in ast.walk(ast.parse(path.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
                    continue
                if node.func.id in ENDS_A_RUN or (node.func.id == "UserError" and name in ALSO):
                    found.append((f"{name}:{node.lineno}", constant_text(node)))
    return found


WORDED = [(where, text) for where, text in messages() if sum(map(str.isalpha, text)) >= 10]
"""The others only pass on what the system, Slurm or another message said."""


def test_every_message_is_explained() -> None:
    assert len(WORDED) >= 25
    unknown = [f"{where}: {text!r}" for where, text in WORDED if not any(phrase in text for phrase in PHRASES)]
    assert not unknown, "not in docs/runbook.md"


@pytest.mark.parametrize("code", [0, RunFailed.exit_code, UserError.exit_code, STOPPED, UNFIT, HUNG, INTERRUPTED])
def test_every_exit_code_is_explained(code: int) -> None:
    assert re.search(rf"^\| {code} \|", BOOK, re.MULTILINE)


def test_every_decision_is_explained() -> None:
    source = (ROOT / "slurm" / "attempts.py").read_text()
    words = re.findall(r"(\w+): ", source.split('word: str\n    """')[1].split('"""')[0])
    assert len(words) == 6
    for word in words:
        assert re.search(rf"^\| {word} \|", BOOK, re.MULTILINE), word


def test_every_guard_is_explained() -> None:
    """Lines that begin with ``guard:`` say what they are about."""
    for word in ("standard deviations above", "straggler: rank", "memory of rank", "training goes on, saving is tried again"):
        assert word in BOOK
