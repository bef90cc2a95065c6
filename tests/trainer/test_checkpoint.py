"""Checkpoints: exact on any number of ranks, whole or refused by name, never executed."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from models.errors import RunFailed, UserError
from tests.distributed import run_distributed
from trainer.checkpoint import CheckpointManager
from trainer.checkpoint_state import split_leaves
from trainer.config import CheckpointSection
from trainer.manifest import Manifest, hash_files, read_manifest, verify, write_manifest
from trainer.run_dir import RunDir

# ---- a small run: FSDP2 where there is a process group, plain otherwise


class Net(torch.nn.Module):
    """Sizes that no number of ranks divides; the last parameter has fewer rows than ranks."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(7, 7, dtype=dtype) for _ in range(2)])
        self.out = torch.nn.Linear(7, 2, dtype=dtype)

    def forward(self, x):
        for layer in self.layers:
            x = torch.nn.functional.gelu(layer(x))
        return self.out(x)


class Run:
    """Model and optimizer with the Engine's form of state."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.net = Net(dtype)
        if dist.is_initialized():
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for layer in self.net.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        for parameter in self.net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    def step(self, number: int) -> None:
        """The same whole batch on every rank, so that the gradient does not depend on the number of ranks' split."""
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(number), dtype=torch.float64).to(self.dtype)
        self.optimizer.zero_grad()
        self.net(x).pow(2).sum().backward()
        self.optimizer.step()

    def state(self) -> dict:
        optim = {f"{n}.{k}": v for n, p in self.net.named_parameters() for k, v in self.optimizer.state[p].items()}
        return {"model": dict(self.net.named_parameters()), "optim": optim}

    def whole(self) -> dict[str, torch.Tensor]:
        tensors, _ = split_leaves(self.state())
        return {k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for k, v in tensors.items()}


class Progress:
    """A Stateful that holds JSON values."""

    def __init__(self, **values) -> None:
        self.values = values

    def state_dict(self):
        return self.values

    def load_state_dict(self, state_dict):
        self.values = state_dict


def manager(folder: Path | str, **settings) -> CheckpointManager:
    return CheckpointManager(RunDir(folder), CheckpointSection(**settings), config_hash="cafe")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def saved(folder: Path, *steps: int, **settings) -> tuple[CheckpointManager, Run]:
    """A plain one-process run saved at ``steps``."""
    run, checkpoints = Run(), manager(folder, **settings)
    for step in steps:
        run.step(step)
        checkpoints.save(step, {**run.state(), "train": Progress(step=step)})
    return checkpoints, run


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
    assert os.listdir(tmp_path / "checkpoints") == []


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


# ---- damage


def _files(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_any_flipped_bit_is_refused_by_name_and_the_older_one_taken(tmp_path):
    checkpoints, _ = saved(tmp_path, 1, 2)
    path = RunDir(tmp_path).checkpoint(2)
    assert _files(path) == [".metadata", "__0_0.distcp", "manifest.json", "rank_00000.json", "train_state.json"]
    rng = random.Random(0)
    for name in _files(path):
        data = (path / name).read_bytes()
        for _ in range(40):
            flipped = bytearray(data)
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            (path / name).write_bytes(flipped)
            problems = checkpoints.problems(path)
            assert len(problems) == 1
            assert problems[0].startswith(f"{name}: ")
        good = checkpoints.latest_good()
        assert good is not None
        assert good.step == 1
        assert str(good.refused[0]).startswith(f"step_00000002: {name}: ")
        with pytest.raises(UserError, match=f"step_00000002.*is damaged.*{name}"):
            checkpoints.load(path, {})
        (path / name).write_bytes(data)
    assert checkpoints.problems(path) == []


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "manifest.json", "rank_00000.json", "train_state.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_missing_and_truncated_files_are_refused_by_name(tmp_path, name, damage):
    checkpoints, _ = saved(tmp_path, 1, 2)
    path = RunDir(tmp_path).checkpoint(2) / name
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1 if damage == "truncated" else 0)
    good = checkpoints.latest_good()
    assert good is not None
    assert (good.step, [problem.partition(":")[0] for problem in good.refused[0].problems]) == (1, [name])


def test_never_from_zero_when_all_are_bad(tmp_path):
    checkpoints, _ = saved(tmp_path, 1, 2)
    assert manager(tmp_path / "new").latest_good() is None
    for step in (1, 2):
        (RunDir(tmp_path).checkpoint(step) / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"intact: step_00000002: __0_0.distcp: No such file.*step_00000001: __0_0.distcp"):
        checkpoints.latest_good(set_aside=True)
    assert RunDir(tmp_path).checkpoint_steps() == [1, 2]


