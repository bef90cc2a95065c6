"""The table of runs and the console lines."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from parallel.log_lines import write_beside
from trainer.console import RunConsole, duration, facts
from trainer.metrics import encode_record
from trainer.run_dir import Process, RunDir
from trainer.runs_table import read_run, read_runs, render

ROOT = Path(__file__).resolve().parents[2]


MEMORY = {"memory_peak_bytes": 3 << 30, "memory_budget_bytes": 4 << 30}


def make(root: Path, name: str, status="done", step=10, lines: int = 10) -> RunDir:
    run = RunDir(root / name)
    run.create()
    run.write_state(status, step=step, total_steps=100, reason="because" if status == "failed" else "")
    records = [
        {"step": i, "split": "train", "loss": 5 / i, "tokens_per_second": 1234.5, "mfu": 0.381, **MEMORY} for i in range(1, lines + 1)
    ]
    records.insert(len(records) // 2, {"step": 5, "split": "valid", "loss": 2.5})
    run.metrics.write_bytes(b"".join(map(encode_record, records)))
    return run


def dead_process() -> Process:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return dataclasses.replace(Process.current(), pid=child.pid)


def set_process(run: RunDir, process: Process) -> None:
    state = run.read_state()
    assert state
    run.state.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(state, process=process))))


def test_a_row_tells_what_the_files_say(tmp_path):
    run = make(tmp_path, "a", step=10)
    run.checkpoint(5).mkdir()
    run.checkpoint(10).mkdir()
    row = read_run(run.path)
    assert (row.name, row.status, row.step, row.total_steps, row.checkpoint_step) == ("a", "done", 10, 100, 10)
    assert (row.train_loss, row.valid_loss, row.tokens_per_second, row.memory_peak_bytes) == (0.5, 2.5, 1234.5, 3 << 30)


def test_a_running_run_shows_the_step_of_its_metrics_and_a_torn_tail_is_skipped(tmp_path):
    run = make(tmp_path, "a", "running", step=0, lines=3000)
    with run.metrics.open("ab") as stream:
        stream.write(b'{"step": 3001, "spl')
    row = read_run(run.path)
    assert (row.status, row.step, row.train_loss) == ("running", 3000, 5 / 3000)


def test_a_run_whose_process_is_gone_died(tmp_path):
    run = make(tmp_path, "a", "running")
    set_process(run, dead_process())
    assert read_run(run.path).status == "died"
    assert "resume" in read_run(run.path).reason
    set_process(run, dataclasses.replace(dead_process(), host="elsewhere"))
    assert read_run(run.path).status == "running", "another machine cannot be seen from here"
    finished = make(tmp_path, "b", "done")
    set_process(finished, dead_process())
    assert read_run(finished.path).status == "done"


def test_damaged_and_empty_runs_are_listed_too(tmp_path):
    (tmp_path / "only-config").mkdir()
    (tmp_path / "only-config" / "config.yaml").write_text("run: {}")
    broken = make(tmp_path, "broken")
    broken.state.write_text("{")
    broken.metrics.write_bytes(b"\xff\x00\n[1]\n" + b'{"step": "x"}\n')
    (tmp_path / "not-a-run").mkdir()
    (tmp_path / "file").write_text("")
    rows = {row.name: row for row in read_runs(tmp_path)}
    assert set(rows) == {"only-config", "broken"}
    assert {row.status for row in rows.values()} == {"unknown"}
    assert [row.name for row in read_runs(broken.path)] == ["broken"]
    assert read_runs(tmp_path / "nowhere") == []


def test_in_a_pipe_lines_are_whole_and_separated_by_tabs(tmp_path):
    make(tmp_path, "a-" + "long" * 20, "failed", step=7)
    stream = io.StringIO()
    render(read_runs(tmp_path), stream, now=time.time() + 61)
    head, line = stream.getvalue().splitlines()
    assert head.split("\t")[:3] == ["run", "status", "step"]
    cells = line.split("\t")
    assert cells[:9] == ["a-" + "long" * 20, "failed", "7/100", "0.5000", "2.5000", "1,234", "38.1%", "3.00/4.00", "-"]
    assert cells[9].startswith("1:0")
    assert cells[10:] == ["-", "-", "because"]


def test_the_age_of_the_last_checkpoint(tmp_path):
    run = make(tmp_path, "a")
    run.checkpoint(8).mkdir()
    os.utime(run.checkpoint(8), (1000.0, 1000.0))
    stream = io.StringIO()
    render(read_runs(tmp_path), stream, now=1061.0)
    assert stream.getvalue().splitlines()[1].split("\t")[8] == "8, 1:01 ago"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_it_is_a_table_and_text_is_not_markup(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    run = make(tmp_path, "a")
    run.write_state("failed", step=1, reason="[bold]x[/bold] [/nonsense]")
    stream = _Terminal()
    render(read_runs(tmp_path), stream)
    assert "[bold]x[/bold] [/nonsense]" in stream.getvalue()


def test_a_narrow_terminal_has_whole_columns_and_notes_below_them(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "55")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    why = "attempts in a row brought no new checkpoint after step 7; the last one: rank 3: out of memory"
    make(tmp_path, "a").write_state("failed", step=7, total_steps=100, reason=why)
    make(tmp_path, "b").write_state("done", step=100, total_steps=100)
    stream = _Terminal()
    render(read_runs(tmp_path), stream)
    head, *lines = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).splitlines()
    assert head.split() == ["run", "status", "step", "loss", "tokens/s", "mem", "GiB"], "without empty columns and the least needed"
    assert lines[0].split()[:3] == ["a", "failed", "7/100"] and lines[-1].split()[:3] == ["b", "done", "100/100"]
    assert " ".join(" ".join(lines[1:-1]).split()) == why and all(line.startswith("    ") for line in lines[1:-1])
    assert all(len(line) <= 55 for line in (head, *lines))


def test_200_runs_in_half_a_second_without_torch(tmp_path):
    first = make(tmp_path, "run-0", lines=2000)
    for number in range(1, 200):
        run = RunDir(tmp_path / f"run-{number}")
        run.create()
        for file in (first.state, first.metrics):
            (run.path / file.name).write_bytes(file.read_bytes())
        for step in range(10):
            run.checkpoint(step).mkdir()
    best = 10.0
    for _ in range(3):
        begin = time.perf_counter()
        rows = read_runs(tmp_path)
        render(rows, io.StringIO())
        best = min(best, time.perf_counter() - begin)
    assert len(rows) == 200
    assert best < 0.5
    code = "import sys, trainer.runs_table, slurm.commands; assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- console


def step_record(step: int, **more) -> dict:
    return {"step": step, "split": "train", "loss": 2.34567, "tokens_per_second": 5912.4, "memory_peak_bytes": 6 << 29, **more}


def test_facts_in_one_line():
    assert facts(step_record(1)) == "loss 2.3457 | 5,912 tokens/s | mem 3.00 GiB"
    full = step_record(1, mfu=0.381, grad_norm=1.25, lr=3e-4, memory_budget_bytes=4 << 30, memory_planned_bytes=2 << 30)
    assert facts(full) == "loss 2.3457 | grad 1.25 | lr 0.0003 | 5,912 tokens/s | MFU 38.1% | mem 3.00 of 4.00 GiB, planned 2.00"
    assert facts({"loss": float("nan")}) == "loss nan"
    assert [duration(seconds) for seconds in (0, 61.4, 3723)] == ["0:00", "1:01", "1:02:03"]


def test_plain_lines_first_last_and_notes(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    console = RunConsole(1000, stream=stream, plain_every_seconds=1.0)
    for step in range(1, 1001):
        clock[0] += 0.25
        console.step(step_record(step))
    console.valid({"step": 1000, "loss": 2.5, "memory_peak_bytes": 1})
    console.note("saved")
    console.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 1/1000 | loss 2.3457 | 5,912 tokens/s | mem 3.00 GiB"
    assert lines[1].startswith("step 5/1000")
    assert lines[1].endswith("ETA 4:09")
    assert lines[-3].startswith("step 1000/1000")
    assert lines[-2:] == ["valid at step 1000 | loss 2.5000", "saved"]
    assert 250 < len(lines) < 260


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    stream, log = _Terminal(), io.StringIO()
    write_beside(log)
    try:
        console = RunConsole(10, stream=stream)
        for step in range(1, 11):
            console.step(step_record(step))
        console.note("[saved]")
        console.close()
        console.note("next")
    finally:
        write_beside(None)
    assert [line.split(" | ")[0] for line in log.getvalue().splitlines()] == ["step 1/10", "step 10/10", "[saved]", "next"], "no bar"
    text = stream.getvalue()
    assert "step 10/10" in text
    assert "loss 2.3457 | 5,912 tokens/s" in text
    assert "[saved]" in text


def test_other_ranks_are_silent_and_a_closed_pipe_does_not_stop_training():
    stream = io.StringIO()
    silent = RunConsole(10, enabled=False, stream=stream)
    silent.step(step_record(1))
    silent.note("x")
    assert stream.getvalue() == ""
    stream.close()
    console, log = RunConsole(10, stream=_Broken()), io.StringIO()
    write_beside(log)
    try:
        console.step(step_record(1))
        console.step(step_record(10))
    finally:
        write_beside(None)
    assert log.getvalue().count("\n") == 2, "the log goes on"


class _Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError
