"""Draw the two pictures of the README from a finished run: ``python docs/pictures/make.py runs/<name>``.

``loss.png``: training and held-out loss over tokens. ``memory.png``: the planned peak by kind beside the measured peak per step.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
MIB = 2**20
COLORS = ["#1b4965", "#2a6f97", "#468faf", "#61a5c2", "#89c2d9", "#a9d6e5", "#c8b6a6", "#e0c9a6", "#b0b0b0", "#d0d0d0"]


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def draw_loss(run: Path) -> None:
    train = [r for r in records(run) if r["split"] == "train"]
    valid = [r for r in records(run) if r["split"] == "valid"]
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot([r["tokens"] / 1e6 for r in train], [r["loss"] / math.log(2) for r in train], color=COLORS[2], lw=1.2, label="training")
    axes.plot(
        [r["tokens"] / 1e6 for r in valid], [r["loss"] / math.log(2) for r in valid], "o-", color="#bb3e03", ms=4, label="held-out packages"
    )
    axes.set(xlabel="million tokens (bytes)", ylabel="bits per byte", title=run.name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(HERE / "loss.png", dpi=130)


def draw_memory(run: Path) -> None:
    plan = json.loads((run / "memory_plan.json").read_text())
    kinds: dict[str, int] = {}
    for term in plan["terms"]:
        if term["kind"] != "outside":
            kinds[term["kind"]] = kinds.get(term["kind"], 0) + term["bytes"]
    train = [r for r in records(run) if r["split"] == "train"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.2), width_ratios=[1, 2.2], sharey=True, layout="constrained")
    bottom = 0.0
    for color, (kind, size) in zip(COLORS, sorted(kinds.items(), key=lambda item: -item[1]), strict=False):
        left.bar(0, size / MIB, bottom=bottom, color=color, label=kind, width=0.6)
        bottom += size / MIB
    left.set(ylabel="MiB per rank", title="planned", xticks=[], xlim=(-0.5, 2.2))
    left.legend(frameon=False, fontsize=7, loc="center right")
    right.plot([r["step"] for r in train], [r["memory_peak_bytes"] / MIB for r in train], color=COLORS[0], label="measured peak")
    right.axhline(bottom, color="#bb3e03", ls="--", lw=1, label="planned peak")
    right.set(xlabel="step", title="measured", ylim=(0, None))
    right.grid(alpha=0.3)
    right.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(HERE / "memory.png", dpi=130)


if __name__ == "__main__":
    draw_loss(Path(sys.argv[1]))
    draw_memory(Path(sys.argv[1]))
