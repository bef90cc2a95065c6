"""The page of the benchmark of optimizer steps, and the goals it is held against."""

from __future__ import annotations

from typing import Any

from common import where

STEP_GOAL, EIGHT_BIT_GOAL, FIRST_STEP_GOAL, RENEWAL_GOAL, CAPTURED_GOAL, MINI_GOAL, SPIKE_GOAL = 0.4, 0.3, 1.0, 0.15, 0.99, 0.22, 2.0


def goals(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal with what was measured for it; one whose peer did not run is missed."""
    found: list[dict[str, Any]] = []

    def goal(text: str, measured: float | None, limit: float, unit: str, at_least: bool = False) -> None:
        met = measured is not None and (measured >= limit if at_least else measured <= limit)
        found.append({"goal": text, "limit": limit, "at_least": at_least, "measured": measured, "unit": unit, "met": met})

    for workload in report["workloads"]:
        for preset, limit in (("galore", STEP_GOAL), ("apollo", STEP_GOAL), ("apollo_mini", STEP_GOAL), ("adamw_8bit", EIGHT_BIT_GOAL)):
            row = _row(workload, preset)
            ratio = against(row, workload)
            goal(f"{preset}, {workload['name']}: step over {row['reference']}'s", ratio, limit, "x")
        first = _row(workload, "adamw_8bit")["first_step_s"]
        goal(f"adamw_8bit, {workload['name']}: first step", first, FIRST_STEP_GOAL, "s")
    for row in report["renewals"]:
        goal(f"renewal, {row['workload']}: time over that of full SVDs", row["ours_ms"] / row["svd_ms"], RENEWAL_GOAL, "x")
        goal(f"renewal, {row['workload']}: least part of an SVD's energy", row["least_captured"], CAPTURED_GOAL, "", at_least=True)
    mini = next(row for row in report["llama_1b"] if row["preset"] == "apollo_mini")
    goal("apollo_mini with its rest in 8 bits on a LLaMA of 1B: state", mini["state_bytes"] / mini["parameters"], MINI_GOAL, "B/parameter")
    for row in report["worst"]:
        text = f"{row['system']}, {row['workload']}, new projections every {row['gap']} steps: worst step over the median"
        goal(text, row["worst_ms"] / row["median_ms"], SPIKE_GOAL, "x")
    return found


def _row(workload: dict[str, Any], system: str) -> dict[str, Any]:
    return next(row for row in workload["rows"] if row["system"] == system and row["package"] == "longstride")


def against(row: dict[str, Any], workload: dict[str, Any]) -> float | None:
    """A step's time over that of its reference; None where either has none."""
    peer = next((other for other in workload["rows"] if f"{other['package']} {other['system']}" == row["reference"]), None)
    if peer is None or "error" in peer or "error" in row:
        return None
    return row["step_ms"] / peer["step_ms"]


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    versions = ", ".join(f"{name} {found or 'absent'}" for name, found in report["packages"].items())
    lines = [
        "# Steps of optimizers: time, state, temporary memory",
        "",
        f"{where(report['machine'], 'torch')}, one thread; {versions}; load average {report['machine']['load_average_at_start']} before. "
        "Made by `python benchmarks/optimizers.py --peers PEERS`; its first lines say what is measured.",
        "",
        "| goal | limit | measured | met |",
        "|---|---:|---:|---|",
    ]
    for goal in report["goals"]:
        measured = "not measured" if goal["measured"] is None else f"{goal['measured']:.3f} {goal['unit']}"
        lines.append(
            f"| {goal['goal']} | {'at least' if goal['at_least'] else 'at most'} {goal['limit']} | {measured} | {_yes(goal['met'])} |"
        )
    for workload in report["workloads"]:
        lines += ["", f"## {workload['name']}: {workload['parameters']:,} parameters, rank {workload['rank']}", "", *_steps(workload)]
    lines += ["", "## Making GaLore's projections anew, all of them", ""]
    lines += [
        "| workload | ours, CPU ms | full SVDs, CPU ms | ratio | energy of the SVD's captured, least and mean |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['workload']} | {row['ours_ms']:.1f} | {row['svd_ms']:.1f} | {row['ours_ms'] / row['svd_ms']:.2f}x "
        f"| {row['least_captured']:.4f}, {row['mean_captured']:.4f} |"
        for row in report["renewals"]
    ]
    lines += ["", "## The worst step of a cycle", ""]
    lines += ["| preset | workload | gap | median, CPU ms | worst, CPU ms | ratio |", "|---|---|---:|---:|---:|---:|"]
    lines += [
        f"| {row['system']} | {row['workload']} | {row['gap']} | {row['median_ms']:.2f} | {row['worst_ms']:.2f} "
        f"| {row['worst_ms'] / row['median_ms']:.2f}x |"
        for row in report["worst"]
    ]
    parameters = report["llama_1b"][0]["parameters"]
    lines += ["", f"## State of a LLaMA of {parameters:,} parameters (rank 512, the rest in 8 bits), by storage", ""]
    lines += ["| preset | bytes per parameter | GiB | as planned |", "|---|---:|---:|---|"]
    lines += [
        f"| {row['preset']} | {row['state_bytes'] / parameters:.3f} | {row['state_bytes'] / 2**30:.2f} "
        f"| {_yes(row['state_bytes'] == row['planned_bytes'])} |"
        for row in report["llama_1b"]
    ]
    return "\n".join(lines) + "\n"


def _yes(met: bool) -> str:
    return "yes" if met else "**no**"


def _steps(workload: dict[str, Any]) -> list[str]:
    lines = [
        "| optimizer | step, CPU ms | over its reference | renewal, CPU ms | first step, s (CPU s) | state, B/parameter "
        "| temporary, MiB (in a renewal) |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    failed = []
    for row in sorted(workload["rows"], key=lambda row: row["package"] != "longstride"):
        name = row["system"] if row["package"] == "longstride" else f"{row['package']} {row['system']}"
        if "error" in row:
            failed.append(f"- {name} does not run: `{row['error']}`")
            continue
        ratio = against(row, workload)
        over = f"{ratio:.2f}x {row['reference']}" if ratio is not None else row["note"]
        renewal = f"{row['renewal_ms']:.1f}" if "renewal_ms" in row else ""
        temporary = f"{row['temporary_bytes'] / 2**20:.1f}" + (
            f" ({row['renewal_temporary_bytes'] / 2**20:.1f})" if "renewal_temporary_bytes" in row else ""
        )
        lines.append(
            f"| {name} | {row['step_ms']:.2f} | {over} | {renewal} | {row['first_step_s']:.2f} ({row['first_step_cpu_s']:.2f}) "
            f"| {row['state_bytes'] / workload['parameters']:.3f} | {temporary} |"
        )
    return [*lines, "", *failed] if failed else lines
