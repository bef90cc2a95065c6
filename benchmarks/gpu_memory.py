"""Planned against measured memory and time on one GPU: Llama shapes trained with full parameters, policies chosen by the planner.

Each case is a real ``longstride train`` of three steps on the standard library's text with ``memory.recompute=auto``; cases whose plan does
not fit are reported as such and not started. Written: planned and measured peak (allocated), tokens/s, MFU, share of the step spent
waiting for copies. Results go beside this file as gpu_memory.json and .md, named after the device.

    python benchmarks/gpu_memory.py               all cases on GPU 0
    python benchmarks/gpu_memory.py NAME ...      some of them, nothing is written
    python benchmarks/gpu_memory.py --arena       the same step with memory.arena off and on: losses (the same bits), reserved memory, time
    python benchmarks/gpu_memory.py --smoke       one tiny case on the CPU: shows that the script works, says nothing about a GPU;
                                                  with --arena too: the arena's cases, tiny, on the CPU
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, not as a module

from benchmarks.common import longstride, machine, where, write_results  # noqa: E402

DATA = [
    "data.source=python_stdlib",
    "data.document_mask=false",
    "data.shuffle=none",
    "data.valid_fraction=0.0",
    "train.eval_sequences=0",
]
COMMON = [*DATA, "train.steps=3", "memory.recompute=auto", "memory.offload=kept"]
SHAPES = {
    "Llama-1B": ["model.d_model=2048", "model.n_heads=32", "model.n_kv_heads=8", "model.d_ff=8192", "model.n_layers=16"],
    "Llama-8B": ["model.d_model=4096", "model.n_heads=32", "model.n_kv_heads=8", "model.d_ff=14336", "model.n_layers=32"],
    "Llama-8B, 2 layers": ["model.d_model=4096", "model.n_heads=32", "model.n_kv_heads=8", "model.d_ff=14336", "model.n_layers=2"],
}
LENGTHS = {
    "Llama-1B": (65_536, 262_144, 524_288),
    "Llama-8B": (65_536, 262_144, 524_288, 1_048_576),
    "Llama-8B, 2 layers": (1_048_576, 2_097_152, 4_194_304),
}
GPU = ["model.layers=[full]", "model.vocab_size=128256", "train.precision=bf16", "train.device=cuda"]
SMOKE = ["model.layers=[full]", "model.d_model=64", "model.n_heads=4", "model.n_layers=3", "data.seq_len=4096", "train.device=cpu"]


ARENA_COMMON = [*GPU, "train.steps=12", "memory.recompute=auto", "memory.offload=kept"]
ARENA_CASES = {
    "Llama-1B, 64K": [*ARENA_COMMON, *SHAPES["Llama-1B"], "data.seq_len=65536"],
    "Llama-1B, 256K": [*ARENA_COMMON, *SHAPES["Llama-1B"], "data.seq_len=262144"],
    "Llama-8B, 2 layers, 1024K": [*ARENA_COMMON, *SHAPES["Llama-8B, 2 layers"], "data.seq_len=1048576"],
}
ARENA_SMOKE = [
    "model.layers=[full]",
    "data.seq_len=512",
    "train.device=cpu",
    "train.steps=5",
    "memory.recompute=block",
    "memory.plan=estimate",
]


def cases() -> dict[str, list[str]]:
    """Name -> overrides of debug_cpu."""
    named = {}
    for shape, lengths in LENGTHS.items():
        for length in lengths:
            named[f"{shape}, {length >> 10}K"] = [*COMMON, *GPU, *SHAPES[shape], f"data.seq_len={length}"]
    return named


def steps_of(overrides: list[str]) -> tuple[list[dict[str, Any]], str]:
    """The records of a run's steps; what went wrong where there are none."""
    with tempfile.TemporaryDirectory() as root:
        _, failure = longstride("train", "debug_cpu", *overrides, f"run.root={root}", "run.name=case", cwd=root)
        if failure:
            return [], failure
        lines = (Path(root) / "case" / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["split"] == "train"], ""


def compare_arena(overrides: list[str]) -> dict[str, Any]:
    """One case without and with the arena, by its last step."""
    row: dict[str, Any] = {"outcome": "run"}
    losses = {}
    for arena in ("false", "true"):
        steps, failure = steps_of([*DATA, *overrides, "train.deterministic=true", f"memory.arena={arena}"])
        if failure:
            return {"outcome": f"failed with memory.arena={arena}, {failure}"}
        losses[arena] = [step["loss"] for step in steps]
        name = "arena" if arena == "true" else "plain"
        row[f"{name}_seconds"] = min(step["step_seconds"] for step in steps[-5:])
        row[f"{name}_reserved"] = steps[-1].get("memory_reserved_bytes", steps[-1]["memory_peak_bytes"])
    row |= {key: value for key, value in steps[-1].items() if key.startswith("arena_")}
    return row | {"same_losses": losses["true"] == losses["false"]}


