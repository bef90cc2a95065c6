"""The view of one run: what it says, and that damaged or hostile files do not stop it."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longstride import main
from trainer import report
from trainer.metrics_file import encode_record
from trainer.monitor_view import newest_log, plain, rank_lines, sparkline, view
from trainer.report import ticks
from trainer.run_dir import RunDir
from trainer.runs_table import read_run


def make(root: Path, steps: int = 100) -> RunDir:
    run = RunDir(root / "a")
    run.create()
    run.write_state("running", step=0, total_steps=2 * steps)
    memory = {"memory_peak_bytes": 3 << 30, "memory_planned_bytes": 2 << 30, "memory_budget_bytes": 4 << 30}
    fixed = {"split": "train", "mfu": 0.25, "lr": 1e-3, "grad_norm": 0.5, "step_seconds": 2.0, **memory}
    records = [{**fixed, "step": step, "loss": 4 - 2 * step / steps, "tokens_per_second": 1000.0 + step} for step in range(1, steps + 1)]
    run.metrics.write_bytes(b"".join(map(encode_record, [*records, {"step": steps, "split": "valid", "loss": 2.5}])))
    return run


def test_what_it_says(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.log(0).write_text("one\ntwo\n")
    run.checkpoint(80).mkdir()
    age = run.checkpoint(80).stat().st_mtime + 65
    text = plain(view(read_run(run.path), now=age)).splitlines()
    facts = {line[:8].strip(): line[8:].strip() for line in text[1:]}
    assert text[0] == "a" and facts["status"] == "running"
    assert facts["step"] == "100 of 200 (50%), 3:20 to go"
    assert facts["loss"] == "2.0000, grad_norm 0.5, lr 0.001"
    assert facts["speed"] == "1,076 tokens/s, MFU 25.0%, 2 s a step", "the median of the last 50 steps"
    assert facts["memory"] == "3.00 of 4.00 GiB, planned 2.00"
    assert facts["held-out"] == "loss 2.5000 at step 100" and facts["saved"] == "step 80, 1:05 ago"
    assert text[-3:] == ["--- logs/rank_0.log", "one", "two"]
    curve = facts["1 to 100"]
    assert len(curve) == 60 and curve[0] == "█" and curve[-1] == "▁" and list(curve) == sorted(curve, reverse=True)


def test_the_log_of_the_latest_attempt_and_no_escape_sequences(tmp_path: Path) -> None:
    run = make(tmp_path)
    for attempt in (2, 10, 1000):
        run.log(0, attempt).parent.mkdir()
        run.log(0, attempt).write_text(f"attempt {attempt} \x1b[2J\a\n")
    assert newest_log(run) == run.log(0, 1000)
    assert plain(view(read_run(run.path))).splitlines()[-1] == "attempt 1000  [2J "


DAMAGED = [
    b"",
    b"\xff\x00\n[1]\n",
    b'{"step": 1, "split": "train", "loss": "NaN"}\n{"step": 2, "split": "train", "loss": [1], "mfu": "x"}\n{"st',
]


@pytest.mark.parametrize("data", DAMAGED)
def test_damaged_files_are_shown_as_far_as_they_go(data: bytes, tmp_path: Path) -> None:
    run = make(tmp_path)
    run.metrics.write_bytes(data)
    run.log(0).write_bytes(b"\xff\xfe\n")
    assert "no checkpoint yet" in plain(view(read_run(run.path)))
    run.state.write_text("{")
    run.metrics.unlink()
    assert "unknown" in plain(view(read_run(run.path)))


class Page(HTMLParser):
    """Collects tags and text; the page must close what it opens."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_report_is_one_page_that_loads_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path, steps=3000)
    evil = '<script src="http://x/">alert(1)</script>'
    run.config.write_text(f"# {evil}\n")
    run.log(0).write_text(evil + "\n")
    run.slurm.mkdir()
    starts = {"attempt": 1, "job": "7", "nodes": evil, "started": 1e9, "saved_step": 0}
    lines = [starts, {"attempt": 1, "decision": "requeue", "reason": evil}, {**starts, "attempt": 2}]
    (run.slurm / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(run.path)]) == 0
    assert capsys.readouterr().out == f"written: {run.path / 'report.html'}\n"
    page = Page((run.path / "report.html").read_text())
    assert not {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object"}
    assert not [
        value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "xlink:href") or name.startswith("on")
    ]
    for words in (evil, "Loss, nats per token", "Memory of rank 0, GiB", "job 7", "left no account", "planned"):
        assert words in page.words
    curves = [attrs["points"] for tag, attrs in page.tags if tag == "polyline"]
    assert len(curves) == 6 and all(points and 2 <= len(points.split()) <= 1001 for points in curves)
    loss = [tuple(map(float, point.split(","))) for point in (curves[0] or "").split()]
    assert loss[0] == (64, 10) and loss[-1] == (852, 198), "falls from the upper left corner to the lower right one"
    assert main(["report", str(run.path), "--output", str(tmp_path / "no" / "x.html")]) == 2


