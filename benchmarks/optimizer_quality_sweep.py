"""Which runs the quality comparison needs: rows of its table, where their sweeps start, what has been run and what is next."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from optim.config import READ, Preset

LRS = tuple(float(f"{digit}e{power}") for power in range(-5, 2) for digit in (1, 2, 5))
"""Rates of matrices that a sweep may try."""
REST_LRS = tuple(float(f"{digit}e{power}") for power in range(-5, 2) for digit in (1, 3))
"""Rates of the rest that a sweep may try."""
SEEDS = 3
MOST_SWEEP_RUNS = 14
"""Of one row; a row that is cut off here is marked in the table."""


@dataclass(frozen=True)
class Entry:
    """One row of the table: a preset and where its sweep starts, three rates of matrices around ``lr`` and two of the rest."""

    name: str
    preset: str
    lr: float
    rest_lrs: tuple[float | None, ...] = (0.003, 0.01)
    settings: dict[str, Any] = field(default_factory=dict)
    important: bool = True
    """Swept, and given its seeds, before the others."""

    def settings_for(self, protocol: dict[str, Any]) -> dict[str, Any]:
        """Its own, and of the comparison's those that its preset reads. APOLLO-Mini keeps the rank that makes it what it is."""
        read = [name for name in ("rank", "update_gap") if name in READ.get(self.preset, ())]
        shared = {name: protocol[name] for name in read if (self.preset, name) != ("apollo_mini", "rank")}
        return {**shared, **self.settings}

    def start(self) -> list[tuple[float, float | None]]:
        """The middle first."""
        middle = LRS.index(self.lr)
        return [(LRS[i], rest) for i in (middle, middle - 1, middle + 1) for rest in reversed(self.rest_lrs)]


ROWS = (
    Entry("adamw", "adamw", 0.002),
    Entry("muon, int8 states", "muon", 0.01, settings={"state": "int8"}),
    Entry("apollo", "apollo", 0.01),
    Entry("adamw_8bit", "adamw_8bit", 0.002),
    Entry("muon", "muon", 0.01),
    Entry("galore", "galore", 0.02),
    Entry("apollo, int8 states", "apollo", 0.01, settings={"state": "int8"}),
    Entry("fira", "fira", 0.01),
    Entry("subset_norm_sm", "subset_norm_sm", 0.02),
    Entry("apollo_mini", "apollo_mini", 0.005),
    Entry("frugal", "frugal", 0.001),
    Entry("adafactor", "adafactor", 0.002),
    Entry("adamw, one rate", "adamw", 0.002, (None,)),
    Entry("adamw_4bit", "adamw_4bit", 0.002, important=False),
    Entry("galore_8bit", "galore_8bit", 0.02, important=False),
    Entry("muon, int4 states", "muon", 0.01, settings={"state": "int4", "rest": "adamw_4bit"}, important=False),
    Entry("fira, int8 states", "fira", 0.01, settings={"state": "int8"}, important=False),
    Entry("subset_norm_sm, int8 states", "subset_norm_sm", 0.02, settings={"state": "int8"}, important=False),
    Entry("natural_galore", "natural_galore", 0.02, important=False),
    Entry("q_galore", "q_galore", 0.02, important=False),
    Entry("shampoo_4bit", "shampoo_4bit", 0.002, settings={"statistics_gap": 10, "root_gap": 50}, important=False),
    Entry("adalomo", "adalomo", 0.05, (0.01, 0.03), important=False),
    Entry("sgd", "sgd", 0.5, (0.3, 1.0), important=False),
    Entry("lomo", "lomo", 0.5, (0.3, 1.0), important=False),
)
"""The starts are the papers' and packages' rates at this size; APOLLO's and GaLore's updates are smaller than their rates by design."""


def entries() -> list[Entry]:
    """The rows whose preset this tree has, and one for each preset that has none; composed is what its parts are."""
    presets = [name for name in get_args(Preset) if name != "composed"]
    rows = [row for row in ROWS if row.preset in presets]
    return rows + [Entry(name, name, 0.005, important=False) for name in presets if not any(row.preset == name for row in rows)]


@dataclass(frozen=True)
class Point:
    """One run."""

    entry: Entry
    lr: float
    rest_lr: float | None
    seed: int

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.entry.name, self.lr, self.rest_lr, self.seed)

    def describe(self) -> str:
        """In words."""
        rest = "the same for the rest" if self.rest_lr is None else f"rest {self.rest_lr:g}"
        return f"{self.entry.name}, rate {self.lr:g}, {rest}, seed {self.seed}"


