"""The page and the picture of the quality comparison, from the runs so far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import where
from optimizer_quality_sweep import SEEDS, Entry, Runs, best_rates, neighbours, sweep_point

BASELINE = "adamw"
STATE_SHARE = 0.25
"""Of the baseline's state that a recommended preset may keep."""


@dataclass(frozen=True)
class Row:
    """What a row of the table has come to."""

    name: str
    rates: tuple[float, float | None]
    losses: tuple[float, ...]
    """Of the best rates, by seed."""
    state_bytes: int
    parameters: int
    milliseconds: float
    """Of the optimizer in a step."""
    runs: int
    swept: bool
    """The best rates have all their neighbours tried."""

    @property
    def mean(self) -> float:
        return sum(self.losses) / len(self.losses)

    @property
    def spread(self) -> float:
        return max(self.losses) - min(self.losses)


def row_of(runs: Runs, entry: Entry) -> Row | None:
    """None while the row has no run that stayed finite."""
    best = best_rates(runs.of(entry))
    if best is None:
        return None
    mine = [record for record in runs.records if record["row"] == entry.name]
    at_best = [record for record in mine if (record["lr"], record["rest_lr"]) == best and record["loss"] is not None]
    losses = tuple(record["loss"] for record in sorted(at_best, key=lambda record: record["seed"]))
    swept = sweep_point(runs, entry) is None and _all_neighbours(runs, entry)
    milliseconds = min(record["optimizer_milliseconds"] for record in mine)
    of_any = mine[0]
    return Row(entry.name, best, losses, of_any["state_bytes"], of_any["parameters"], milliseconds, len(mine), swept)


def _all_neighbours(runs: Runs, entry: Entry) -> bool:
    found = runs.of(entry)
    best = best_rates(found)
    return best is not None and all(rates in found for rates in neighbours(best))


def verdict(row: Row, baseline: Row) -> str:
    """Against the baseline: a difference counts as one beyond the sum of both ranges over seeds, and only with all seeds on both sides."""
    if row.name == baseline.name:
        return "baseline"
    if min(len(row.losses), len(baseline.losses)) < SEEDS:
        return "too few seeds"
    difference = row.mean - baseline.mean
    if abs(difference) <= row.spread + baseline.spread:
        return "no difference"
    return "better" if difference < 0 else "worse"


def recommended(rows: list[Row]) -> Row | None:
    """The best of those not worse than the baseline at no more than ``STATE_SHARE`` of its state; None where there is none, or the seeds
    are not there yet."""
    baseline = next((row for row in rows if row.name == BASELINE), None)
    if baseline is None:
        return None
    lean = [row for row in rows if row.state_bytes <= STATE_SHARE * baseline.state_bytes]
    good = [row for row in lean if verdict(row, baseline) in ("better", "no difference") and row.mean <= baseline.mean + 1e-9]
    return min(good, key=lambda row: row.mean) if good else None


