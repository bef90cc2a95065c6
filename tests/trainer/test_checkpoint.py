"""Checkpoints: exact on any number of ranks; what does not fit is refused by name."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from models.errors import RunFailed, UserError
from tests.distributed import run_on_kept_ranks as run_distributed
from tests.trainer.small_run import Progress, Run, manager, same, saved
from trainer.run_dir import RunDir

# ---- exactness and resharding


def _save_ranks(folder: str, dtype: torch.dtype) -> dict:
    run = Run(dtype)
    for step in range(3):
        run.step(step)
    torch.manual_seed(100 + dist.get_rank())
    manager(folder).save(3, {**run.state(), "train": Progress(step=3, loss=0.1, cursor={"epoch": 2})})
    draw = torch.rand(3)
    at_save = run.whole()
    run.step(3)
    return {"at_save": at_save, "next": run.whole(), "draw": draw}


def _load_ranks(folder: str, dtype: torch.dtype) -> dict:
    run, progress, checkpoints = Run(dtype), Progress(), manager(folder)
    good = checkpoints.latest_good()
    assert good is not None
    loaded = checkpoints.load(good, {**run.state(), "train": progress})
    draw = torch.rand(3)
    at_load = run.whole()
    run.step(3)
    return {"at_load": at_load, "next": run.whole(), "draw": draw, "random": loaded.random_state_restored, "train": progress.values}


@pytest.mark.parametrize(
    ("dtype", "writers", "readers"),
    [
        (torch.float32, 2, 2),
        (torch.float32, 2, 1),
        (torch.float32, 2, 4),
        (torch.float32, 4, 2),
        (torch.float64, 2, 2),
        (torch.float64, 1, 3),
        (torch.bfloat16, 2, 4),
    ],
    ids=str,
)
def test_saved_on_some_ranks_loads_on_others_bit_identical(tmp_path, dtype, writers, readers):
    wrote = run_distributed(_save_ranks, writers, str(tmp_path), dtype)
    read = run_distributed(_load_ranks, readers, str(tmp_path), dtype)
    for rank, result in enumerate(read):
        assert same(result["at_load"], wrote[0]["at_save"])
        assert result["train"] == {"step": 3, "loss": 0.1, "cursor": {"epoch": 2}}
        assert result["random"] == (writers == readers)
        if writers == readers:
            assert same(result["next"], wrote[0]["next"])
            assert torch.equal(result["draw"], wrote[rank]["draw"]), "each rank goes on with its own random numbers"


def test_group_to_plain_process_and_back(tmp_path):
    wrote = run_distributed(_save_ranks, 2, str(tmp_path), torch.float64)
    run, progress = Run(torch.float64), Progress()
    loaded = manager(tmp_path).load(RunDir(tmp_path).checkpoint(3), {**run.state(), "train": progress})
    assert same(run.whole(), wrote[0]["at_save"])
    assert (loaded.step, loaded.manifest.world_size, loaded.manifest.config_hash, loaded.random_state_restored) == (3, 2, "cafe", False)
    manager(tmp_path).save(4, {**run.state(), "train": progress})
    back = run_distributed(_load_ranks, 2, str(tmp_path), torch.float64)
    assert same(back[1]["at_load"], wrote[0]["at_save"])


def test_optimizer_state_of_torchs_own_form_with_settings(tmp_path):
    """get_optimizer_state_dict mixes tensors with JSON values such as param_groups."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    run = Run()
    run.step(0)
    run.optimizer.param_groups[0]["lr"] = 0.125
    checkpoints = manager(tmp_path)
    checkpoints.save(1, {"optim": get_optimizer_state_dict(run.net, run.optimizer)})
    fresh = Run()
    form = get_optimizer_state_dict(fresh.net, fresh.optimizer)
    form["param_groups"][0]["new_setting"] = 7
    loaded = checkpoints.load(RunDir(tmp_path).checkpoint(1), {"optim": form})
    set_optimizer_state_dict(fresh.net, fresh.optimizer, optim_state_dict=form)
    assert fresh.optimizer.param_groups[0]["lr"] == 0.125
    assert same(
        {k: v for k, v in fresh.whole().items() if k.startswith("optim")}, {k: v for k, v in run.whole().items() if k.startswith("optim")}
    )
    assert loaded.notes == []