def test_a_damaged_step_set_aside_can_be_saved_again(tmp_path):
    checkpoints, run = saved(tmp_path, 1, 2)
    for _ in range(2):
        (RunDir(tmp_path).checkpoint(2) / "train_state.json").unlink()
        assert (good := checkpoints.latest_good(set_aside=True)) is not None
        assert good.step == 1
        checkpoints.save(2, run.state())
    assert {".damaged-step_00000002", ".damaged-step_00000002-2", "step_00000002"} <= set(os.listdir(tmp_path / "checkpoints"))


def _damage_seen_by_ranks(folder: str) -> tuple:
    checkpoints = manager(folder)
    good = checkpoints.latest_good()
    return good, checkpoints.problems(RunDir(folder).checkpoint(2))


def test_ranks_share_the_check_and_agree(tmp_path):
    _, run = saved(tmp_path, 1, 2)
    path = RunDir(tmp_path).checkpoint(2)
    for name in ("__0_0.distcp", ".metadata", "rank_00000.json"):
        data = bytearray((path / name).read_bytes())
        data[0] ^= 1
        (path / name).write_bytes(data)
    results = run_distributed(_damage_seen_by_ranks, 3, str(tmp_path))
    assert all(result == results[0] for result in results)
    assert results[0][0].step == 1
    assert sorted(line.partition(":")[0] for line in results[0][1]) == [".metadata", "__0_0.distcp", "rank_00000.json"]


# ---- nothing is executed


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def _reseal(path: Path) -> None:
    """A manifest that agrees with whatever is in the directory: what somebody with write access can do."""
    old = read_manifest(path)
    write_manifest(path, Manifest(old.step, old.world_size, "", {}, hash_files(path, [n for n in _files(path) if n != "manifest.json"])))
    assert verify(path) == []


def _metadata_with(path: Path, **changes):
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for key, value in changes.items():
        setattr(metadata, key, value)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    _reseal(path)


def test_a_pickle_bomb_with_a_consistent_manifest_does_not_go_off(tmp_path):
    checkpoints, run = saved(tmp_path, 1, 2)
    path, canary = RunDir(tmp_path).checkpoint(2), tmp_path / "canary"
    bombs = [
        pickle.dumps(Bomb(canary)),
        pickle.dumps({"state_dict_metadata": Bomb(canary)}, protocol=0),
        b"cbuiltins\neval\n(S'open(\"" + str(canary).encode() + b'", "w")\'\ntR.',
        b"ctorch.serialization\nload\n(S'x'\ntR.",
        b"ctorch.distributed.checkpoint.metadata\nos.system\n(S'touch " + str(canary).encode() + b"'\ntR.",
    ]
    for bomb in bombs:
        (path / ".metadata").write_bytes(bomb)
        _reseal(path)
        good = checkpoints.latest_good()
        assert good is not None
        assert (good.step, len(good.refused)) == (1, 1)
        assert good.refused[0].problems[0].startswith(".metadata is refused: it names ")
        with pytest.raises(UserError, match="metadata is refused"):
            checkpoints.load(path, run.state())
    _metadata_with(RunDir(tmp_path).checkpoint(1), planner_data=Bomb(canary))
    with pytest.raises(UserError, match="names posix.system"):
        checkpoints.latest_good()
    assert not canary.exists()
    assert pickle.loads(bombs[0]) == 0
    assert canary.exists(), "the bomb is a real one"


def test_a_bomb_in_place_of_a_tensor_does_not_go_off(tmp_path):
    """The bytes of one tensor inside a .distcp file become a pickle: read with weights_only, so refused."""
    checkpoints = manager(tmp_path)
    checkpoints.save(1, {"model": {"w": torch.zeros(1000)}})
    path, canary = RunDir(tmp_path).checkpoint(1), tmp_path / "canary"
    torch.save(Bomb(canary), tmp_path / "bomb")
    data = (tmp_path / "bomb").read_bytes()
    size = (path / "__0_0.distcp").stat().st_size
    (path / "__0_0.distcp").write_bytes(data)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        assert info.length == size
        info.length = len(data)
    _metadata_with(path, storage_data=metadata.storage_data)
    with pytest.raises(RunFailed, match="weights_only|Weights only"):
        checkpoints.load(path, {"model": {"w": torch.zeros(1000)}})
    assert not canary.exists()


