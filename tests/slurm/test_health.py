"""What makes a node unfit, each found by itself."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from memory_mgmt.plan import MemoryPlan
from slurm import health
from slurm.health import check, folder_of, unfit_nodes
from slurm.submission import Submission, write_submission
from tests.trainer.test_runs import make
from trainer.commands.open_run import checked_plan
from trainer.config_file import resolve
from trainer.run_dir import RunDir

GIB = 1 << 30


@pytest.fixture(scope="module")
def plan() -> MemoryPlan:
    return checked_plan(resolve(None, ["memory.plan=estimate", "data.seq_len=64", "train.device=cpu"]), None)


@pytest.fixture
def run_dir(tmp_path: Path, plan: MemoryPlan, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    run_dir = make(tmp_path, "a")
    run_dir.memory_plan.write_text(plan.to_json())
    return run_dir


def problems(run_dir: RunDir, **changed) -> list[str]:
    arguments = {"gpus": 0, "ranks": 2, "commands": (), **changed}
    found = check(run_dir, folder_of(run_dir, 1), **arguments)
    assert json.loads((folder_of(run_dir, 1) / "n7.json").read_text())["problems"] == found.problems
    assert unfit_nodes(run_dir, 1) == ({"n7": found.problems[0]} if found.problems else {})
    return found.problems


def test_a_healthy_node(run_dir: RunDir) -> None:
    assert problems(run_dir, commands=("true", "test $((1 + 1)) = 2")) == []
    measured = json.loads((folder_of(run_dir, 1) / "n7.json").read_text())["measured"]
    assert {"free_memory_bytes", "run_disk_free_bytes", "copy_gib_per_second", "clock_skew_seconds", "write_seconds"} <= measured.keys()


def test_a_clock_that_is_wrong(run_dir: RunDir) -> None:
    assert problems(run_dir, clock=lambda: time.time() + 100)[0].startswith("its clock is 100 s ahead of the file server's")
    assert problems(run_dir, clock=lambda: time.time() - 100)[0].startswith("its clock is 100 s behind")


def test_too_little_memory_and_a_crawling_node(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "100000000 ranks are planned with" in problems(run_dir, ranks=100_000_000)[0]
    monkeypatch.setattr(health, "LEAST_COPY_GIB_PER_SECOND", 1e6)
    assert "the node crawls" in problems(run_dir)[0]


def test_commands_of_the_site(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "COMMAND_SECONDS", 0.5)
    found = problems(run_dir, commands=("echo link down >&2; exit 3", "sleep 20"))
    assert found == ["site.health: echo link down >&2; exit 3: exit code 3: link down", "site.health: sleep 20: no end in 0 s"]


def test_gpus(run_dir: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin") + ":/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if not Path("/usr/bin/nvidia-smi").exists():
        assert "nvidia-smi is not there" in problems(run_dir, gpus=2)[0]
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "nvidia-smi"

    def answer(text: str) -> None:
        tool.write_text(f"#!/bin/sh\ncat <<'X'\n{text}\nX\n")
        tool.chmod(0o755)

    answer("0, 80000\n1, 80000")
    assert problems(run_dir, gpus=2) == []
    assert problems(run_dir, gpus=3)[0].startswith("2 GPUs answer, 3 are needed")
    answer("0, 80000\n1, 0")
    assert "GPU 1 has" in problems(run_dir, gpus=2)[0] and "somebody else" in problems(run_dir, gpus=2)[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert problems(run_dir, gpus=1) == []


def test_a_full_disk(run_dir: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("mount is not permitted here")
    try:
        monkeypatch.setenv("TMPDIR", str(folder))
        assert f"{folder} has" in problems(run_dir)[0]
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_node_becomes_its_ranks_or_says_why_not(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[str, ...]] = []
    monkeypatch.setattr(os, "execve", lambda path, words, environment: started.append((*words, environment["GLOO_SOCKET_IFNAME"])))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    command = ("/bin/echo", "ranks")
    write_submission(run_dir, Submission("token", "5", 2, health=("exit 1",)))
    assert health.node_run(str(run_dir.path), "1", "0", "1", *command) == health.UNFIT and not started
    assert "node n7 is not fit: site.health: exit 1: exit code 1" in capfd.readouterr().err
    write_submission(run_dir, Submission("token", "5", 2))
    health.node_run(str(run_dir.path), "2", "0", "1", *command)
    assert started == [(*command, "ib0")], "what the site says stays"
    write_submission(run_dir, Submission("token", "5", 2, node_check=False, health=("exit 1",)))
    health.node_run(str(run_dir.path), "3", "0", "1", *command)
    assert started == [(*command, "ib0")] * 2 and not folder_of(run_dir, 3).exists()
