"""Planned against measured peak memory of real training runs on this machine's CPU: three steps each, real processes, real text.

Two things are measured. *Tensors*: the most that torch's CPU allocator had handed out, by its own log of the whole run
(``memory_mgmt/allocator_log.py``; of runs of one process), beside the tensors in the plan. *Resident*: growth of the resident set of
rank 0 above the process before the model (``MemoryMonitor``), the largest of the steps, beside all that the plan counts. ``heap``: what
happens to freed blocks (``host_allocator.py``); of an ordinary heap the plan knows two bounds. One thread per rank, so that results do not
depend on the machine's cores. Writes plan_accuracy.json and .md beside this file.

    python benchmarks/plan_accuracy.py            all cases, about ten minutes on two idle cores
    python benchmarks/plan_accuracy.py NAME ...   some of them: their rows are made anew
    python benchmarks/plan_accuracy.py --tensors  only the tensors of rows that are there
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
sys.path.insert(0, str(HOME))  # run as a script, not as a module

from memory_mgmt.devices import MIB  # noqa: E402
from memory_mgmt.plan import MemoryPlan  # noqa: E402

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


UNLOGGED = ("batch", "overhead", "outside")
"""Kinds of a plan's terms that torch's allocator does not hand out; batches are numpy's."""
LOGGED = "--logged"
"""Hidden: run ``longstride`` with the rest of the words, under the allocator's log, and write the peak to the first of them."""


def run(overrides: list[str]) -> dict[str, Any]:
    """Planned and measured resident bytes of one configuration, and what becomes of freed blocks."""
    with tempfile.TemporaryDirectory() as root:
        _longstride([str(HOME / "longstride.py")], overrides, root)
        records = [json.loads(line) for line in (Path(root) / "case" / "metrics.jsonl").read_text().splitlines()]
        measured = max(record["memory_peak_bytes"] for record in records if record["split"] == "train")
        plan = json.loads((Path(root) / "case" / "memory_plan.json").read_text())
        heap = "arena" if "memory.arena=true" in overrides else "given back" if plan["return_freed_blocks"] else "ordinary"
        return {"planned": records[0]["memory_planned_bytes"], "measured": measured, "heap": heap}


def tensors(overrides: list[str]) -> dict[str, int]:
    """Planned and logged bytes of tensors, and how much less than planned may be resident; nothing for several ranks, which are
    processes of their own."""
    if _of_several_ranks(overrides):
        return {}
    with tempfile.TemporaryDirectory() as root:
        out = Path(root) / "peak"
        _longstride([__file__, LOGGED, str(out)], overrides, root)
        plan = MemoryPlan.from_json((Path(root) / "case" / "memory_plan.json").read_text())
        planned = sum(size for kind, size in plan.by_kind().items() if kind not in UNLOGGED)
        return {"planned_tensors": planned, "logged_tensors": int(out.read_text()), "spread": plan.spread_bytes}


def _of_several_ranks(overrides: list[str]) -> bool:
    return any(word.startswith("parallel.cp=") for word in overrides)


def _longstride(script: list[str], overrides: list[str], root: str) -> None:
    command = [sys.executable, *script, "train", "debug_cpu", *COMMON, *overrides, f"run.root={root}", "run.name=case"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    if done.returncode:
        raise SystemExit(f"{' '.join(overrides)}: exit code {done.returncode}\n{done.stderr[-2000:]}{done.stdout[-1000:]}")


def logged(out: str, arguments: list[str]) -> int:
    """Run ``longstride`` here and write the peak of what torch's CPU allocator handed out."""
    from longstride import main as longstride
    from memory_mgmt.allocator_log import record_cpu_allocations

    with record_cpu_allocations() as log:
        code = longstride(arguments)
    Path(out).write_text(str(log.peak_bytes()))
    return code


def main(names: list[str], only_tensors: bool) -> None:
    """Run the cases and write their rows into the results, one by one."""
    file = Path(__file__).with_suffix(".json")
    kept = json.loads(file.read_text())["cases"] if (names or only_tensors) and file.exists() else {}
    for name in names or CASES:
        resident = kept[name] if only_tensors else run(CASES[name])
        kept[name] = {**resident, "error": resident["planned"] / resident["measured"] - 1, **tensors(CASES[name])}
        print(row_of(name, kept[name]), flush=True)
        write(file, {case: kept[case] for case in CASES if case in kept})


def row_of(name: str, row: dict[str, Any]) -> str:
    """A line of the table."""
    cells = [name]
    if "logged_tensors" in row:
        cells += [f"{row['planned_tensors'] / MIB:.1f}", f"{row['logged_tensors'] / MIB:.1f}"]
        cells += [f"{row['planned_tensors'] / row['logged_tensors'] - 1:+.2%}"]
    else:
        cells += ["", "", ""]
    planned, measured = row["planned"] / MIB, row["measured"] / MIB
    if row["heap"] == "ordinary":
        least = (row["planned"] - row["spread"]) / MIB
        where = "inside" if least <= measured <= planned else f"{max(least - measured, measured - planned):.1f} MiB outside"
        cells += [row["heap"], f"{least:.1f} to {planned:.1f}", f"{measured:.1f}", where]
    else:
        cells += [row["heap"], f"{planned:.1f}", f"{measured:.1f}", f"{row['error']:+.1%}"]
    return "| " + " | ".join(cells) + " |"


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
    lines += [
        "",
        "| run | tensors planned MiB | logged MiB | error | heap | resident planned MiB | measured MiB | error |",
        "|---|---:|---:|---:|---|---:|---:|---:|",
        *(row_of(name, row) for name, row in rows.items()),
        "",
        "Tensors: what torch's CPU allocator handed out at most in the whole run, by its own log (not of several ranks). Resident: growth",
        "of the process. heap: *given back*: memory is tight, freed blocks go back to the system; *arena*: planned addresses; *ordinary*:",
        "there is room to spare and the C library keeps its holes, which differ from run to run: the plan says what there is at least and",
        "at most, and counts the most (`docs/decisions/0047`).",
    ]
    if missing := [name for name in CASES if name not in rows]:
        lines += ["", f"Not measured yet: {'; '.join(missing)}."]
    single = [name for name, row in rows.items() if "logged_tensors" not in row and not _of_several_ranks(CASES[name])]
    if single:
        lines += ["", f"Tensors not logged yet (`--tensors`): {'; '.join(single)}."]
    file.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == [LOGGED]:
        sys.exit(logged(sys.argv[2], sys.argv[3:]))
    words = sys.argv[1:]
    main([word for word in words if word != "--tensors"], "--tensors" in words)