def markdown(runs: Runs, rows: list[Row], waiting: list[str]) -> str:
    """The page."""
    protocol, baseline = runs.protocol, next((row for row in rows if row.name == BASELINE), None)
    lines = [
        "# Validation loss against optimizer state",
        "",
        f"Byte-level decoder of {rows[0].parameters:,} parameters, {protocol['steps']} steps of {protocol['batch']} x "
        f"{protocol['seq_len']} bytes of novels, {protocol['schedule']} after {protocol['warmup_steps']} steps of warm-up, gradient norm "
        f"at most {protocol['clip_norm']}, betas {protocol['betas']}, no weight decay; low-rank presets at rank {protocol['rank']} with "
        f"new projections every {protocol['update_gap']} steps; the rest in 8 bits unless the row says otherwise. Loss: nats per byte of "
        f"{protocol['judged_on']}. {len(runs.records)} runs. {where(runs.records[0]['machine'], 'torch')}. Made by "
        "`python benchmarks/optimizer_quality.py`, whose first lines say how; times are of a busy machine (better: `optimizers.md`).",
        "",
        "![Validation loss against state](optimizer_quality.png)",
        "",
        *_recommendation(rows, baseline),
        "",
        "| row | loss, mean of seeds | range | seeds | against adamw | state, B/parameter | of adamw's "
        "| rate | rate of the rest | runs | optimizer, CPU ms |",
        "|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        share = f"{100 * row.state_bytes / baseline.state_bytes:.1f} %" if baseline else ""
        runs_made = f"{row.runs}{'' if row.swept else ' (unfinished)'}"
        rest = "the same" if row.rates[1] is None else f"{row.rates[1]:g}"
        lines.append(
            f"| {row.name} | {row.mean:.4f} | {row.spread:.4f} | {len(row.losses)} | {verdict(row, baseline) if baseline else ''} "
            f"| {row.state_bytes / row.parameters:.3f} | {share} | {row.rates[0]:g} | {rest} | {runs_made} "
            f"| {row.milliseconds:.1f} |"
        )
    if waiting:
        lines += ["", f"Not run yet: {', '.join(waiting)}."]
    lines += ["", "## The sweeps, seed 0", "", "| row | rate: loss at each rate of the rest |", "|---|---|"]
    return "\n".join(lines + [f"| {row.name} | {_sweep(runs, row.name)} |" for row in rows]) + "\n"


def _recommendation(rows: list[Row], baseline: Row | None) -> list[str]:
    if baseline is None or len(baseline.losses) < SEEDS:
        return ["No recommendation yet: the baseline is not complete."]
    best = recommended(rows)
    share = f"{100 * STATE_SHARE:.0f} %"
    if best is None:
        return [f"No row that is complete is at least as good as AdamW with two rates at no more than {share} of its state."]
    return [
        f"Of the rows at no more than {share} of the state of AdamW with two rates, `{best.name}` is the best: {best.mean:.4f} nats "
        f"against {baseline.mean:.4f} ({verdict(best, baseline)}), at {100 * best.state_bytes / baseline.state_bytes:.1f} % of the state."
    ]


def _sweep(runs: Runs, name: str) -> str:
    found: dict[float, list[str]] = {}
    mine = [record for record in runs.records if record["row"] == name and record["seed"] == 0]
    for record in sorted(mine, key=lambda record: (record["lr"], record["rest_lr"] or 0)):
        loss = "diverged" if record["loss"] is None else f"{record['loss']:.4f}"
        found.setdefault(record["lr"], []).append(loss if record["rest_lr"] is None else f"{record['rest_lr']:g} {loss}")
    return "; ".join(f"**{lr:g}**: {', '.join(losses)}" for lr, losses in found.items())


def picture(rows: list[Row], file: Path) -> None:
    """Loss against state, both axes as small as they can be; bars are the ranges over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6.5), constrained_layout=True)
    for row in rows:
        held = max(row.state_bytes / row.parameters, 1e-2)
        error: Any = [[row.mean - min(row.losses)], [max(row.losses) - row.mean]]
        axes.errorbar([held], [row.mean], yerr=error, fmt="o", capsize=3, color="tab:red" if row.name == BASELINE else "tab:blue")
        axes.annotate(row.name, (held, row.mean), textcoords="offset points", xytext=(6, 4), fontsize=8)
    baseline = next((row for row in rows if row.name == BASELINE), None)
    if baseline is not None:
        quarter = STATE_SHARE * baseline.state_bytes / baseline.parameters
        axes.axhline(baseline.mean, linestyle=":", color="tab:red", linewidth=1)
        axes.axvline(quarter, linestyle=":", color="grey", linewidth=1, label="a quarter of AdamW's state")
        axes.legend(loc="upper right")
    axes.set_xscale("log")
    axes.set_xlabel("optimizer state, bytes per parameter (0.01 and less at the left edge)")
    axes.set_ylabel("validation loss, nats per byte, at each row's best two rates")
    best = min(row.mean for row in rows)
    axes.set_ylim(best - 0.02, min(max(row.mean for row in rows) + 0.03, best + 0.5) if math.isfinite(best) else None)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def write_report(runs: Runs, known: list[Entry], folder: Path) -> str:
    """Write the page and the picture to ``folder``; returns the page. Raises ValueError while there is nothing to tell."""
    found = [(entry.name, row_of(runs, entry)) for entry in known]
    rows = sorted((row for _, row in found if row is not None), key=lambda row: row.mean)
    if not rows:
        raise ValueError(f"{runs.file} holds no finished run yet")
    text = markdown(runs, rows, [name for name, row in found if row is None])
    (folder / "optimizer_quality.md").write_text(text)
    picture(rows, folder / "optimizer_quality.png")
    return text
