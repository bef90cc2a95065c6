"""Slow ranks and growing memory are named, and only those; lines of logs say when."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel import log_lines
from parallel.log_lines import Stamped, without_stamp
from parallel.waiting import WaitClock
from tests.distributed import run_distributed
from trainer.config import GuardsSection
from trainer.rank_reports import RankReport, RankReports, grows, slow_ranks
from trainer.run_dir import RunDir

MIB = 2**20


def report(own: float = 1.0, resident: int = 1024 * MIB, device: int = 0) -> RankReport:
    return RankReport(own, resident, device, 4096 * MIB)


@pytest.mark.parametrize(
    ("own", "slow"),
    [
        ([1.0], {}),
        ([0.0, 0.0], {}),
        ([1.0, 3.0], {1: 3.0}),
        ([1.0, 1.4, 1.0, 1.0], {}),
        ([1.0, 1.0, 2.0, 1.0], {2: 2.0}),
        ([1.0, 2.0, 2.0, 1.0, 1.0], {1: 2.0, 2: 2.0}),
    ],
)
def test_a_slow_rank_is_told_from_the_median_of_the_others(own: list[float], slow: dict[int, float]) -> None:
    assert slow_ranks(own, 1.5) == slow and slow_ranks(own, 0) == {}


def test_a_straggler_is_named_with_its_node_when_it_stays_one(tmp_path: Path) -> None:
    reports = RankReports(GuardsSection(), RunDir(tmp_path), ["n1", "n1", "n2"])
    told = [reports.take(step, [report(), report(), report(own)]) for step, own in enumerate((3, 1, 3, 3, 3, 3, 1, 3))]
    assert [len(lines) for lines in told] == [0, 0, 0, 1, 0, 1, 0, 0]
    assert "straggler: rank 2 on n2 takes 3 s of its own work, 3.0 times the median of the others, in 2 reports in a row" in told[3][0]
    written = json.loads((tmp_path / "ranks.json").read_text())
    assert [rank["host"] for rank in written["ranks"]] == ["n1", "n1", "n2"] and written["ranks"][2]["slow_reports"] == 1


@pytest.mark.parametrize(
    ("sizes", "trend"),
    [
        ([100, 200, 300, 400, 500], True),
        ([100, 200, 300, 400], False),
        ([100, 200, 190, 300, 400], True),
        ([100, 400, 400, 400, 400], False),
        ([500, 400, 300, 200, 100], False),
        ([100, 110, 120, 130, 140], False),
    ],
)
def test_what_is_a_trend(sizes: list[int], trend: bool) -> None:
    assert grows([size * MIB for size in sizes], sizes[0] * MIB, 0.1) is trend


@pytest.mark.parametrize("kind", ["resident", "device"])
def test_growing_memory_is_named_once_per_share(kind: str, tmp_path: Path) -> None:
    reports = RankReports(GuardsSection(), RunDir(tmp_path), ["n1", "n2"])
    told = {step: reports.take(step, [report(), report(**{kind: (1000 + step) * MIB})]) for step in range(0, 450, 10)}  # 1 MiB a step
    said = {step: lines[0] for step, lines in told.items() if lines}
    assert list(said) == [110, 230, 360] and all(len(lines) <= 1 for lines in told.values())
    assert "memory of rank 1 on n2 grows: 1.08 GiB" in said[110] and "0.98 GiB at step 0; 4.00 GiB are left" in said[110]
    assert "for 4,096 steps at that rate" in said[110]


def _waits() -> float:
    clock = WaitClock()
    dist.barrier()
    with clock.running():
        if dist.get_rank() == 1:
            time.sleep(0.5)
        dist.all_reduce(torch.ones(1))
    after = clock.seconds
    dist.barrier()
    assert clock.seconds == after, "only while it runs"
    return after


def test_the_slow_rank_waits_least() -> None:
    quick, slow = run_distributed(_waits, 2)
    assert quick > slow


def test_lines_of_a_log_begin_with_clock_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_lines, "_step", None)
    stream = io.StringIO()
    log = Stamped(stream)
    print("starting", file=log)
    log_lines.at_step(37)
    log.write("half a ")
    log.write("line\nand another\n")
    lines = stream.getvalue().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| starting", lines[0])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d step 37 \| half a line", lines[1])
    assert [without_stamp(line) for line in lines] == ["starting", "half a line", "and another"]
    assert without_stamp("error: 2026 | x") == "error: 2026 | x"
