"""The optimizer's plan of a configuration: what the built optimizer holds, in the estimated memory plan and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import longstride
from memory_mgmt.plan_check import tensor_bytes
from models.errors import UserError
from optim.build import build_optimizer
from tests.distributed import run_distributed
from trainer.build import build_model
from trainer.config import RunConfig
from trainer.optimizer_plan import optimizer_plan
from trainer.optimizer_plan_process import rows_of

MODEL = {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "layers": ["full", "memory"]}


def config_of(preset: str, **parallel: int) -> RunConfig:
    return RunConfig.model_validate({"model": MODEL, "optim": {"preset": preset}, "parallel": parallel, "train": {"device": "cpu"}})


def held(preset: str, shards: int) -> tuple[int, list[str]]:
    import torch

    from trainer.build import mesh_for

    config = config_of(preset, dp_shard=shards)
    model = build_model(config, 256, mesh_for(config, torch.device("cpu")), torch.device("cpu"))
    optimizer = build_optimizer(model, config.optim)
    states = {f"{i}.{name}": value for i, state in enumerate(optimizer.state.values()) for name, value in state.items()}
    return tensor_bytes(states), sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("preset", ["adamw", "galore_8bit", "apollo_mini"])
def test_what_is_planned_is_held(preset: str) -> None:
    rows = rows_of(config_of(preset, dp_shard=2), 256, 2)
    held_bytes, names = run_distributed(held, 2, preset, 2)[0]
    assert sum(row.planned_bytes for row in rows) == held_bytes
    assert sorted(row.name for row in rows) == names


def test_the_command_and_the_estimate(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["optim.preset=apollo_mini", "memory.plan=estimate", "memory.recompute=none", "train.device=cpu"]
    assert longstride.main(["plan", "debug_cpu", *settings, "--optimizer", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (states,) = (term["bytes"] for term in found["memory"]["terms"] if term["name"] == "optimizer states")
    assert states == sum(row["planned_bytes"] for row in found["optimizer"])


def test_an_optimizer_that_refuses_the_model_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("galore")
    broken = config.model_copy(update={"optim": config.optim.model_copy(update={"preset": "other"})})
    with pytest.warns(UserWarning), pytest.raises(UserError, match="optim"):
        optimizer_plan(broken, 256)
