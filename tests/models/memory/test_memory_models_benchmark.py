"""The benchmark of memory architectures: every case runs, tiny and without peers, is exact, and is judged as its page says."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import memory_models
from benchmarks.memory_operators import Case, System, _operator, _own_sum, delta_inputs, exact_sum
from benchmarks.memory_peers import CASES, SMOKE


def test_smoke_measures_every_case_exactly(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert memory_models.main(["--smoke", "--out", str(tmp_path), "--repeats", "1"]) == 0
    cases = json.loads((tmp_path / "memory_models.json").read_text())["cases"]
    assert list(cases) == [case.name for case in CASES]
    for case in CASES:
        rows = cases[case.name]
        assert list(rows) == [f"longstride: {system.name}" for system in case.systems if not system.package]
        for row in rows.values():
            assert len(row["errors"]) == len(case.results) and 0 < max(row["errors"]) < memory_models.ROUNDING
            assert row["peak_bytes"] > 0 and row["cpu_seconds"] > 0
    replay, lean, kept = cases["Recurrent Memory Transformer"].values()
    assert lean["peak_bytes"] < replay["peak_bytes"] < kept["peak_bytes"]
    page = (tmp_path / "memory_models.md").read_text()
    assert all(f"## {case.name}: " in page for case in CASES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory_models.json", "memory_models.md"]


def test_a_wrong_result_shows_and_a_peer_that_fails_is_reported() -> None:
    def doubled(*given: object) -> object:
        return 2 * _own_sum(*given)  # type: ignore[arg-type]

    def broken(*given: object) -> object:
        raise RuntimeError("no driver\nsecond line")

    exact = partial(_operator, delta_inputs, exact_sum, dtype=torch.float64)
    functions = {"ours": doubled, "theirs": _own_sum}
    systems = [System(name, "", partial(_operator, delta_inputs, function)) for name, function in functions.items()]  # type: ignore[arg-type]
    rows = memory_models.measure(Case("x", "y", SMOKE, systems, exact, ("out",) * 6), 1, "", True)
    assert rows["longstride: ours"]["errors"][0] == pytest.approx(1.0, abs=1e-5) and max(rows["longstride: theirs"]["errors"]) < 1e-6
    peer = Case("x", "y", SMOKE, [System("theirs", "package", broken)], exact)  # type: ignore[arg-type]
    assert memory_models.measure(peer, 1, "", False)["package: theirs"]["failed"] == "RuntimeError: no driver"


def _figures(seconds: float, peak: int, error: float = 1e-7) -> dict:
    return {"note": "", "tokens": 100, "cpu_seconds": seconds, "peak_bytes": peak, "errors": [error]}


def test_the_goal_is_met_by_one_system_that_is_as_exact() -> None:
    fast, lean, peer = _figures(1.0, 100), _figures(4.0, 40), _figures(1.9, 79)
    assert "**not met**" in memory_models.verdicts({"longstride: a": fast, "p: b": peer})[0]
    assert "**not met**" in memory_models.verdicts({"longstride: a": fast, "longstride: c": lean, "p: b": peer})[0]
    assert (
        "met; c has 0.47 times the speed in 0.49 of the memory"
        in (memory_models.verdicts({"longstride: a": fast, "longstride: c": lean, "p: b": peer | {"peak_bytes": 81}})[0])
    )
    assert "met; a has 2.00" in memory_models.verdicts({"longstride: a": fast, "p: b": peer | {"cpu_seconds": 2.0}})[0]
    inexact = {"longstride: a": _figures(1.0, 100, 1e-4), "p: b": _figures(9.0, 900, 1e-5)}
    assert memory_models.verdicts(inexact) == ["- p: b: **not met**, nothing of ours is as exact."]
    nothing = peer | {"errors": [float("nan")], "cpu_seconds": 2.0}
    assert "met; a has 2.00" in memory_models.verdicts({"longstride: a": fast, "p: b": nothing})[0]
    assert memory_models.verdicts({"longstride: a": fast, "p: b": {"failed": "E: x", "note": ""}}) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--smoke"], "--smoke needs --out"),
        (["--out", "/nowhere"], "no such directory: /nowhere"),
        (["--peers", "/nowhere"], "no such directory: /nowhere"),
        (["--only", "Hopfield"], "no case's name contains 'Hopfield'"),
        (["--repeats", "0"], "--repeats is at least 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert memory_models.main(arguments) == 2
    assert said in capsys.readouterr().err
