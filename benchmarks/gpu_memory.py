"""Planned against measured memory and time on one GPU: Llama shapes trained with full parameters, policies chosen by the planner.

Each case is a real ``longstride train`` of three steps on the standard library's text with ``memory.recompute=auto``; cases whose plan does
not fit are reported as such and not started. Written: planned and measured peak (allocated), tokens/s, MFU, share of the step spent
waiting for copies. Results go beside this file as gpu_memory.json and .md, named after the device.

    python benchmarks/gpu_memory.py               all cases on GPU 0
    python benchmarks/gpu_memory.py NAME ...      some of them, nothing is written
    python benchmarks/gpu_memory.py --smoke       one tiny case on the CPU: shows that the script works, says nothing about a GPU
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

COMMON = [
    "data.source=python_stdlib",
    "data.document_mask=false",
    "data.shuffle=none",
    "data.valid_fraction=0.0",
    "train.steps=3",
    "train.eval_sequences=0",
    "memory.recompute=auto",
    "memory.offload=kept",
]
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


def cases() -> dict[str, list[str]]:
    """Name -> overrides of debug_cpu."""
    named = {}
    for shape, lengths in LENGTHS.items():
        for length in lengths:
            named[f"{shape}, {length >> 10}K"] = [*COMMON, *GPU, *SHAPES[shape], f"data.seq_len={length}"]
    return named


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
    asked = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    report = {"device": asked.stdout.partition("\n")[0], "machine": machine("torch"), "cases": rows}
    title = [
        "# Planned against measured on one GPU",
        "",
        f"{report['device']}; {where(report['machine'], 'torch')}. Made by `python benchmarks/gpu_memory.py`.",
        "",
    ]
    body = [line(name, row) for name, row in rows.items()]
    write_results(__file__, report, "\n".join([*title, *head, *body]) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