def test_settings_that_one_side_lacks_are_named(tmp_path):
    checkpoints = manager(tmp_path)
    checkpoints.save(1, {"optim": {"w": torch.ones(2), "lr": 0.5, "old": 1}})
    state = {"w": torch.zeros(2), "lr": 0.0, "new": 3}
    loaded = checkpoints.load(RunDir(tmp_path).checkpoint(1), {"optim": state})
    assert state["lr"] == 0.5
    assert state["new"] == 3
    assert torch.equal(state["w"], torch.ones(2))
    assert loaded.notes == ["'optim.old' of the checkpoint is not used", "'optim.new' is not in the checkpoint and keeps its value"]


def test_evaluation_reads_the_model_alone(tmp_path):
    checkpoints, run = saved(tmp_path, 1)
    fresh = Run()
    checkpoints.load(RunDir(tmp_path).checkpoint(1), {"model": fresh.state()["model"]})
    assert all(torch.equal(a, b) for a, b in zip(fresh.net.parameters(), run.net.parameters(), strict=True))


# ---- what does not fit


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"w": torch.zeros(3)}, "'model.w' has shape \\(2,\\) in the checkpoint and \\(3,\\) in this run"),
        ({"w": torch.zeros(2, dtype=torch.bfloat16)}, "'model.w' is torch.float32 in the checkpoint and torch.bfloat16.*train.precision"),
        ({"w": torch.zeros(2), "v": torch.zeros(1)}, "'model.v' is not in the checkpoint"),
        ({}, "'model.w' is in the checkpoint but not in this run"),
    ],
)
def test_another_model_is_refused_by_key(tmp_path, state, message):
    checkpoints = manager(tmp_path)
    checkpoints.save(1, {"model": {"w": torch.ones(2)}})
    with pytest.raises(UserError, match=message):
        checkpoints.load(RunDir(tmp_path).checkpoint(1), {"model": state})


def _load_differing(folder: str) -> str:
    checkpoints = manager(folder)
    w = torch.zeros(2 + dist.get_rank())  # only rank 1 does not fit
    try:
        checkpoints.load(RunDir(folder).checkpoint(1), {"model": {"w": w}})
    except UserError as error:
        return str(error)
    return ""


def test_all_ranks_raise_what_one_finds(tmp_path):
    manager(tmp_path).save(1, {"model": {"w": torch.ones(2)}})
    messages = run_distributed(_load_differing, 2, str(tmp_path), timeout=30)
    assert messages[0] == messages[1]
    assert "'model.w' has shape (2,)" in messages[0]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"train": {"x": object()}}, "'train.x' \\(object\\) is neither"),
        ({"train": {"x": [torch.ones(1)]}}, "'train.x' \\(list\\) is neither"),
        ({"train": {3: 1}}, "'train.3' has a key of type int"),
        ({"a.b": {}}, "hold no '.'"),
        ({"a": {"b.c": torch.ones(1), "b": {"c": torch.ones(1)}}}, "two state entries have the name 'a.b.c'"),
    ],
)
def test_state_that_cannot_be_stored_is_refused_by_name(tmp_path, state, message):
    with pytest.raises(ValueError, match=message):
        manager(tmp_path).save(1, state)
    assert not (tmp_path / "checkpoints").exists(), "nothing was begun"


def _save_diverged(folder: str) -> str:
    try:
        manager(folder).save(1, {"optim": {"same": torch.ones(2), "step": torch.tensor(float(dist.get_rank()))}})
    except RunFailed as error:
        return str(error)
    return ""


def test_plain_tensors_that_differ_between_ranks_are_not_saved(tmp_path):
    for message in run_distributed(_save_diverged, 2, str(tmp_path), timeout=30):
        assert "'optim.step' is a plain tensor but differs between rank 0 and rank 1" in message
    assert os.listdir(tmp_path / "checkpoints") == []
