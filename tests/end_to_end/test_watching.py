"""What a person watches: TensorBoard serves the scalars of a run, resumed or not, and metrics.jsonl holds the same numbers."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TAGS = {"loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_peak_bytes", "memory_planned_bytes", "memory_budget_bytes"}


def longstride(*arguments: object) -> None:
    command = [sys.executable, "-m", "longstride", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps, stopped and resumed to 9 with the arena."""
    folder = tmp_path_factory.mktemp("watch")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"line {n} of a small text " * (3 + n % 5)}) + "\n" for n in range(80)))
    settings = [
        f"run.root={folder}",
        "run.name=watched",
        "data.source=jsonl",
        f"data.path={folder / 'text.jsonl'}",
        f"data.cache_dir={folder / 'tokens'}",
        "data.seq_len=128",
        "train.steps=6",
        "train.eval_every_steps=3",
        "memory.budget_gib=4",
        "checkpoint.save_every_steps=3",
    ]
    longstride("train", "configs/debug_cpu.yaml", *settings)
    longstride("resume", folder / "watched", "train.steps=9", "memory.arena=true")
    return folder / "watched"


def test_metrics_have_every_step_once_with_the_promised_keys(run_dir: Path) -> None:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["split"] == "train"] == list(range(1, 10))
    # 3 and 6 are due, and so are the ends of both runs: 6 again is the same evaluation, not a second record
    assert sorted({r["step"] for r in records if r["split"] == "valid"}) == [3, 6, 9]
    for record in records:
        assert {"step", "split", "loss", "tokens", "tokens_per_second", "memory_peak_bytes"} <= record.keys()
        assert math.isfinite(record["loss"]) and record["tokens_per_second"] > 0 and record["memory_peak_bytes"] > 0
        assert record["tokens"] == 128 * record["step"]


def test_a_run_with_the_arena_says_what_it_served(run_dir: Path) -> None:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    served = {r["step"]: r.get("arena_served_bytes") for r in records if r["split"] == "train"}
    assert all(served[step] is None for step in range(1, 7)), "before it was resumed there was none"
    assert served[7] == 0 and (served[9] or 0) > 2**20, "it watches before it serves"
    (last,) = (r for r in records if r["split"] == "train" and r["step"] == 9)
    assert last["arena_missed"] == last["arena_conflicts"] == last["arena_waits"] == 0 and last["arena_passed_bytes"] >= 0


def test_tensorboard_serves_the_scalars_over_http(run_dir: Path) -> None:
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run_dir / "tensorboard"), "--port", "0", "--bind_all"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as server:
        try:
            port = _port(server)
            train = _wait_for_tags(port)
            assert {f"train/{tag}" for tag in TAGS} <= train and "valid/loss" in train
            points = _get(port, "scalars?" + urllib.parse.urlencode({"run": ".", "tag": "train/loss"}))
        finally:
            server.kill()
    assert [point[1] for point in points] == list(range(1, 10))
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if r["split"] == "train"]
    assert [point[2] for point in points] == pytest.approx(losses, rel=1e-6)  # TensorBoard keeps float32


def _port(server: subprocess.Popen) -> int:
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.search(r"http://[^:/]+:(\d+)/", line):
            return int(found[1])
    raise AssertionError("tensorboard ended without serving")


def _get(port: int, what: str):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugin/scalars/{what}", timeout=20) as answer:
        return json.load(answer)


def _wait_for_tags(port: int) -> set[str]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        tags = _get(port, "tags")
        if tags.get(".") and "valid/loss" in tags["."]:
            return set(tags["."])
        time.sleep(0.3)
    raise AssertionError(f"tensorboard shows {tags}")
