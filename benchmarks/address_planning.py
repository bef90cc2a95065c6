"""Every method of address planning on public instances and on training steps: heights, certificates, seconds.

Claim measured: ``auto`` reaches the lower bound, with its certificate, where it is known to be reachable; it is never worse than the best
greedy order or MEMO's bi-level plan. Each cell is one call of ``plan_addresses`` in its own process with the same time limit; the
C++ loops are compiled before. "Best greedy" tries every order with first and best fit. ``mip`` starts from the best greedy plan.

  python benchmarks/address_planning.py --data ../shared/data/dsa   # writes address_planning.json and address_planning.md beside it
  python benchmarks/address_planning.py --seconds 2 --only G_1      # prints only

The instances A to K are MiniMalloc's (google/minimalloc, Apache-2.0), the number in the name is the capacity to meet; G_1 is from
idealloc's benchmarks (MIT; from google/iopddl); trace_l1 and trace_l4 are traced steps of a Llama-7B shape. Without ``--data`` only the
generated instances run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, not as a module

from benchmarks.common import machine, where, write_results  # noqa: E402
from memory_mgmt.address_examples import cut_rectangle, training_step  # noqa: E402
from memory_mgmt.address_file import read_lifetimes  # noqa: E402
from memory_mgmt.address_native import exact_library, search_library  # noqa: E402
from memory_mgmt.address_planning import METHODS, Lifetime, check_plan, plan_addresses  # noqa: E402


def instances(data: Path | None) -> dict[str, tuple[list[Lifetime], int | None]]:
    """Name to lifetimes and capacity."""
    found: dict[str, tuple[list[Lifetime], int | None]] = {}
    for path in sorted(data.glob("*.csv")) if data else []:
        capacity = path.stem.partition(".")[2]
        found[path.stem] = read_lifetimes(path)[0], int(capacity) if capacity else None
    for seed in (0, 1):
        found[f"training step, 32 layers, {seed}"] = training_step(32, seed=seed), None
        found[f"training step, 32 layers, recompute, {seed}"] = training_step(32, recompute=True, seed=seed), None
    found["training step, 80 layers"] = training_step(80, seed=1), None
    for pieces in (50, 200, 1000):
        found[f"cut rectangle, {pieces}"] = cut_rectangle(pieces, span=4000, height=100_000, seed=0), None
    return found


def measure(lifetimes: list[Lifetime], method: str, seconds: float) -> dict[str, Any]:
    """One plan in a process of its own, checked pair by pair of neighbours once more here."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        plan = pool.apply(plan_addresses, (lifetimes,), {"method": method, "time_limit": seconds})
    check_plan(lifetimes, plan.offsets)
    return {
        "height": plan.height,
        "lower_bound": plan.lower_bound,
        "ratio": plan.ratio,
        "status": plan.status,
        "found_by": plan.method,
        "seconds": round(plan.seconds, 3),
    }


def row(name: str, lifetimes: list[Lifetime], capacity: int | None, seconds: float) -> dict[str, Any]:
    """All methods on one instance."""
    results = {method: measure(lifetimes, method, seconds) for method in METHODS}
    bound = max(result["lower_bound"] for result in results.values())
    for result in results.values():
        result["ratio"] = round(result["height"] / bound, 6)
    return {"instance": name, "buffers": len(lifetimes), "capacity": capacity, "lower_bound": bound, "methods": results}


def table(rows: list[dict[str, Any]]) -> str:
    """Ratio to the lower bound and seconds per method; * marks a certificate."""
    lines = [
        "| instance | buffers | lower bound | capacity met by auto | " + " | ".join(METHODS) + " | auto / best greedy | auto / bi-level |",
        "|---|---:|---:|---|" + "---:|" * (len(METHODS) + 2),
    ]
    for r in rows:
        methods = r["methods"]
        height = methods["auto"]["height"]
        met = "" if r["capacity"] is None else "yes" if height <= r["capacity"] else "no"
        cells = [f"{m['ratio']:.4f}{'*' if m['status'] == 'optimal' else ''} ({m['seconds']:.2f} s)" for m in methods.values()]
        against = [f"{height / methods[other]['height']:.4f}" for other in ("greedy", "bilevel")]
        lines.append(f"| {r['instance']} | {r['buffers']:,} | {r['lower_bound']:,} | {met} | {' | '.join([*cells, *against])} |")
    return "\n".join(lines)


def main() -> None:
    """Measures and prints; writes the results when nothing is left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of CSV instances")
    parser.add_argument("--seconds", type=float, default=10.0, help="time limit of every plan")
    parser.add_argument("--only", help="instances whose names contain this; prints only")
    given = parser.parse_args()
    packages = ("pulp", "highspy", "numpy")
    measured_on = machine(*packages)
    search_library()
    exact_library()
    rows = []
    for name, (lifetimes, capacity) in instances(given.data).items():
        if given.only is None or given.only in name:
            rows.append(row(name, lifetimes, capacity, given.seconds))
            print(table(rows).splitlines()[-1], flush=True)
    if given.only is not None:
        return
    result = {"machine": measured_on, "date": date.today().isoformat(), "seconds": given.seconds, "rows": rows}
    # Two threads per plan: other programs show in the seconds.
    described = f"{where(measured_on, *packages)}; load average {measured_on['load_average_at_start']:.0f} before"
    text = (
        "# Planning addresses\n\n"
        f"{described}. Made on {result['date']} by `python benchmarks/address_planning.py`, whose first lines say what is measured.\n\n"
        f"Height over lower bound, and seconds, with a limit of {given.seconds:g} s per plan. A star is a certificate: the height "
        "equals the lower bound (the most bytes alive at a time, or more where a search has proven more), no plan can be lower.\n\n"
        + table(rows)
        + "\n"
    )
    write_results(__file__, result, text)


if __name__ == "__main__":
    main()