def test_metadata_that_point_elsewhere_or_hold_objects_are_refused(tmp_path):
    checkpoints = manager(tmp_path)
    checkpoints.save(1, {"model": {"w": torch.zeros(4)}})
    path = RunDir(tmp_path).checkpoint(1)
    original = pickle.loads((path / ".metadata").read_bytes())
    for name in ("../../secret", "/etc/passwd", "manifest.json"):
        storage = pickle.loads(pickle.dumps(original.storage_data))
        for info in storage.values():
            info.relative_path = name
        _metadata_with(path, storage_data=storage)
        assert "points to" in checkpoints.problems(path)[0]
    _metadata_with(path, storage_data={})
    assert "does not hold the whole of 'model.w'" in checkpoints.problems(path)[0]
    tensors = original.state_dict_metadata
    _metadata_with(path, storage_data=original.storage_data, state_dict_metadata={"model.w": dcp.metadata.BytesStorageMetadata()})
    assert "'model.w' as a pickled object" in checkpoints.problems(path)[0]
    _metadata_with(path, state_dict_metadata=tensors)
    assert checkpoints.problems(path) == []


def test_torchs_own_reader_can_read_what_is_written(tmp_path):
    _, run = saved(tmp_path, 1)
    target = {"model.out.bias": torch.zeros(2)}
    dcp.load(target, checkpoint_id=str(RunDir(tmp_path).checkpoint(1)), no_dist=True)
    assert torch.equal(target["model.out.bias"], run.net.out.bias)


# ---- saving


def test_an_existing_step_is_never_overwritten(tmp_path):
    checkpoints, run = saved(tmp_path, 1)
    before = {name: (RunDir(tmp_path).checkpoint(1) / name).read_bytes() for name in _files(RunDir(tmp_path).checkpoint(1))}
    with pytest.raises(RunFailed, match="step_00000001 exists already and is not overwritten"):
        checkpoints.save(1, run.state())
    assert before == {name: (RunDir(tmp_path).checkpoint(1) / name).read_bytes() for name in _files(RunDir(tmp_path).checkpoint(1))}


def test_retention(tmp_path):
    _, run = saved(tmp_path, *range(1, 10), keep_last=2, keep_every_steps=4)
    assert RunDir(tmp_path).checkpoint_steps() == [4, 8, 9]
    checkpoints = manager(tmp_path, keep_last=3)
    checkpoints.save(10, run.state())
    assert RunDir(tmp_path).checkpoint_steps() == [8, 9, 10]
    assert all(verify(RunDir(tmp_path).checkpoint(step)) == [] for step in (8, 9, 10))
    assert [name for name in os.listdir(tmp_path / "checkpoints") if name.startswith(".")] == []


