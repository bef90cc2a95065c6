"""The fit table: axes and sizes, ranks from gpus, refusals as rows, columns that vary, and the command as typed."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from memory_mgmt.plan import GIB, Change, MemoryPlan, Moment, Prediction, Term
from models.errors import UserError
from trainer import sweep_table, sweep_traces
from trainer.config import RunConfig
from trainer.sweep import Axis, Row, expanded, parse_axes, sweep, to_json

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "debug_cpu.yaml"
MILLION = ROOT / "configs" / "million.yaml"


def fake_plan(config: RunConfig, device: str | None) -> MemoryPlan:
    """A plan whose peak and time tell which configuration it was made from."""
    size = config.data.seq_len // config.parallel.cp * 2**16
    ranks = config.parallel.cp * config.parallel.dp_shard * config.parallel.dp_replicate
    time = config.data.seq_len / 1000 / ranks
    return MemoryPlan(
        method="test",
        device=device or "cpu",
        ranks=ranks,
        terms=(Term("all", "activations", size, size),),
        moments=(Moment("backward", size),),
        budget_bytes=None,
        device_bytes=8 * GIB,
        changes=(Change("memory.recompute=block", size // 2, "more compute"),),
        prediction=Prediction(time, config.data.seq_len / time, 0.4, time, 0.0, 0.0, 0.0, 0, 0),
    )


def rows_of(words: list[str], overrides: tuple[str, ...] = (), path: Path = MILLION) -> list[Row]:
    return sweep(path, overrides, parse_axes(words), None, fake_plan)


def test_axes_as_typed():
    assert parse_axes(["data.seq_len=64k, 1m", "device=h100", "gpus=1,8"]) == [
        Axis("data.seq_len", ("64k", "1m")),
        Axis("device", ("h100",)),
        Axis("gpus", ("1", "8")),
    ]
    assert parse_axes(["model.layers=[swa,full],[full]"])[0].values == ("[swa,full]", "[full]")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["data.seq_len"], ["data.seq_len", "key=value"]),
        (["data.seq_len="], ["key=value"]),
        (["data.seq_len=1,,2"], ["key=value"]),
        (["data.seq_len=1,"], ["key=value"]),
        (["=1"], ["key=value"]),
        (["data.sequence=64k"], ["unknown key 'data.sequence'", "device and gpus"]),
        (["data.sek_len=64k"], ["data.seq_len"]),
        (["data=64k"], ["section"]),
        (["device=h100,abacus"], ["abacus", "h200"]),
        (["gpus=1,0"], ["gpus", "'0'"]),
        (["gpus=two"], ["'two'"]),
        (["gpus=1", "parallel.cp=2"], ["gpus sets parallel.cp"]),
        (["train.seed=1", "train.seed=2"], ["train.seed is given twice"]),
        ([f"train.seed={','.join(map(str, range(40)))}", f"train.steps={','.join(map(str, range(1, 40)))}"], ["1,560 combinations"]),
    ],
)
def test_bad_axes_are_refused_by_name(words, parts):
    with pytest.raises(UserError) as caught:
        parse_axes(words)
    for part in ["--sweep", *parts]:
        assert part in str(caught.value)


def test_sizes():
    assert [expanded(text) for text in ("64k", "1M", "0.5m", "1.5K", "17", "block", "64kb")] == [
        "65536", "1048576", "524288", "1536", "17", "block", "64kb",
    ]  # fmt: skip
    with pytest.raises(UserError, match="not a whole number"):
        expanded("0.0001k")


def test_every_combination_is_planned_the_last_axis_fastest():
    rows = rows_of(["data.seq_len=64k,128k", "device=h100,cpu"])
    assert [tuple(row.values.values()) for row in rows] == [("64k", "h100"), ("64k", "cpu"), ("128k", "h100"), ("128k", "cpu")]
    assert [row.plan.device for row in rows] == ["h100", "cpu", "h100", "cpu"]
    assert [row.plan.peak_bytes for row in rows] == [2 * GIB, 2 * GIB, 4 * GIB, 4 * GIB]  # on the two ranks of the file
    seen = []
    sweep(
        MILLION, ["parallel.cp=1"], parse_axes(["train.seed=1,2,3"]), "h200", lambda c, d: seen.append((c.train.seed, d)) or fake_plan(c, d)
    )
    assert seen == [(1, "h200"), (2, "h200"), (3, "h200")]


def test_all_combinations_are_prepared_before_the_first_is_planned():
    order = []

    def plan(config: RunConfig, device: str | None) -> MemoryPlan:
        order.append("plan")
        return fake_plan(config, device)

    def prepare(combinations) -> None:
        order.append([(config.data.seq_len, device) for config, device in combinations])

    done = []
    axes = parse_axes(["data.seq_len=64k,65537,128k", "gpus=2"])
    sweep(MILLION, (), axes, "h100", plan, prepare=prepare, progress=lambda *now: done.append(now))
    assert order == [[(65536, "h100"), (131072, "h100")], "plan", "plan"]
    assert done == [(1, 3), (2, 3), (3, 3)]


def test_traces_of_a_sweep_are_shared_and_made_in_few_processes(monkeypatch):
    made = []
    monkeypatch.setattr(sweep_traces, "trace_steps", lambda requests: made.append(list(requests)))
    monkeypatch.setattr(sweep_traces.os, "cpu_count", lambda: 2)
    axes = parse_axes(["data.seq_len=512,1k,2k", "device=h100,h200,cpu", "memory.recompute=block,auto"])
    sweep(CONFIG, (), axes, None, fake_plan, prepare=sweep_traces.trace_ahead)
    assert sorted(len(requests) for requests in made) == [1, 1, 2, 2]  # three of CUDA, three of the CPU; auto traces for itself
    assert all(len({request.device_type for request in requests}) == 1 for requests in made)
    made.clear()
    sweep(CONFIG, ["memory.plan=estimate"], axes, None, fake_plan, prepare=sweep_traces.trace_ahead)
    assert made == []


def test_gpus_become_ranks_beside_the_other_degrees():
    rows = rows_of(["gpus=1,2,6,8"], ("parallel.dp_shard=2",))
    # 2 does not divide 1: all of it shares one sequence; 3 sequence-parallel ranks do not divide the length of 2 to the 20
    assert [row.degrees for row in rows] == ["cp 1", "dp_shard 2 x cp 1", "", "dp_shard 2 x cp 4"]
    assert [row.plan and row.plan.ranks for row in rows] == [1, 2, None, 8] and "parallel.cp 3" in rows[2].refused
    with_axis = rows_of(["parallel.dp_replicate=1,2", "gpus=4"])
    assert [row.degrees for row in with_axis] == ["cp 4", "dp_replicate 2 x cp 2"]


def test_what_the_config_refuses_is_a_row_with_the_reason():
    rows = rows_of(["data.seq_len=64k,65537", "gpus=2", "memory.recompute=block,blok"])
    assert [bool(row.plan) for row in rows] == [True, False, False, False]
    assert rows[1].refused == "memory.recompute: blok is none of: 'none', 'mixer', 'block', 'auto'; did you mean 'block'?"
    assert rows[2].refused.startswith("data.seq_len 65537 is not divisible by 2") and str(MILLION) not in rows[2].refused
    text = sweep_table.plain(rows)
    assert text.count("refused") == 3 and "65537 is not divisible" in text


def test_a_config_that_is_wrong_by_itself_is_an_error():
    with pytest.raises(UserError, match=r"train\.steps"):
        rows_of(["data.seq_len=64k,128k"], ("train.steps=0",))


def test_columns_that_do_not_vary_are_left_out_and_said_below():
    header, body, same = sweep_table.table(rows_of(["data.seq_len=64k,256k,1m", "device=h100"]))
    assert header == ["data.seq_len", "planned peak", "fits", "step time", "what it would need"]
    assert same == ["device: h100 in every row", "ranks: cp 2 in every row", "tokens/s: 2,000 in every row", "MFU: 40.0 % in every row"]
    assert [line[2] for line in body] == ["yes", "yes", "no"]
    assert body[2][-1] == "32.00 GiB per rank where h100 allows 8.00 GiB; nearest: memory.recompute=block -> 16.00 GiB"
    header, _, same = sweep_table.table(rows_of(["data.seq_len=384k"]))
    assert same == [] and {"ranks", "planned peak", "fits", "tokens/s", "MFU"} < set(header)
    assert "memory.recompute=block -> 6.00 GiB (more compute)" in sweep_table.plain(rows_of(["data.seq_len=384k"]))


def test_terminal_and_pipe_hold_the_same_facts():
    from rich.console import Console

    rows = rows_of(["data.seq_len=64k,1m", "gpus=1,8"])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(sweep_table.render(rows))
    squeezed = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert squeezed == [" ".join(line.split()) for line in sweep_table.plain(rows).splitlines()]


def test_json_has_a_record_for_every_row():
    rows = rows_of(["data.seq_len=64k,1m,65537"])
    data = json.loads(to_json(rows))
    fits = [record["fits"] for record in data["rows"]]
    assert data["format_version"] == 1 and fits == [True, False, None]
    assert data["rows"][0]["peak_bytes"] == 2 * GIB and data["rows"][0]["mfu"] == 0.4
    assert data["rows"][2]["refused"] and data["rows"][2]["peak_bytes"] is None
    without = dataclasses.replace(rows[0].plan, prediction=None)
    assert json.loads(to_json([dataclasses.replace(rows[0], plan=without)]))["rows"][0]["step_seconds"] is None


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "longstride.py"), "plan", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_the_command(tmp_path):
    settings = ("million", "memory.plan=estimate")
    done = run(*settings, "--sweep", "data.seq_len=64k,256k", "device=h100,h200", "gpus=1,8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert (
        lines[0].split()[:3] == ["data.seq_len", "device", "gpus"]
        and [line.split()[0] for line in lines[1:9]] == ["64k"] * 4 + ["256k"] * 4
    )
    assert len(json.loads(run(*settings, "--json", "--sweep", "gpus=1,2", cwd=tmp_path).stdout)["rows"]) == 2
    for wrong in (
        ["--sweep", "gpu=1"],
        ["--sweep"],
        ["data.seq_len=65537", "--sweep", "gpus=2,4"],
        ["--timeline", "x", "--sweep", "gpus=1"],
    ):
        bad = run(*settings, *wrong, cwd=tmp_path)
        assert bad.returncode == 2 and "Traceback" not in bad.stderr and not bad.stdout, bad
    assert list(tmp_path.iterdir()) == []


def test_sweeping_needs_no_torch():
    code = "import sys, trainer.sweep, trainer.sweep_table, trainer.plan_files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
