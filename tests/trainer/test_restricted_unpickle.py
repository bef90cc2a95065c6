"""Metadata as other Python releases write it, and what must not run whatever they write."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from trainer.restricted_unpickle import RefusedMetadata, read_metadata


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    dcp.save({"weight": torch.arange(12.0).view(3, 4)}, checkpoint_id=str(tmp_path / "c"), no_dist=True)
    return tmp_path / "c"


def test_enum_members_as_python_before_3_11_4_pickles_them(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda member, _: (getattr, (type(member), member.name)))
    data = pickle.dumps(metadata)
    assert b"getattr" in data
    read = read_metadata(data, {path.name for path in saved.glob("*.distcp")})
    assert read.state_dict_metadata["weight"].size == torch.Size([3, 4])  # type: ignore[union-attr]


class _Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return _touch, (str(self.canary),)


def _touch(path: str) -> None:
    Path(path).touch()


def test_a_lookup_by_getattr_runs_nothing(saved: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    # getattr(<a class it may name>, "__init__")(...) and getattr on a module: calling what the lookup gave, or naming the module
    calls_the_result = b"cbuiltins\ngetattr\n(ctorch\nSize\nV__new__\ntR(Vx\ntR."
    names_a_module = b"cbuiltins\ngetattr\n(cos\nsystem\nVx\ntR."
    for data in (calls_the_result, names_a_module, pickle.dumps(_Bomb(canary)), b"cbuiltins\neval\n(V1\ntR."):
        with pytest.raises(RefusedMetadata):
            read_metadata(data, {"__0_0.distcp"})
    assert not canary.exists()
