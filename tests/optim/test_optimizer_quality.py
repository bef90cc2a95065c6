"""The sweep of benchmarks/optimizer_quality.py: what it runs, that it goes on where it stopped, that it refuses another protocol's runs."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROTOCOL = {"steps": 1, "rank": 4, "update_gap": 5}


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("optimizer_quality_sweep")


def bowl(lr: float, rest_lr: float | None, seed: int) -> float:
    """Least at rates of 0.1 and 0.1, far from where the sweep starts."""
    return math.log10(lr / 0.1) ** 2 + math.log10((rest_lr or lr) / 0.1) ** 2 + 0.001 * seed


def run_all(sweep: ModuleType, file: Path, entries: list[Any], at_most: int = 1000) -> list[Any]:
    """Every run by a process of its own, as if each had been stopped after one."""
    points = []
    for _ in range(at_most):
        runs = sweep.Runs.read(file, PROTOCOL)
        point = sweep.next_point(runs, entries)
        if point is None:
            break
        loss = bowl(point.lr, point.rest_lr, point.seed) if point.lr < 1 else None
        runs.add(point, {"loss": loss, "state_bytes": 1, "parameters": 1}, {})
        points.append(point)
    return points


def test_it_walks_to_the_best_rates_and_gives_them_seeds(sweep: ModuleType, tmp_path: Path) -> None:
    entry = sweep.Entry("row", "galore", 0.02)
    points = run_all(sweep, tmp_path / "runs.jsonl", [entry])
    runs = sweep.Runs.read(tmp_path / "runs.jsonl", PROTOCOL)
    assert sweep.best_rates(runs.of(entry)) == (0.1, 0.1)
    assert len({point.key for point in points}) == len(points) == len(runs.records), "a run was made twice"
    assert {(p.lr, p.rest_lr) for p in points[:6]} == {(lr, rest) for lr in (0.01, 0.02, 0.05) for rest in (0.003, 0.01)}
    assert [(p.lr, p.rest_lr, p.seed) for p in points[-2:]] == [(0.1, 0.1, 1), (0.1, 0.1, 2)]
    swept = runs.of(entry)
    assert all(rates in swept for rates in sweep.neighbours((0.1, 0.1))) or len(swept) == sweep.MOST_SWEEP_RUNS
    assert runs.records[0]["settings"] == {"rank": 4, "update_gap": 5}


def test_breadth_first_and_important_rows_first(sweep: ModuleType, tmp_path: Path) -> None:
    rows = [sweep.Entry("late", "sgd", 0.02, important=False), sweep.Entry("one", "muon", 0.02), sweep.Entry("two", "adamw", 0.02, (None,))]
    points = run_all(sweep, tmp_path / "runs.jsonl", rows)
    names = [point.entry.name for point in points]
    assert names[:4] == ["one", "two", "one", "two"]
    first_seed = next(i for i, point in enumerate(points) if point.seed)
    assert "late" not in names[:first_seed] and names.index("late") > max(i for i, name in enumerate(names) if name != "late")


def test_a_row_that_always_diverges_comes_to_an_end(sweep: ModuleType, tmp_path: Path) -> None:
    entry = sweep.Entry("row", "sgd", 20.0)
    points = run_all(sweep, tmp_path / "runs.jsonl", [entry], at_most=40)
    assert len(points) <= sweep.MOST_SWEEP_RUNS + sweep.SEEDS
    assert min(point.lr for point in points) < 10


def test_runs_of_another_protocol_are_refused(sweep: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    run_all(sweep, file, [sweep.Entry("row", "sgd", 0.02)], at_most=1)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"runs\.jsonl holds runs of another protocol"):
        sweep.Runs.read(file, {**PROTOCOL, "steps": 2})
    assert file.read_bytes() == before


def test_every_preset_has_a_row(sweep: ModuleType) -> None:
    from typing import get_args

    from optim.config import Preset

    rows = sweep.entries()
    assert {row.preset for row in rows} == set(get_args(Preset)) - {"composed"}
    assert len({row.name for row in rows}) == len(rows)
    assert all(row.lr in sweep.LRS and set(row.rest_lrs) <= {None, *sweep.REST_LRS} for row in rows)
