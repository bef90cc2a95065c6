"""Saving checkpoints: never over an older one, whole on all ranks or not at all, in the background."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from models.errors import RunFailed
from tests.distributed import run_distributed
from tests.trainer.small_run import Progress, Run, files, manager, same, saved
from trainer.checkpoint import CheckpointManager
from trainer.checkpoint_ranks import DiskFull
from trainer.config import CheckpointSection
from trainer.manifest import verify
from trainer.run_dir import RunDir

# ---- saving


def test_an_existing_step_is_never_overwritten(tmp_path):
    checkpoints, run = saved(tmp_path, 1)
    before = {name: (RunDir(tmp_path).checkpoint(1) / name).read_bytes() for name in files(RunDir(tmp_path).checkpoint(1))}
    with pytest.raises(RunFailed, match="step_00000001 exists already and is not overwritten"):
        checkpoints.save(1, run.state())
    assert before == {name: (RunDir(tmp_path).checkpoint(1) / name).read_bytes() for name in files(RunDir(tmp_path).checkpoint(1))}


def test_retention(tmp_path):
    _, run = saved(tmp_path, *range(1, 10), keep_last=2, keep_every_steps=4)
    assert RunDir(tmp_path).checkpoint_steps() == [4, 8, 9]
    checkpoints = manager(tmp_path, keep_last=3)
    checkpoints.save(10, run.state())
    assert RunDir(tmp_path).checkpoint_steps() == [8, 9, 10]
    assert all(verify(RunDir(tmp_path).checkpoint(step)) == [] for step in (8, 9, 10))
    assert [name for name in os.listdir(tmp_path / "checkpoints") if name.startswith(".")] == []


def test_a_failed_deletion_costs_a_warning_not_the_run(tmp_path, monkeypatch):
    checkpoints, run = saved(tmp_path, 1, 2)
    real = shutil.rmtree

    def stuck(path, *args, **kwargs):
        if Path(path).name.startswith(".trash") and not kwargs.get("ignore_errors"):
            (Path(path) / ".metadata").unlink()
            raise OSError(16, "Device or resource busy")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", stuck)
    with pytest.warns(RuntimeWarning, match="cannot delete old checkpoint.*step_00000001.*busy"):
        checkpoints.save(3, run.state())
    monkeypatch.undo()
    assert RunDir(tmp_path).checkpoint_steps() == [2, 3]
    assert checkpoints.clean() == [".trash-step_00000001"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000002", "step_00000003"]


class _FullDisk(CheckpointManager):
    """Rank 1 (or a single process) finds the disk full in the middle of its file."""

    def _storage_writer(self, folder):
        writer = super()._storage_writer(folder)
        if self.ranks.rank == self.ranks.size - 1:
            writer.fs.create_stream = _full  # type: ignore[method-assign]
        return writer


def _full(path, mode):
    Path(path).write_bytes(b"some")
    raise OSError(28, "No space left on device", str(path))


def _save_on_full_disk(folder: str, asynchronous: bool) -> list[str]:
    run_dir = RunDir(folder)
    messages = []
    checkpoints = _FullDisk(run_dir, CheckpointSection(asynchronous=asynchronous))
    run = Run()
    for step in (1, 2):
        try:
            checkpoints.save(step, run.state())
            checkpoints.wait()
        except RunFailed as error:
            messages.append(str(error))
    return [*messages, *(os.listdir(run_dir.checkpoints) if checkpoints.ranks.rank == 0 else [])]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_ranks_full_disk_fails_the_save_on_all_and_leaves_nothing(tmp_path, asynchronous):
    for messages in run_distributed(_save_on_full_disk, 2, str(tmp_path), asynchronous, timeout=30):
        assert len(messages) == 2
        for step, message in enumerate(messages, 1):
            assert message.startswith(f"cannot save step_0000000{step}: rank 1: No space left on device")


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_really_full_disk_keeps_the_previous_checkpoint(tiny_disk, foreseen, monkeypatch):
    run, checkpoints = Run(), manager(tiny_disk)
    checkpoints.save(1, run.state())
    if not foreseen:  # somebody else took the room meanwhile
        monkeypatch.setattr("trainer.checkpoint.check_room", lambda *_: None)
    said = "no room for step_00000002: it takes 3.9 MiB" if foreseen else r"cannot save step_00000002.*(No space|unexpected pos)"
    with pytest.raises(DiskFull, match=said):
        checkpoints.save(2, {"model": {"w": torch.zeros(1_000_000)}})
    assert os.listdir(tiny_disk / "checkpoints") == ["step_00000001"]
    assert (good := checkpoints.latest_good()) is not None
    assert good.step == 1
    checkpoints.save(2, run.state())


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MiB."""
    import subprocess

    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("mount is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("verify", [True, False])
def test_what_does_not_read_back_is_set_aside_and_nothing_older_goes(tmp_path, verify, monkeypatch):
    checkpoints, run = saved(tmp_path, 1, 2, verify=verify)
    publish = checkpoints._publish

    def flip(step, files):
        publish(step, files)
        shard = next(checkpoints.run_dir.checkpoint(step).glob("*.distcp"))
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)

    monkeypatch.setattr(checkpoints, "_publish", flip)
    if not verify:
        checkpoints.save(3, run.state())
        assert RunDir(tmp_path).checkpoint_steps() == [2, 3]
        return
    with pytest.raises(RunFailed, match=r"step_00000003: __0_0.distcp: SHA-256 differs.*older checkpoints are intact"):
        checkpoints.save(3, run.state())
    assert RunDir(tmp_path).checkpoint_steps() == [1, 2]
    assert (tmp_path / "checkpoints" / ".damaged-step_00000003").is_dir()
    monkeypatch.undo()
    checkpoints.save(3, run.state())
    assert RunDir(tmp_path).checkpoint_steps() == [2, 3]


