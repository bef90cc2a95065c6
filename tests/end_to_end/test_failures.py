"""Runs that cannot go on: they say so, save nothing bad, and what they had saved stays good."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from longstride import main
from trainer.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[2]


def longstride(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "longstride", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """``longstride`` for one rank in this process: the same is said and returned, and torch is not imported again for it."""
    assert not torch.distributed.is_initialized()  # or a command that fails would end this process
    monkeypatch.chdir(ROOT)

    def run(*arguments: object) -> subprocess.CompletedProcess:
        capfd.readouterr()
        code = main([*map(str, arguments)])
        return subprocess.CompletedProcess(arguments, code, *capfd.readouterr())

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("failures")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"line {n} of a text " * (3 + n % 5)}) + "\n" for n in range(80)))
    return [
        f"run.root={folder}",
        "data.source=jsonl",
        f"data.path={folder / 'text.jsonl'}",
        f"data.cache_dir={folder / 'tokens'}",
        "data.seq_len=128",
        "checkpoint.save_every_steps=2",
        "train.eval_sequences=0",
        "memory.plan=estimate",  # tracing has tests of its own
        "train.threads_per_rank=1",
    ]


def folder_of(settings: list[str]) -> Path:
    return Path(settings[0].removeprefix("run.root="))


def test_a_loss_that_is_not_finite_stops_all_ranks_and_is_never_saved(settings: list[str]) -> None:
    done = longstride("train", "debug_cpu", *settings, "run.name=explodes", "parallel.cp=2", "optim.lr=1e30", "optim.clip_norm=null")
    run = RunDir(folder_of(settings) / "explodes")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "stopped unsaved" in done.stderr and "optim.lr" in done.stderr
    state = run.read_state()
    assert state is not None and state.status == "failed" and "loss" in state.reason
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert all(isinstance(record["loss"], float) for record in records), "a loss that is not finite was recorded as a step"
    assert all(step <= records[-1]["step"] for step in run.checkpoint_steps())


def test_a_signal_saves_at_the_step_boundary_and_exits_75(settings: list[str]) -> None:
    """One run, stopped three times; each time the next resume goes on where it was."""
    run = RunDir(folder_of(settings) / "stopped")
    endless = ["run.name=stopped", "train.steps=100000", "checkpoint.save_every_steps=0", "parallel.cp=2"]
    arguments = ["train", "debug_cpu", *settings, *endless]
    saved: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        last = _stopped_by(number, run, arguments)
        saved.append(last)
        assert run.checkpoint_steps() == saved[-2:]  # checkpoint.keep_last
        state = run.read_state()
        assert state is not None and (state.status, state.step) == ("stopped", last) and number.name in state.reason
        arguments = ["resume", str(run.path)]
    resumed = longstride("resume", run.path, f"train.steps={last + 2}")
    assert resumed.returncode == 0, resumed.stderr
    steps = [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]
    assert steps == list(range(1, last + 3))


def _stopped_by(number: signal.Signals, run: RunDir, arguments: list[str]) -> int:
    """The last step of what ``arguments`` start, which gets signal ``number`` when it has made three steps."""

    def steps() -> int:
        return run.metrics.read_text().count("\n") if run.metrics.exists() else 0

    before, deadline = steps(), time.monotonic() + 120
    process = subprocess.Popen([sys.executable, "-m", "longstride", *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while steps() < before + 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 75, output.decode()[-2000:]
    return json.loads(run.metrics.read_text().splitlines()[-1])["step"]


@pytest.fixture(scope="module")
def trained(settings: list[str]) -> Path:
    """A run of four steps with checkpoints of two and four; to be copied."""
    assert longstride("train", "debug_cpu", *settings, "run.name=trained", "train.steps=4").returncode == 0
    return folder_of(settings) / "trained"


def test_all_checkpoints_damaged_is_an_error_and_not_a_fresh_start(trained: Path, here: Callable[..., subprocess.CompletedProcess]) -> None:
    run = RunDir(shutil.copytree(trained, trained.parent / "damaged"))
    for step in run.checkpoint_steps():
        shard = next(run.checkpoint(step).glob("*.distcp"))
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    before = run.metrics.read_bytes()
    done = here("resume", run.path, "train.steps=8")
    assert done.returncode == 2 and "intact" in done.stderr and ".distcp" in done.stderr
    assert run.metrics.read_bytes() == before


def test_the_newest_checkpoint_damaged_falls_back_and_says_so(trained: Path, here: Callable[..., subprocess.CompletedProcess]) -> None:
    run = RunDir(shutil.copytree(trained, trained.parent / "half_damaged"))
    shard = next(run.checkpoint(4).glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    done = here("resume", run.path, "train.steps=6")
    assert done.returncode == 0, done.stderr
    assert "step_00000004" in done.stdout and shard.name in done.stdout and "resumed from step_00000002" in done.stdout
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_evaluation_of_a_run_and_of_one_checkpoint(settings: list[str], here: Callable[..., subprocess.CompletedProcess]) -> None:
    trained = longstride("train", "debug_cpu", *settings, "run.name=evaluated", "train.steps=4", "train.eval_sequences=2", "parallel.cp=2")
    assert trained.returncode == 0, trained.stderr
    run = RunDir(folder_of(settings) / "evaluated")
    last = [json.loads(line) for line in run.metrics.read_text().splitlines()][-1]
    assert last["split"] == "valid"
    done = here("eval", run.path)
    assert done.returncode == 0 and f"step 4: loss {last['loss']:.4f} nats per token" in done.stdout, done.stdout + done.stderr
    assert "step 2:" in here("eval", run.path, "--checkpoint", 2).stdout
    missing = here("eval", run.path, "--checkpoint", 3)
    assert missing.returncode == 2 and "2, 4" in missing.stderr
