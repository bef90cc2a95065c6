"""What a run remembers of having run out of memory, and what the next plan makes of it. Imports no torch.

A rank that runs out writes ``oom/rank_R_step_N.json``; a plan that is made for the run afterwards counts what was measured above the
earlier plan, and a little more for every time it happened.
"""

from __future__ import annotations

import json
from typing import Any

from trainer.run_dir import RunDir, write_atomic

MARGIN = 1.05
"""Each time memory ran out, the next plan leaves this much more room than was measured."""


def record(run_dir: RunDir, rank: int, step: int, planned_bytes: int, measured_bytes: int) -> None:
    """Note that ``rank`` ran out of memory in ``step``."""
    folder = run_dir.path / "oom"
    folder.mkdir(exist_ok=True)
    entry = {"rank": rank, "step": step, "planned_bytes": planned_bytes, "measured_bytes": measured_bytes}
    write_atomic(folder / f"rank_{rank}_{len(records(run_dir)):03d}.json", (json.dumps(entry) + "\n").encode())


def records(run_dir: RunDir) -> list[dict[str, Any]]:
    """All notes of the run; damaged ones are left out."""
    found = []
    for path in sorted((run_dir.path / "oom").glob("rank_*.json")):
        try:
            entry = json.loads(path.read_text())
            found.append({key: int(entry[key]) for key in ("rank", "step", "planned_bytes", "measured_bytes")})
        except (ValueError, KeyError, TypeError, OSError):
            continue
    return found


def correction(run_dir: RunDir) -> float:
    """By how much more than planned a step of this run must be expected to take; 1.0 while it never ran out."""
    found = records(run_dir)
    if not found:
        return 1.0
    measured = max(entry["measured_bytes"] / max(1, entry["planned_bytes"]) for entry in found)
    times = max(sum(entry["rank"] == rank for entry in found) for rank in {entry["rank"] for entry in found})
    return max(1.0, measured) * MARGIN**times
