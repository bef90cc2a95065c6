"""Files of a plan: written whole or not at all, and refused in words where they cannot be."""

from pathlib import Path

import pytest

from memory_mgmt.plan import MemoryPlan, Moment, Term
from memory_mgmt.trace import Trace, TracedBuffer
from models.errors import UserError
from trainer.plan_files import write_plan_files, write_timeline

TRACE = Trace(
    "cpu",
    [
        TracedBuffer(0, 0, 9, 2**20, 2**20, "parameter", "aten::empty", "head", None, "build", None),
        TracedBuffer(1, 2, 5, 2**22, 2**22, "transient", "aten::mm", "blocks.0", 0, "forward", "forward"),
    ],
    [],
    [(1, "forward blocks.0")],
    9,
)
PLAN = MemoryPlan("trace", "cpu", 1, (Term("step", "transient", 5 * 2**20, 5 * 2**20),), (Moment("forward", 5 * 2**20),), None, None)
NAMES = {"memory_plan.json", "memory_timeline.png", "memory_timeline.html"}


def test_three_files_and_nothing_else(tmp_path: Path) -> None:
    directory = tmp_path / "made" / "for it"
    written = write_plan_files(TRACE, PLAN, directory, {1: 0})
    assert {path.name for path in written} == NAMES == {path.name for path in directory.iterdir()}
    plan, picture, page = written
    assert MemoryPlan.from_json(plan.read_text()) == PLAN
    assert picture.read_bytes().startswith(b"\x89PNG") and 'id="tab-addresses"' in page.read_text()
    assert write_timeline(TRACE, PLAN, directory) == (picture, page)  # replaces what was there
    assert 'id="tab-addresses"' not in page.read_text()
    assert {path.name for path in directory.iterdir()} == NAMES


def test_what_cannot_be_written_is_an_error_that_names_the_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"--timeline: cannot write in .*file"):
        write_plan_files(TRACE, PLAN, tmp_path / "file" / "below")
    blocked = tmp_path / "blocked"
    (blocked / "memory_timeline.png").mkdir(parents=True)
    with pytest.raises(UserError, match="blocked"):
        write_plan_files(TRACE, PLAN, blocked)
    assert {path.name for path in blocked.iterdir()} == {"memory_plan.json", "memory_timeline.png"}  # no temporary file left
