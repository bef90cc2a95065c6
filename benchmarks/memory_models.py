"""Memory architectures beside other packages' code for them: speed, peak memory and error of a forward and a backward pass, equal sizes.

Claim measured: longstride's has at least twice the throughput, or at most half the peak memory, of every peer at equal exactness.

    python benchmarks/memory_models.py --peers DIR [--only TEXT] [--repeats 5]
    python benchmarks/memory_models.py --smoke --out DIR          # tiny sizes, no peers needed, results into DIR

DIR of --peers: pip install --no-deps --target DIR -r benchmarks/memory_peers.txt. What is compared, and with what "exact" means:
``benchmarks/memory_peers.py``. A case is one process with one thread: its systems take turns (every repeat runs each once), time is the
process's own, peak memory is that of the allocator's log in a pass after them: tensors above parameters and inputs, gradients included. A
system that does not run is reported with what it says. A second call measures the chosen cases again and keeps the others.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import machine, python, where, write_results  # noqa: E402

GOAL_SPEED, GOAL_MEMORY = 2.0, 0.5
AS_EXACT = 2.0
"""Equal exactness: an error at most so many times the peer's, or below ROUNDING."""
ROUNDING = 2e-6
"""Errors of a few float32 roundings, where which is smaller is chance."""

# --- one case, in a process of its own ------------------------------------------------------------------------------------------