def arena_line(name: str, row: dict[str, Any]) -> str:
    """One row of the arena's table."""
    if row["outcome"] != "run":
        return f"| {name} | {row['outcome']} | | | | | |"
    reserved = f"{row['plain_reserved'] / 2**30:.2f} | {row['arena_reserved'] / 2**30:.2f}"
    seconds = f"{row['plain_seconds']:.2f} | {row['arena_seconds']:.2f}"
    astray = f"{row['arena_missed'] + row['arena_conflicts']:.0f}"
    return f"| {name} | {'same' if row['same_losses'] else 'NOT the same'} | {reserved} | {seconds} | {astray} |"


def main_arena(smoke: bool) -> None:
    """Run the arena's cases; the results go to gpu_arena.json and .md, those of the tiny one nowhere. Exit code 1 where losses differ."""
    head = [
        "| case, last step | losses | GiB held | with arena | seconds | with arena | requests off plan |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    print("\n".join(head), flush=True)
    rows = {}
    for name, overrides in ({"smoke": ARENA_SMOKE} if smoke else ARENA_CASES).items():
        rows[name] = compare_arena(overrides)
        print(arena_line(name, rows[name]), flush=True)
    if not smoke:
        report = {"device": device_name(), "machine": machine("torch"), "cases": rows}
        title = ["# Steps without and with memory.arena on one GPU", "", f"{report['device']}; {where(report['machine'], 'torch')}.", ""]
        body = [arena_line(name, row) for name, row in rows.items()]
        write_results(str(Path(__file__).with_name("gpu_arena.py")), report, "\n".join([*title, *head, *body]) + "\n")
    if not all(row.get("same_losses") for row in rows.values()):
        sys.exit(1)


def device_name() -> str:
    """What the driver calls the GPU."""
    asked = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return asked.stdout.partition("\n")[0]


def run(overrides: list[str]) -> dict[str, Any]:
    """The plan and, where it fits, what three steps measured."""
    with tempfile.TemporaryDirectory() as root:
        settings = [*overrides, f"run.root={root}", "run.name=case"]
        said, failure = longstride("plan", "debug_cpu", *settings, "--json", cwd=root)
        if failure:
            return {"outcome": f"not planned: {failure}"}
        planned = json.loads(said)
        row = {
            "planned_peak": planned["derived"]["measurable_peak_bytes"],
            "planned_seconds": (planned["prediction"] or {}).get("step_seconds"),
        }
        if not planned["derived"]["fits"]:
            return {**row, "outcome": f"does not fit: needs {planned['derived']['smallest_budget_gib']} GiB"}
        _, failure = longstride("train", "debug_cpu", *settings, cwd=root)
        if failure:
            return {**row, "outcome": f"failed, {failure}"}
        lines = (Path(root) / "case" / "metrics.jsonl").read_text().splitlines()
        steps = [record for record in map(json.loads, lines) if record["split"] == "train"]
        last = steps[-1]
        waited = last.get("exposed_copy_seconds", 0.0)
        return {
            **row,
            "outcome": "fits",
            "measured_peak": max(step["memory_peak_bytes"] for step in steps),
            "seconds": last["step_seconds"],
            "tokens_per_second": last["tokens_per_second"],
            "mfu": last["mfu"],
            "exposed_copy_share": waited / last["step_seconds"],
            "host_peak": last.get("host_peak_bytes", 0),
        }


def line(name: str, row: dict[str, Any]) -> str:
    """One row of the table."""
    if row["outcome"] != "fits":
        return f"| {name} | {row['outcome']} | | | | | |"
    planned, measured = row["planned_peak"] / 2**30, row["measured_peak"] / 2**30
    speed = f"{row['tokens_per_second']:,.0f} | {row['mfu']:.1%}"
    return f"| {name} | fits | {planned:.2f} | {measured:.2f} | {planned / measured - 1:+.1%} | {speed} | {row['exposed_copy_share']:.1%} |"


def main(names: list[str]) -> None:
    """Run the cases, print the table, write the results when all were run."""
    chosen = {"smoke": [*COMMON, *SMOKE]} if names == ["--smoke"] else {name: cases()[name] for name in names or cases()}
    head = [
        "| case | outcome | planned GiB | measured GiB | error | tokens/s | MFU | waiting for copies |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    print("\n".join(head), flush=True)
    rows = {}
    for name, overrides in chosen.items():
        rows[name] = run(overrides)
        print(line(name, rows[name]), flush=True)
    if names:
        return
    report = {"device": device_name(), "machine": machine("torch"), "cases": rows}
    title = [
        "# Planned against measured on one GPU",
        "",
        f"{report['device']}; {where(report['machine'], 'torch')}. Made by `python benchmarks/gpu_memory.py`.",
        "",
    ]
    body = [line(name, row) for name, row in rows.items()]
    write_results(__file__, report, "\n".join([*title, *head, *body]) + "\n")


if __name__ == "__main__":
    if "--arena" in sys.argv[1:]:
        main_arena(smoke="--smoke" in sys.argv[1:])
    else:
        main(sys.argv[1:])
