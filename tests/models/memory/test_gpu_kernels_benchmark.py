"""The GPU benchmark of memory kernels: its own code runs, tiny, on the CPU, to the end, with results that are written whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_memory_kernels


def test_smoke_measures_every_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert gpu_memory_kernels.main(smoke=True, out=tmp_path) == 0
    rows = json.loads((tmp_path / "gpu_memory_kernels.json").read_text())["rows"]
    eager, fla = ([row for row in rows if row["kernel"] == name] for name in ("eager", "fla"))
    assert len(eager) == len(fla) == 12 and {row["kind"] for row in rows} == {"gated_deltanet", "mamba2", "gsa"}
    assert all(row["seconds"] > 0 and 1e-6 < row["difference"] < 3e-2 for row in eager), "bfloat16 products against float32"
    assert all("it runs on CUDA only" in row["failed"] for row in fla)
    page = (tmp_path / "gpu_memory_kernels.md").read_text()
    assert "| gsa | 192 | packed | eager |" in page and "`auto`, mamba2: decayed_sum: eager; not fla: runs on CUDA only" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu_memory_kernels.json", "gpu_memory_kernels.md"]


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_memory_kernels.main(smoke=False, out=None) == 2
    assert "no CUDA GPU here; --smoke" in capsys.readouterr().err
    assert gpu_memory_kernels.main(smoke=True, out=tmp_path / "none") == 2
    assert "no such directory" in capsys.readouterr().err