def measure(case: Any, repeats: int, peers: str, smoke: bool) -> dict[str, dict[str, Any]]:
    """Figures of every system, or ``failed`` with what it said."""
    import torch

    from benchmarks.memory_peers import SMOKE
    from memory_mgmt.allocator_log import record_cpu_allocations

    torch.set_num_threads(1)
    if peers:
        sys.path.append(peers)
    size = SMOKE if smoke else case.sizes
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], list[Any]]] = {}
    known: dict[Any, list[Any]] = {}
    for system in case.systems:
        if smoke and system.package:
            continue
        row = rows[key(system)] = {"note": system.note, "tokens": size.tokens}
        try:
            step = system.prepare(size, torch.float32)
            found = step()
            exact = (system.exact if smoke else None) or case.exact or partial(system.prepare, dtype=torch.float64)
            if exact not in known:
                known[exact] = exact(size)()
            row["errors"] = errors(found, known[exact], len(case.results))
            steps[key(system)] = step
        except Exception as error:  # a peer's, whatever it raises: that is the result
            row["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
            if not system.package:
                raise
        found = None
    del known
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            started = time.process_time()
            step()
            times[name].append(time.process_time() - started)
    for name, step in steps.items():
        with record_cpu_allocations() as log:
            step()
            rows[name]["peak_bytes"] = log.peak_bytes()
        rows[name] |= {"cpu_seconds": median(times[name]), "repeats": repeats}
    return rows


def key(system: Any) -> str:
    """Package and name."""
    return f"{system.package or 'longstride'}: {system.name}"


def errors(found: list[Any], exact: list[Any], names: int) -> list[float]:
    """Norm of the difference over the norm of what is exact, of each result; those past ``names`` are parts of the last one."""
    squares = []
    for x, truth in zip(found, exact, strict=True):
        x, truth = (one.detach().to_dense().double() for one in (x, truth))
        squares.append([float((x - truth).square().sum()), float(truth.square().sum())])
    last = [sum(column) for column in zip(*squares[names - 1 :], strict=True)]
    return [(wrong / right) ** 0.5 for wrong, right in [*squares[: names - 1], last]]


# --- the report -----------------------------------------------------------------------------------------------------------------


def page(report: dict[str, Any], cases: Any, measured_on: str) -> str:
    """The results for people."""
    lines = [
        "# Memory architectures: speed, memory, error",
        "",
        f"{measured_on}. One thread, float32, load average {report['machine']['load_average_at_start']} before. Made by "
        "`python benchmarks/memory_models.py --peers DIR`; its first lines say what is measured, `benchmarks/memory_peers.py` what is "
        "compared.",
        "",
        "Forward and backward of one row. Speed: tokens per second of processor time; memory: peak of tensors above parameters and inputs; "
        "both also as longstride's best over this system's. Errors: against float64, norm over norm.",
    ]
    for case in cases:
        rows = report["cases"].get(case.name)
        if not rows:
            continue
        tokens, repeats = (max(row.get(name, 0) for row in rows.values()) for name in ("tokens", "repeats"))
        heads = f"| system | tokens/s | x | peak MiB | x | errors: {', '.join(case.results)} | |"
        lines += ["", f"## {case.name}: {case.about}; {tokens:,} tokens", "", f"Repeats: {repeats}.", ""]
        lines += [heads, "|---|---:|---:|---:|---:|---|---|"]
        lines += [_row(name, row, rows) for name, row in rows.items()]
        lines += ["", *verdicts(rows)]
    return "\n".join(lines) + "\n"


def speed(row: dict[str, Any]) -> float:
    """Tokens per second of processor time."""
    return row["tokens"] / row["cpu_seconds"]


def _own(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: row for name, row in rows.items() if name.startswith("longstride") and "failed" not in row}


def _row(name: str, row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    if "failed" in row:
        return f"| {name} | | | | | | does not run: `{row['failed'].replace('|', '/')}` |"
    own = _own(rows).values()
    fastest, leanest = max(speed(one) for one in own), min(one["peak_bytes"] for one in own)
    found = ", ".join(f"{error:.0e}" for error in row["errors"])
    return (
        f"| {name} | {speed(row):,.0f} | {fastest / speed(row):.2f} | {row['peak_bytes'] / 2**20:.1f} | {leanest / row['peak_bytes']:.2f} "
        f"| {found} | {row['note']} |"
    )


def as_exact(own: dict[str, Any], peer: dict[str, Any]) -> bool:
    """Whether longstride's largest error is no worse than the peer's; a peer that gives no numbers is not exact at all."""
    theirs = max(math.inf if math.isnan(error) else error for error in peer["errors"])
    return max(own["errors"]) <= max(AS_EXACT * theirs, ROUNDING)


def verdicts(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Whether the goal is met, peer by peer, by one of ours: not the speed of one and the memory of another."""
    lines = []
    for name, peer in rows.items():
        if name.startswith("longstride") or "failed" in peer:
            continue
        able = {own: row for own, row in _own(rows).items() if as_exact(row, peer)}
        if not able:
            lines.append(f"- {name}: **not met**, nothing of ours is as exact.")
            continue
        scores = {own: (speed(row) / speed(peer), row["peak_bytes"] / peer["peak_bytes"]) for own, row in able.items()}
        best = max(scores, key=lambda own: max(scores[own][0] / GOAL_SPEED, GOAL_MEMORY / scores[own][1]))
        times, memory = scores[best]
        met = "met" if times >= GOAL_SPEED or memory <= GOAL_MEMORY else "**not met**"
        lines.append(f"- {name}: {met}; {best.removeprefix('longstride: ')} has {times:.2f} times the speed in {memory:.2f} of the memory.")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Measure the chosen cases and write the results; exit code 2 where arguments are wrong, 1 where longstride's own code fails."""
    from benchmarks.memory_peers import CASES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="", help="where the peers are installed")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes without peers")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="directory of the results")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child is not None:
        print(json.dumps(measure(CASES[args.child], args.repeats, args.peers, args.smoke)))
        return 0
    for wrong, why in ((args.smoke and args.out == parser.get_default("out"), "--smoke needs --out, so that results stay"),
                       (not args.out.is_dir(), f"no such directory: {args.out}"), (args.repeats < 1, "--repeats is at least 1"),
                       (bool(args.peers) and not Path(args.peers).is_dir(), f"no such directory: {args.peers}"),
                       (not any(args.only in case.name for case in CASES), f"no case's name contains {args.only!r}")):  # fmt: skip
        if wrong:
            print(f"error: {why}", file=sys.stderr)
            return 2
    return run(args, CASES)


def run(args: argparse.Namespace, cases: Any) -> int:
    """The chosen cases, one after the other; what is there of the others stays."""
    beside = args.out / Path(__file__).name
    kept = beside.with_suffix(".json")
    report: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"cases": {}}
    packages = {system.package for case in cases for system in case.systems if system.package}
    versions = {d.metadata["Name"]: d.version for d in distributions(path=[args.peers])} if args.peers else {}
    known = {name: number for name, number in report.get("machine", {}).items() if name in packages}
    report["machine"] = machine("torch") | known | {name: number for name, number in versions.items() if name in packages}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    failed = 0
    for i, case in enumerate(cases):
        if args.only not in case.name:
            continue
        rows: dict[str, Any] | None = None
        if args.smoke:
            rows, failure = measure(case, args.repeats, "", True), ""
        else:
            options = ["--peers", args.peers] if args.peers else []
            printed, failure = python(
                Path(__file__).resolve(), "--child", str(i), "--repeats", str(args.repeats), *options, environment=environment
            )
            rows = None if failure else json.loads(printed.splitlines()[-1])
        if rows is None:
            print(f"{case.name}: {failure}", file=sys.stderr)
            failed = 1
            continue
        report["cases"][case.name] = rows
        names = [name for name in report["machine"] if name == "torch" or name in packages]
        write_results(str(beside), report, page(report, cases, where(report["machine"], *names)))
        print(case.name, *verdicts(rows), sep="\n", flush=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
