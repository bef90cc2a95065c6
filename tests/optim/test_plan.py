"""The plan of an optimizer: bytes and collectives as they come, and reasons where something is not as asked."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from optim.build import build_optimizer
from optim.config import OptimConfig
from optim.driver import ComposedOptimizer
from optim.plan import plan, planned, table, table_by_kind
from optim.plan_collectives import collectives_of_step
from tests.distributed import run_distributed
from tests.optim.test_driver import PRESETS, Tiny, feed, make, sharded

COMPOSED = {
    "columns of momentum": {"projector": "columns", "rule": "momentum", "lift": "residual", "guard": "rms_clip", "update_gap": 3},
    "muon inside": {"projector": "singular", "rule": "muon", "lift": "scaled_residual", "rank": 8, "update_gap": 3, "svd": "exact"},
}
CASES = {
    **{name: {"preset": name, **settings} for name, settings in PRESETS.items()},
    **{name: {"preset": "composed", **settings} for name, settings in COMPOSED.items()},
}


def count_and_plan(cases: dict[str, dict]) -> dict[str, tuple[list[int], list[int], list]]:
    """Of each case: collectives of four steps as foretold and as they were, and the plan."""
    counted = 0

    def counting(of):
        def count(*args, **kwargs):
            nonlocal counted
            counted += 1
            return of(*args, **kwargs)

        return count

    kinds = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "all_to_all_single", "all_to_all")
    found = {}
    for name, settings in cases.items():
        model = sharded(dist.get_world_size())
        optimizer = build_optimizer(model, **settings)
        assert isinstance(optimizer, ComposedOptimizer)
        foretold, were = [], []
        for step in range(1, 5):
            foretold.append(collectives_of_step(optimizer, step))
            counted, kept = 0, {kind: getattr(dist, kind) for kind in kinds}
            for kind, of in kept.items():
                setattr(dist, kind, counting(of))
            feed(model, optimizer, 1, start=step - 1)
            for kind, of in kept.items():
                setattr(dist, kind, of)
            were.append(counted)
        found[name] = (foretold, were, optimizer.plan())
    return found


def test_collectives_and_bytes_are_as_planned() -> None:
    for rank, found in enumerate(run_distributed(count_and_plan, 2, CASES)):
        for name, (foretold, were, rows) in found.items():
            assert foretold == were, name
            assert [row for row in rows if row.planned_bytes != row.measured_bytes] == [], name
            with torch.device("meta"):
                model = Tiny()
            without_memory = {row.name: row for row in planned(model, OptimConfig.model_validate(CASES[name]), shards=2, rank=rank)}
            assert without_memory.keys() == {row.name for row in rows}
            for row in rows:
                other = without_memory[row.name]
                assert (other.planned_bytes, other.requests, other.placement, other.algorithm) == (
                    row.planned_bytes,
                    row.requests,
                    row.placement,
                    row.algorithm,
                )
        assert sum(found["sgd"][1]) == 0 and sum(found["galore"][1]) > 0
        assert len({tuple(row.requests) for row in found["galore"][2]}) == 3  # none, tall and wide


def test_every_optimizer_says_what_it_holds() -> None:
    for settings in (*CASES.values(), {"preset": "adamw"}):
        model = make()
        optimizer = build_optimizer(model, **settings)
        rows = optimizer.plan()  # pyright: ignore[reportAttributeAccessIssue]
        assert {row.name for row in rows} == {name for name, _ in model.named_parameters()}
        assert [row for row in rows if row.planned_bytes != row.measured_bytes] == []
        with torch.device("meta"):
            bytes_ = sum(row.planned_bytes for row in planned(Tiny(), OptimConfig.model_validate(settings)))
        assert bytes_ == sum(row.planned_bytes for row in plan(optimizer))


def test_nothing_falls_back_silently() -> None:
    optimizer = build_optimizer(make(), preset="galore_8bit", rank=8)
    reasons = {row.name: row.fallbacks for row in optimizer.plan()}  # pyright: ignore[reportAttributeAccessIssue]
    assert reasons["up.weight"] == ("exp_avg, exp_avg_sq not int8: too small for few bits",)  # 130 x 8
    assert "rank 3 not 8: the matrix has no more" in reasons["few.weight"]
    assert reasons["embed.weight"] == ()
    with pytest.raises(ValueError, match="not everything is as asked for: .*few.weight: rank 3 not 8: the matrix has no more"):
        optimizer.plan(strict=True)  # pyright: ignore[reportAttributeAccessIssue]
    exact = build_optimizer(make(), preset="adafactor", rest="sgd").plan(strict=True)  # pyright: ignore[reportAttributeAccessIssue]
    assert all(row.fallbacks == () for row in exact)


def test_tables() -> None:
    rows = build_optimizer(make(), preset="galore", rank=8).plan()  # pyright: ignore[reportAttributeAccessIssue]
    lines = table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and lines[-1].startswith("total") and "left" in table(rows) and "96x130" in table(rows)
    total = f"{sum(row.planned_bytes for row in rows):,}"
    assert total in lines[-1] and total in table_by_kind(rows).splitlines()[-1]
    assert "requests" not in lines[0]  # one rank asks nobody: the column is left out
