"""Planned against measured peak memory of real training runs on this machine's CPU: three steps each, real processes, real text.

Measured is the growth of the resident set of rank 0 above the process before the model (``MemoryMonitor``), the largest of the steps;
planned is what ``longstride plan`` says it will be. ``heap`` in the table: what happens to freed blocks (``host_allocator.py``). One thread
per rank, so that results do not depend on the machine's cores. Writes plan_accuracy.json and .md beside this file.

    python benchmarks/plan_accuracy.py            all cases, about five minutes on two idle cores
    python benchmarks/plan_accuracy.py NAME ...   some of them: their rows are made anew
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent.parent
COMMON = [
    "train.steps=3",
    "train.eval_sequences=0",
    "train.threads_per_rank=1",
    "model.d_model=128",
    "model.n_heads=4",
    "memory.loss_tile_tokens=2048",
]
TIGHT = ["memory.budget_gib=1.5"]
CASES = {
    "full attention, 16K": ["model.layers=[full,full]", "data.seq_len=16384", *TIGHT],
    "full attention, 16K, bf16": ["model.layers=[full,full]", "data.seq_len=16384", "train.precision=bf16", "memory.budget_gib=1.1"],
    "full attention, 16K, bf16, room to spare": ["model.layers=[full,full]", "data.seq_len=16384", "train.precision=bf16"],
    "window and memory, 32K": ["data.seq_len=32768", *TIGHT],
    "window and memory, 64K, tiles": [
        "data.seq_len=65536",
        "memory.recompute=block",
        "memory.ffn_tile_tokens=8192",
        "memory.memory_tile_tokens=8192",
        *TIGHT,
    ],
    "memory, 32K, mixer kept": ["model.layers=[memory,memory]", "data.seq_len=32768", "memory.recompute=mixer", *TIGHT],
    "full attention, 16K, planned policy": [
        "model.layers=[full]",
        "model.n_layers=4",
        "data.seq_len=16384",
        "memory.recompute=auto",
        "memory.budget_gib=0.8",
    ],
    "full attention, 16K, arena": ["model.layers=[full,full]", "data.seq_len=16384", "memory.arena=true"],
    "full attention, 32K, two ranks": ["model.layers=[full,full]", "data.seq_len=32768", "parallel.cp=2", *TIGHT],
    "window and memory, 64K, two ranks": ["data.seq_len=65536", "parallel.cp=2", "memory.budget_gib=2"],
}


def run(overrides: list[str]) -> dict[str, Any]:
    """Planned and measured bytes of one configuration, and what becomes of freed blocks."""
    with tempfile.TemporaryDirectory() as root:
        command = [
            sys.executable,
            str(HOME / "longstride.py"),
            "train",
            "debug_cpu",
            *COMMON,
            *overrides,
            f"run.root={root}",
            "run.name=case",
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=root)
        if done.returncode:
            raise SystemExit(f"{' '.join(overrides)}: exit code {done.returncode}\n{done.stderr[-2000:]}{done.stdout[-1000:]}")
        records = [json.loads(line) for line in (Path(root) / "case" / "metrics.jsonl").read_text().splitlines()]
        measured = max(record["memory_peak_bytes"] for record in records if record["split"] == "train")
        plan = json.loads((Path(root) / "case" / "memory_plan.json").read_text())
        heap = "arena" if "memory.arena=true" in overrides else "given back" if plan["return_freed_blocks"] else "ordinary"
        return {"planned": records[0]["memory_planned_bytes"], "measured": measured, "heap": heap}


def main(names: list[str]) -> None:
    """Run the cases and write their rows into the results, one by one."""
    file = Path(__file__).with_suffix(".json")
    kept = json.loads(file.read_text())["cases"] if names and file.exists() else {}
    for name in names or CASES:
        found = run(CASES[name])
        kept[name] = {**found, "error": found["planned"] / found["measured"] - 1}
        planned, measured = found["planned"] / 2**20, found["measured"] / 2**20
        print(f"{name:<42} planned {planned:8.1f}  measured {measured:8.1f} MiB  {kept[name]['error']:+.1%}  {found['heap']}", flush=True)
        write(file, {case: kept[case] for case in CASES if case in kept})


def write(file: Path, rows: dict[str, dict[str, Any]]) -> None:
    """The results as JSON and, beside it, as a table."""
    processor = platform.processor() or platform.machine()
    machine = f"{processor}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}"
    versions = {package: version(package) for package in ("torch", "numpy")}
    file.write_text(json.dumps({"machine": machine, "versions": versions, "cases": rows}, indent=2) + "\n")
    lines = [
        "# Planned against measured peak memory (CPU)",
        "",
        f"{machine}; torch {versions['torch']}. `python benchmarks/plan_accuracy.py`",
    ]
    lines += ["", "| run | heap | planned MiB | measured MiB | error |", "|---|---|---:|---:|---:|"]
    for name, row in rows.items():
        planned, measured = row["planned"] / 2**20, row["measured"] / 2**20
        lines.append(f"| {name} | {row['heap']} | {planned:.1f} | {measured:.1f} | {row['error']:+.1%} |")
    lines += [
        "",
        "heap: *given back*: memory is tight, freed blocks go back to the system; *arena*: planned addresses; *ordinary*: there is room to",
        "spare and the C library keeps its holes, which the plan counts near the most that was measured.",
    ]
    if missing := [name for name in CASES if name not in rows]:
        lines += ["", f"Not measured yet: {'; '.join(missing)}."]
    file.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
