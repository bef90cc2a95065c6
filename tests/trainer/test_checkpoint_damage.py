"""Checkpoints: whole or refused by name, never executed."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from models.errors import RunFailed, UserError
from tests.distributed import run_distributed
from tests.trainer.small_run import files, manager, saved
from trainer.manifest import Manifest, hash_files, read_manifest, verify, write_manifest
from trainer.run_dir import RunDir

# ---- damage


def test_any_flipped_bit_is_refused_by_name_and_the_older_one_taken(tmp_path):
    checkpoints, _ = saved(tmp_path, 1, 2)
    path = RunDir(tmp_path).checkpoint(2)
    assert files(path) == [".metadata", "__0_0.distcp", "manifest.json", "rank_00000.json", "train_state.json"]
    rng = random.Random(0)
    for name in files(path):
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
    write_manifest(path, Manifest(old.step, old.world_size, "", {}, hash_files(path, [n for n in files(path) if n != "manifest.json"])))
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