# ---- in the background


class _Slow(CheckpointManager):
    """Waits before the tensors are written until told to go on."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.go = threading.Event()
        self.writing = 0
        self.most_writing = 0

    def _write_tensors(self, folder, content):
        self.writing += 1
        self.most_writing = max(self.most_writing, self.writing)
        assert self.go.wait(30)
        super()._write_tensors(folder, content)
        self.writing -= 1


def _async_while_training(folder: str) -> dict:
    checkpoints = _Slow(RunDir(folder), CheckpointSection(asynchronous=True))
    run = Run(torch.float64)
    progress = {"step": 1, "cursor": {"document": 4}}
    run.step(1)
    before = run.whole()
    checkpoints.save(1, {**run.state(), "train": progress})
    assert RunDir(folder).checkpoint_steps() == []
    progress["cursor"]["document"] = 99
    for step in range(2, 6):  # collectives of training while the save waits and then uses its own group
        run.step(step)
        if step == 3:
            checkpoints.go.set()
    second = run.whole()
    checkpoints.save(5, {**run.state(), "train": progress})
    run.step(6)
    checkpoints.close()
    assert checkpoints.most_writing == 1
    fresh, train = Run(torch.float64), Progress()
    checkpoints.load(RunDir(folder).checkpoint(1), {**fresh.state(), "train": train})
    first_ok = same(fresh.whole(), before)
    checkpoints.load(RunDir(folder).checkpoint(5), {"model": fresh.state()["model"], "optim": fresh.state()["optim"]})
    return {"first": first_ok, "second": same(fresh.whole(), second), "train": train.values}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_background_save_holds_the_values_of_its_moment(tmp_path, ranks):
    for result in run_distributed(_async_while_training, ranks, str(tmp_path), timeout=60):
        assert result == {"first": True, "second": True, "train": {"step": 1, "cursor": {"document": 4}}}


def test_background_save_without_a_process_group(tmp_path):
    checkpoints = _Slow(RunDir(tmp_path), CheckpointSection(asynchronous=True))
    tensor = torch.zeros(5)
    parameter = torch.nn.Parameter(tensor)
    parameter.grad = torch.zeros(5)
    step = torch.tensor(3.0)
    checkpoints.save(1, {"model": {"w": tensor, "p": parameter, "step": step}})
    tensor += 1
    step += 1
    checkpoints.go.set()
    checkpoints.wait()
    state = {"w": torch.ones(5), "p": torch.ones(5), "step": torch.zeros(())}
    checkpoints.load(RunDir(tmp_path).checkpoint(1), {"model": state})
    assert torch.equal(state["w"], torch.zeros(5))
    assert torch.equal(state["p"], torch.zeros(5))
    assert state["step"] == 3


def test_an_error_in_the_background_surfaces_once(tmp_path):
    checkpoints = _FullDisk(RunDir(tmp_path), CheckpointSection(asynchronous=True))
    checkpoints.save(1, {"model": {"w": torch.ones(2)}})
    deadline = time.monotonic() + 20
    while checkpoints.failure is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "No space left" in str(checkpoints.failure)
    with pytest.raises(RunFailed, match="No space left"):
        checkpoints.save(2, {"model": {"w": torch.ones(2)}})
    assert checkpoints.failure is None
    checkpoints.close()
    assert os.listdir(tmp_path / "checkpoints") == []


def test_a_group_that_is_not_gloo_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    with pytest.raises(ValueError, match="gloo process group of their own"):
        CheckpointManager(RunDir("x"), CheckpointSection(), process_group=object())  # type: ignore[arg-type]


def test_no_warning_about_a_missing_process_group(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys, torch; from trainer.checkpoint import CheckpointManager, CheckpointSection, RunDir\n"
        "m = CheckpointManager(RunDir(sys.argv[1]), CheckpointSection()); w = torch.ones(2)\n"
        "m.save(1, {'model': {'w': w}}); m.load(m.latest_good(), {'model': {'w': w}})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, check=True
    )
    assert "torch.distributed is disabled" not in done.stderr


def test_json_documents_are_json(tmp_path):
    checkpoints, _ = saved(tmp_path, 1)
    assert json.loads((RunDir(tmp_path).checkpoint(1) / "train_state.json").read_text())["train"] == {"step": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.latest_good() is not None