def test_one_spike_does_not_flatten_the_gradient_norm(tmp_path: Path) -> None:
    run = make(tmp_path, steps=4)
    lines = [{"split": "train", "step": step, "grad_norm": norm} for step, norm in enumerate((1, 10, 1000, 1), 1)]
    run.metrics.write_bytes(b"".join(map(encode_record, lines)))
    page = Page(report.page(read_run(run.path), []))
    (points,) = [attrs["points"] for tag, attrs in page.tags if tag == "polyline"]
    heights = [float(point.split(",")[1]) for point in (points or "").split()]
    assert heights == pytest.approx([198, 198 - 188 / 3, 10, 198], abs=0.1) and "Gradient norm, logarithmic" in page.words
    assert all(f"{level:,}" in page.words for level in (1, 10, 100, 1000))
    run.metrics.write_bytes(b"".join(encode_record({**line, "grad_norm": line["grad_norm"] - 1}) for line in lines))
    assert "logarithmic" not in Page(report.page(read_run(run.path), [])).words, "a zero has no logarithm"


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [
        (1.5943, 5.8228, [2, 3, 4, 5]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (216.65, 3561.3, [1000, 2000, 3000]),
        (-0.35, 0.35, [-0.2, 0, 0.2]),
        (7, 7, [7]),
        (5e-324, 1e-320, [5e-324]),
        (-1.7e308, 1.7e308, [-1.7e308]),
        (1, 240, [50, 100, 150, 200]),
    ],
)
def test_round_numbers_along_an_axis(low: float, high: float, found: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(found)
    assert all(low <= tick <= high for tick in ticks(low, high))


@given(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30))
def test_an_axis_of_any_numbers_has_a_few_round_ones(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    found = ticks(low, high)
    assert len(found) <= 7 and found == sorted(set(found)) and all(low <= tick <= high for tick in found)
    assert len(found) >= 2 or high - low <= 1e-9 * max(abs(low), abs(high))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=50), st.integers(1, 20))
def test_a_curve_of_any_numbers(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == min(width, len(values))
    if len(values) <= width:
        assert [bar == "!" for bar in line] == [not math.isfinite(value) for value in values]
        finite = sorted((value, bar) for value, bar in zip(values, line, strict=True) if math.isfinite(value))
        assert [bar for _, bar in finite] == sorted(bar for _, bar in finite)


def test_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path)
    run.config.write_text("train: {}")
    assert main(["monitor", str(run.path), "--once"]) == 0
    assert "100 of 200" in capsys.readouterr().out
    assert main(["monitor", str(run.path), "--every", "nan"]) == 2 and "--every" in capsys.readouterr().err
    assert main(["monitor", str(tmp_path / "absent")]) == 2


def test_the_ranks_are_compared(tmp_path):
    run = RunDir(tmp_path)
    assert rank_lines(run) == []

    def rank(number: int, own: float, slow: int = 0) -> dict:
        return {
            "rank": number,
            "host": f"n{number // 4}",
            "own_seconds": own,
            "resident_bytes": 3 << 29,
            "device_bytes": 0,
            "slow_reports": slow,
        }

    run.ranks.write_text(json.dumps({"step": 50, "ranks": [rank(0, 1.0), rank(1, 3.0, 2), rank(2, 1.0)]}))
    assert rank_lines(run) == [
        "0 on n0: 1 s of own work, 1.0x, 1.50 GiB resident",
        "1 on n0: 3 s of own work, 3.0x, 1.50 GiB resident, slow",
        "2 on n0: 1 s of own work, 1.0x, 1.50 GiB resident",
    ]
    run.ranks.write_text(json.dumps({"step": 50, "ranks": [rank(n, 1.0 + n / 100) for n in range(64)]}))
    lines = rank_lines(run)
    assert lines[0] == "the slowest 4 of 64, at step 50" and [line.split(":")[0] for line in lines[1:]] == [
        f"{n} on n15" for n in (60, 61, 62, 63)
    ]
    for text in ("", "{", "[]", '{"step": 1, "ranks": [{"rank": 0}]}', '{"step": 1, "ranks": []}'):
        run.ranks.write_text(text)
        assert rank_lines(run) == []