def test_a_failed_deletion_costs_a_warning_not_the_run(tmp_path, monkeypatch):
    checkpoints, run = saved(tmp_path, 1, 2)
    real = shutil.rmtree

    def stuck(path, *args, **kwargs):
        if Path(path).name.startswith(".trash") and not kwargs.get("ignore_errors"):
            (Path(path) / ".metadata").unlink()
            raise OSError(16, "Device or resource busy")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", stuck)
    with pytest.warns(RuntimeWarning, match="cannot delete old checkpoint.*step_00000001.*busy"):
        checkpoints.save(3, run.state())
    monkeypatch.undo()
    assert RunDir(tmp_path).checkpoint_steps() == [2, 3]
    assert checkpoints.clean() == [".trash-step_00000001"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000002", "step_00000003"]


class _FullDisk(CheckpointManager):
    """Rank 1 (or a single process) finds the disk full in the middle of its file."""

    def _storage_writer(self, folder):
        writer = super()._storage_writer(folder)
        if self.ranks.rank == self.ranks.size - 1:
            writer.fs.create_stream = _full  # type: ignore[method-assign]
        return writer


def _full(path, mode):
    Path(path).write_bytes(b"some")
    raise OSError(28, "No space left on device", str(path))


def _save_on_full_disk(folder: str, asynchronous: bool) -> list[str]:
    run_dir = RunDir(folder)
    messages = []
    checkpoints = _FullDisk(run_dir, CheckpointSection(asynchronous=asynchronous))
    run = Run()
    for step in (1, 2):
        try:
            checkpoints.save(step, run.state())
            checkpoints.wait()
        except RunFailed as error:
            messages.append(str(error))
    return [*messages, *(os.listdir(run_dir.checkpoints) if checkpoints.ranks.rank == 0 else [])]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_ranks_full_disk_fails_the_save_on_all_and_leaves_nothing(tmp_path, asynchronous):
    for messages in run_distributed(_save_on_full_disk, 2, str(tmp_path), asynchronous, timeout=30):
        assert len(messages) == 2
        for step, message in enumerate(messages, 1):
            assert message.startswith(f"cannot save step_0000000{step}: rank 1: No space left on device")


def test_a_really_full_disk_keeps_the_previous_checkpoint(tiny_disk):
    run, checkpoints = Run(), manager(tiny_disk)
    checkpoints.save(1, run.state())
    with pytest.raises(RunFailed, match=r"cannot save step_00000002.*(No space|unexpected pos|write)"):
        checkpoints.save(2, {"model": {"w": torch.zeros(1_000_000)}})
    assert os.listdir(tiny_disk / "checkpoints") == ["step_00000001"]
    assert (good := checkpoints.latest_good()) is not None
    assert good.step == 1
    checkpoints.save(2, run.state())


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MiB."""
    import subprocess

    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("mount is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


# ---- in the background


class _Slow(CheckpointManager):
    """Waits before the tensors are written until told to go on."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.go = threading.Event()
        self.writing = 0
        self.most_writing = 0

    def _write_tensors(self, folder, content):
        self.writing += 1
        self.most_writing = max(self.most_writing, self.writing)
        assert self.go.wait(30)
        super()._write_tensors(folder, content)
        self.writing -= 1


def _async_while_training(folder: str) -> dict:
    checkpoints = _Slow(RunDir(folder), CheckpointSection(asynchronous=True))
    run = Run(torch.float64)
    progress = {"step": 1, "cursor": {"document": 4}}
    run.step(1)
    before = run.whole()
    checkpoints.save(1, {**run.state(), "train": progress})
    assert RunDir(folder).checkpoint_steps() == []
    progress["cursor"]["document"] = 99
    for step in range(2, 6):  # collectives of training while the save waits and then uses its own group
        run.step(step)
        if step == 3:
            checkpoints.go.set()
    second = run.whole()
    checkpoints.save(5, {**run.state(), "train": progress})
    run.step(6)
    checkpoints.close()
    assert checkpoints.most_writing == 1
    fresh, train = Run(torch.float64), Progress()
    checkpoints.load(RunDir(folder).checkpoint(1), {**fresh.state(), "train": train})
    first_ok = same(fresh.whole(), before)
    checkpoints.load(RunDir(folder).checkpoint(5), {"model": fresh.state()["model"], "optim": fresh.state()["optim"]})
    return {"first": first_ok, "second": same(fresh.whole(), second), "train": train.values}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_background_save_holds_the_values_of_its_moment(tmp_path, ranks):
    for result in run_distributed(_async_while_training, ranks, str(tmp_path), timeout=60):
        assert result == {"first": True, "second": True, "train": {"step": 1, "cursor": {"document": 4}}}


def test_background_save_without_a_process_group(tmp_path):
    checkpoints = _Slow(RunDir(tmp_path), CheckpointSection(asynchronous=True))
    tensor = torch.zeros(5)
    parameter = torch.nn.Parameter(tensor)
    parameter.grad = torch.zeros(5)
    step = torch.tensor(3.0)
    checkpoints.save(1, {"model": {"w": tensor, "p": parameter, "step": step}})
    tensor += 1
    step += 1
    checkpoints.go.set()
    checkpoints.wait()
    state = {"w": torch.ones(5), "p": torch.ones(5), "step": torch.zeros(())}
    checkpoints.load(RunDir(tmp_path).checkpoint(1), {"model": state})
    assert torch.equal(state["w"], torch.zeros(5))
    assert torch.equal(state["p"], torch.zeros(5))
    assert state["step"] == 3


def test_an_error_in_the_background_surfaces_once(tmp_path):
    checkpoints = _FullDisk(RunDir(tmp_path), CheckpointSection(asynchronous=True))
    checkpoints.save(1, {"model": {"w": torch.ones(2)}})
    deadline = time.monotonic() + 20
    while checkpoints.failure is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "No space left" in str(checkpoints.failure)
    with pytest.raises(RunFailed, match="No space left"):
        checkpoints.save(2, {"model": {"w": torch.ones(2)}})
    assert checkpoints.failure is None
    checkpoints.close()
    assert os.listdir(tmp_path / "checkpoints") == []


def test_a_group_that_is_not_gloo_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    with pytest.raises(ValueError, match="gloo process group of their own"):
        CheckpointManager(RunDir("x"), CheckpointSection(), process_group=object())  # type: ignore[arg-type]


def test_no_warning_about_a_missing_process_group(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys, torch; from trainer.checkpoint import CheckpointManager, CheckpointSection, RunDir\n"
        "m = CheckpointManager(RunDir(sys.argv[1]), CheckpointSection()); w = torch.ones(2)\n"
        "m.save(1, {'model': {'w': w}}); m.load(m.latest_good(), {'model': {'w': w}})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, check=True
    )
    assert "torch.distributed is disabled" not in done.stderr


def test_json_documents_are_json(tmp_path):
    checkpoints, _ = saved(tmp_path, 1)
    assert json.loads((RunDir(tmp_path).checkpoint(1) / "train_state.json").read_text())["train"] == {"step": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.latest_good() is not None
