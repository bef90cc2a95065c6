"""A run whose memory really ends: plan beside state, exit code 1; with memory.replan_on_oom a leaner plan and the rest of the run."""

import json
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from trainer import config_file, out_of_memory, planning
from trainer.run_dir import RunDir

HOME = Path(__file__).resolve().parents[2]
SETTINGS = [
    "model.d_model=64",
    "model.n_heads=4",
    "model.layers=[swa]",
    "model.window=64",
    "model.d_ff=2048",
    "model.n_layers=3",
    "data.seq_len=8192",
    "train.steps=2",
    "train.eval_sequences=0",
    "train.threads_per_rank=1",
    "memory.recompute=auto",
]
SHORT_MIB = 120
"""Address space that a rank is given less than its plan takes: more than it varies by, less than three plans made anew give back."""


# Each thread that allocates may get a heap of its own, which reserves 64 MiB of address space: by chance, and here that is what is short.
ONE_HEAP = {**os.environ, "MALLOC_ARENA_MAX": "1"}


def train(root, budget_gib, *overrides, mebibytes):
    command = [sys.executable, str(HOME / "longstride.py"), "train", "debug_cpu", *SETTINGS, f"memory.budget_gib={budget_gib}"]
    command += [f"run.root={root}", "run.name=r", *overrides]
    size = mebibytes * 2**20
    limit = partial(resource.setrlimit, resource.RLIMIT_AS, (size, size))
    return subprocess.run(command, capture_output=True, text=True, cwd=root, preexec_fn=limit, timeout=280, env=ONE_HEAP)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """(budget in GiB that the plan just fits in, address space in MiB in which a rank starts and its first step does not fit)."""
    path = config_file.find("debug_cpu", HOME / "configs")
    budget = round(planning.plan_run(config_file.resolve(path, SETTINGS)).peak_bytes / 2**30 * 1.01, 3)
    code = (
        "import sys, longstride\n"
        "code = longstride.main(sys.argv[1:])\n"
        "print('VmPeak', next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmPeak')))\n"
        "sys.exit(code)"
    )
    root = tmp_path_factory.mktemp("free")
    command = [sys.executable, "-c", code, "train", "debug_cpu", *SETTINGS, f"memory.budget_gib={budget}", f"run.root={root}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HOME, timeout=280, env=ONE_HEAP)
    assert done.returncode == 0, done.stderr
    return budget, int(done.stdout.split("VmPeak")[1].split()[0]) // 1024 - SHORT_MIB


def test_running_out_of_memory_is_told_and_noted(tmp_path, short):
    budget, space = short
    done = train(tmp_path, budget, mebibytes=space)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "out of memory" in done.stderr and "longstride resume" in done.stderr and "Traceback" not in done.stderr
    assert "planned peak" in done.stdout and "parameters" in done.stdout
    run = RunDir(tmp_path / "r")
    (note,) = out_of_memory.records(run)
    assert note["step"] in (1, 2) and note["planned_bytes"] > 0
    assert out_of_memory.correction(run) >= out_of_memory.MARGIN


def test_a_run_that_may_plans_again_and_finishes(tmp_path, short):
    budget, space = short
    done = train(tmp_path, budget, "memory.replan_on_oom=true", mebibytes=space)
    run = RunDir(tmp_path / "r")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "planning again" in done.stderr and out_of_memory.records(run)
    plan = json.loads(run.memory_plan.read_text())
    assert any(term["name"] == "measured above the plan" for term in plan["terms"])
    assert json.loads((run.path / "state.json").read_text())["status"] == "done"


def test_correction_grows_with_every_time(tmp_path):
    run = RunDir(tmp_path / "r")
    run.create()
    assert out_of_memory.correction(run) == 1.0
    out_of_memory.record(run, 0, 3, 100, 110)
    first = out_of_memory.correction(run)
    out_of_memory.record(run, 1, 3, 100, 90)
    assert out_of_memory.correction(run) == first == pytest.approx(1.1 * 1.05)
    out_of_memory.record(run, 0, 4, 100, 90)
    assert out_of_memory.correction(run) == pytest.approx(1.1 * 1.05**2)
    (run.path / "oom" / "rank_9_000.json").write_text("torn")
    assert len(out_of_memory.records(run)) == 3


def test_a_resumed_run_keeps_its_plan_until_a_setting_changes(tmp_path):
    command = [sys.executable, str(HOME / "longstride.py")]
    settings = ["data.seq_len=256", "train.eval_sequences=0", "train.steps=1", "memory.recompute=mixer", "memory.plan=estimate"]

    def run(*arguments):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=200)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "runs" / "r" / "memory_plan.json").read_text())

    first = run("train", "debug_cpu", *settings, "run.name=r")
    marked = {**first, "binding": "left as it was"}
    (tmp_path / "runs" / "r" / "memory_plan.json").write_text(json.dumps(marked))
    assert run("resume", "r", "train.steps=2")["binding"] == "left as it was"
    assert run("resume", "r", "train.steps=3", "memory.ffn_tile_tokens=64")["binding"] != "left as it was"
    assert not list((tmp_path / "runs" / "r").glob("*timeline*"))  # a plan from formulas has none
