"""Killed and resumed runs against an uninterrupted one, bit for bit, through the command a user types."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("documents") / "text.jsonl"
    lines = [json.dumps({"text": f"document {n}: " + "the quick brown fox jumps over the lazy dog " * (1 + n % 7)}) for n in range(60)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def command(verb: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "longstride", verb, *map(str, arguments)]


def overrides(root: Path, documents: Path, name: str, cp: int = 2) -> list[str]:
    return [
        f"run.root={root}",
        f"run.name={name}",
        "data.source=jsonl",
        f"data.path={documents}",
        f"data.cache_dir={root.parent / 'tokens'}",
        "data.valid_fraction=0.1",
        "data.seq_len=256",
        "train.eval_sequences=2",
        "train.eval_every_steps=4",
        f"train.steps={STEPS}",
        f"parallel.cp={cp}",
        "checkpoint.save_every_steps=5",
        "model.layers=[full, swa, memory]",
    ]


def run(arguments: list[str]) -> None:
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{arguments} -> {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def losses(run_dir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in train] == sorted({line["step"] for line in train}), "a step was logged twice or out of order"
    return {line["step"]: line["loss"] for line in train}


def parameters(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    metadata = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    state = {key: torch.empty(item.size, dtype=item.properties.dtype) for key, item in metadata.items() if hasattr(item, "size")}
    dcp.load(state, checkpoint_id=str(folder), no_dist=True)
    return state


def assert_same_end(run_dir: Path, reference: Path) -> None:
    assert losses(run_dir) == losses(reference)
    ours, expected = parameters(run_dir, STEPS), parameters(reference, STEPS)
    assert ours.keys() == expected.keys() and any("exp_avg" in key for key in ours) and any("blocks" in key for key in ours)
    for key, value in expected.items():
        assert torch.equal(ours[key], value), key


@pytest.fixture(scope="module")
def uninterrupted(root: Path, documents: Path) -> Path:
    run(command("train", "configs/debug_cpu.yaml", *overrides(root, documents, "uninterrupted"), "checkpoint.keep_last=3"))
    assert len(losses(root / "uninterrupted")) == STEPS
    return root / "uninterrupted"


def kill_when(condition, arguments: list[str]) -> None:
    """Start ``arguments`` as its own session and kill -9 every process of it as soon as ``condition()`` holds."""
    process = subprocess.Popen(arguments, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    try:
        while not condition():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        kill_tree(process.pid)
        process.wait()


def kill_tree(pid: int) -> None:
    import psutil

    try:
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            os.kill(member.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    psutil.wait_procs(family, timeout=20)


def test_killed_after_step_10(uninterrupted: Path, root: Path, documents: Path) -> None:
    run_dir = root / "killed"
    metrics = run_dir / "metrics.jsonl"
    arguments = command("train", "configs/debug_cpu.yaml", *overrides(root, documents, "killed"))
    kill_when(lambda: (run_dir / "checkpoints/step_00000010").exists() and '"step": 10' in metrics.read_text(), arguments)
    before = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if line.endswith("}")]
    assert max(before) < STEPS
    run(command("resume", run_dir))
    assert_same_end(run_dir, uninterrupted)


def test_killed_while_a_checkpoint_is_written(uninterrupted: Path, root: Path, documents: Path) -> None:
    run_dir = root / "killed_in_save"
    checkpoints = run_dir / "checkpoints"

    def second_save_has_begun() -> bool:
        published = checkpoints / "step_00000005"
        return published.exists() and any(path.name.startswith(".tmp") for path in checkpoints.iterdir())

    kill_when(second_save_has_begun, command("train", "configs/debug_cpu.yaml", *overrides(root, documents, "killed_in_save")))
    run(command("resume", run_dir))
    assert_same_end(run_dir, uninterrupted)


@pytest.mark.parametrize("cp", [1, 4])
def test_resume_on_another_number_of_ranks(uninterrupted: Path, root: Path, cp: int) -> None:
    """From a copy of the run of two ranks, cut off after step 10."""
    moved_to = root / f"moved_to_{cp}"
    shutil.copytree(uninterrupted, moved_to)
    for step in (15, STEPS):
        shutil.rmtree(moved_to / "checkpoints" / f"step_{step:08d}")
    lines = (moved_to / "metrics.jsonl").read_text().splitlines()
    (moved_to / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= 10))
    assert max(losses(moved_to)) == 10
    run(command("resume", moved_to, f"parallel.cp={cp}"))
    moved, whole = losses(moved_to), losses(uninterrupted)
    assert moved[11] == pytest.approx(whole[11], rel=1e-6)
    assert moved[STEPS] == pytest.approx(whole[STEPS], rel=1e-3)
