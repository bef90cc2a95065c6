"""Files of a plan: written whole or not at all, and refused in words where they cannot be."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from memory_mgmt.plan import MemoryPlan, Moment, Term
from memory_mgmt.trace import Trace, TracedBuffer
from memory_mgmt.traced_plan import step_addresses
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
ROOT = Path(__file__).resolve().parents[2]
NAMES = {"memory_plan.json", "memory_timeline.png", "memory_timeline.html"}


def test_three_files_and_nothing_else(tmp_path: Path) -> None:
    directory = tmp_path / "made" / "for it"
    written = write_plan_files(TRACE, PLAN, directory)
    assert {path.name for path in written} == NAMES == {path.name for path in directory.iterdir()}
    plan, picture, page = written
    read = MemoryPlan.from_json(plan.read_text())
    assert read.addresses is not None and replace(read, addresses=None) == PLAN
    assert picture.read_bytes().startswith(b"\x89PNG") and 'id="tab-addresses"' in page.read_text()
    assert write_timeline(TRACE, PLAN, directory) == (picture, page)  # replaces what was there
    assert 'id="tab-addresses"' not in page.read_text()
    assert {path.name for path in directory.iterdir()} == NAMES


def test_addresses_are_planned_for_what_comes_and_goes() -> None:
    size = 3 * 2**20
    more = [TracedBuffer(i, i, i + 3, size, size, "transient", "aten::mm", "head", None, "loss", "loss") for i in range(3, 5)]
    offsets, addresses = step_addresses(replace(TRACE, buffers=[*TRACE.buffers, *more]), 2.0)
    assert set(offsets) == {1, 3, 4} and addresses.status == "optimal"
    assert addresses.height_bytes == addresses.lower_bound_bytes == 2**22 + 2 * size
    assert (
        sorted((offsets[i], offsets[i] + TRACE.buffers[1].size if i == 1 else offsets[i] + size) for i in offsets)[-1][1]
        == 2**22 + 2 * size
    )


def test_what_cannot_be_written_is_an_error_that_names_the_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"--timeline: cannot write in .*file"):
        write_plan_files(TRACE, PLAN, tmp_path / "file" / "below")
    blocked = tmp_path / "blocked"
    (blocked / "memory_timeline.png").mkdir(parents=True)
    with pytest.raises(UserError, match="blocked"):
        write_plan_files(TRACE, PLAN, blocked)
    assert {path.name for path in blocked.iterdir()} == {"memory_plan.json", "memory_timeline.png"}  # no temporary file left


def test_the_command_traces_and_writes_without_torch_in_its_own_process(tmp_path: Path) -> None:
    tiny = ["model.layers=[swa]", "model.d_model=16", "model.n_heads=2", "model.n_kv_heads=null", "data.seq_len=64", "model.window=16"]
    command = [sys.executable, "-X", "importtime", str(ROOT / "longstride.py"), "plan", "debug_cpu", *tiny, "--timeline", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    modules = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "matplotlib" in modules and "torch" not in modules
    assert {path.name for path in (tmp_path / "out").iterdir()} == NAMES and "written: out/memory_timeline.html" in done.stderr
    assert json.loads((tmp_path / "out" / "memory_plan.json").read_text())["device"] == "cpu"
    refused = subprocess.run([*command[:1], *command[3:], "memory.plan=estimate"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and "memory.plan" in refused.stderr