class Runs:
    """What has been run: lines of JSON in a file, the first says how."""

    def __init__(self, file: Path, protocol: dict[str, Any]) -> None:
        self.file, self.protocol = file, protocol
        self.records: list[dict[str, Any]] = []

    @staticmethod
    def read(file: Path, protocol: dict[str, Any]) -> Runs:
        """Of ``file``, which need not exist. Raises ValueError where its runs were made by another protocol."""
        runs = Runs(file, protocol)
        if file.exists():
            first, *rest = (json.loads(line) for line in file.read_text().splitlines() if line.strip())
            if first.get("protocol") != protocol:
                raise ValueError(f"{file} holds runs of another protocol ({first.get('protocol')}); move it away or name another --results")
            runs.records = rest
        return runs

    def add(self, point: Point, result: dict[str, Any], where: dict[str, Any]) -> None:
        """Keep one run, on disk before this returns. What another process has added in between stays."""
        settings = point.entry.settings_for(self.protocol)
        name, lr, rest_lr, seed = point.key
        record = {"row": name, "preset": point.entry.preset, "settings": settings, "lr": lr, "rest_lr": rest_lr, "seed": seed}
        folder = os.open(self.file.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            self.records = Runs.read(self.file, self.protocol).records
            self.records.append({**record, **result, "machine": where})
            lines = [json.dumps(line) + "\n" for line in ({"protocol": self.protocol}, *self.records)]
            unfinished = self.file.with_suffix(".unfinished")
            with unfinished.open("w") as out:
                out.writelines(lines)
                out.flush()
                os.fsync(out.fileno())
            unfinished.replace(self.file)
        finally:
            os.close(folder)

    def of(self, entry: Entry, seed: int = 0) -> dict[tuple[float, float | None], float]:
        """(rate, rate of the rest) -> loss of one seed; infinite where the run diverged."""
        mine = [record for record in self.records if record["row"] == entry.name and record["seed"] == seed]
        return {(r["lr"], r["rest_lr"]): float("inf") if r["loss"] is None else r["loss"] for r in mine}

    def listing(self, chosen: list[Entry]) -> str:
        """For people."""
        lines = []
        for entry in chosen:
            found = self.of(entry)
            missing = next((point for point in missing_points(self, entry)), None)
            best = best_rates(found)
            said = f"best {min(found.values()):.4f} at {best[0]:g} and {best[1] or best[0]:g}" if best else "nothing yet"
            lines.append(f"{entry.name:30s} {len(found):2d} runs swept, {said}; next: {missing.describe() if missing else 'complete'}")
        return "\n".join(lines)


def best_rates(found: dict[tuple[float, float | None], float]) -> tuple[float, float | None] | None:
    """Of a sweep; None while no run has stayed finite."""
    finite = {rates: loss for rates, loss in found.items() if loss != float("inf")}
    return min(finite, key=lambda rates: finite[rates]) if finite else None


def neighbours(rates: tuple[float, float | None]) -> Iterator[tuple[float, float | None]]:
    """One step away in either rate."""
    lr, rest = rates
    at = LRS.index(lr)
    yield from ((LRS[i], rest) for i in (at + 1, at - 1) if 0 <= i < len(LRS))
    if rest is not None:
        at = REST_LRS.index(rest)
        yield from ((lr, REST_LRS[i]) for i in (at + 1, at - 1) if 0 <= i < len(REST_LRS))


def sweep_point(runs: Runs, entry: Entry) -> Point | None:
    """The next of the sweep, None when the best has all its neighbours or the row has had its runs."""
    found = runs.of(entry)
    for rates in entry.start():
        if rates not in found:
            return Point(entry, *rates, 0)
    best = best_rates(found)
    if best is None:  # every start diverged: go down
        lowest = min(lr for lr, _ in found)
        around = [(LRS[LRS.index(lowest) - 1], entry.rest_lrs[0])] if lowest > LRS[0] else []
    else:
        around = list(neighbours(best))
    open_points = [rates for rates in around if rates not in found]
    return Point(entry, *open_points[0], 0) if open_points and len(found) < MOST_SWEEP_RUNS else None


def missing_points(runs: Runs, entry: Entry) -> Iterator[Point]:
    """The next of the sweep; once that is over, the further seeds of its best rates."""
    point = sweep_point(runs, entry)
    if point is not None:
        yield point
        return
    best = best_rates(runs.of(entry))
    if best is not None:
        yield from (Point(entry, *best, seed) for seed in range(1, SEEDS) if best not in runs.of(entry, seed))


def next_point(runs: Runs, chosen: list[Entry]) -> Point | None:
    """Breadth first: of the important rows the sweep of the one that has the fewest runs, then their seeds; then the others' alike."""
    for important in (True, False):
        rows = [entry for entry in chosen if entry.important == important]
        sweeps = [point for entry in rows if (point := sweep_point(runs, entry)) is not None]
        if sweeps:
            return min(sweeps, key=lambda point: len(runs.of(point.entry)))
        seeds = [point for entry in rows for point in missing_points(runs, entry)]
        if seeds:
            return min(seeds, key=lambda point: point.seed)
    return None
