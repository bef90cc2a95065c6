"""The GPU benchmark's own code runs: tiny, on the CPU, to the end, with results that are written whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_attention


def test_smoke_measures_every_kernel_and_streams_keys_exactly(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert gpu_attention.main(smoke=True, out=tmp_path) == 0
    report = json.loads((tmp_path / "gpu_attention.json").read_text())
    assert report["kernels"]["cudnn"] == {"128": {"failed": report["kernels"]["cudnn"]["128"]["failed"]}}
    assert "it runs on CUDA only" in report["kernels"]["cudnn"]["128"]["failed"]
    assert set(report["kernels"]["flash_cpu"]) == set(report["kernels"]["plain"]) == {"128", "256"}
    assert all(row["forward_share"] > 0 and row["backward_flops"] > 0 for row in report["kernels"]["plain"].values())
    for length, row in report["streamed"].items():
        keys = 2 * int(length) * 2 * 32 * 4
        assert row["difference"] < 1e-5 and row["copied_bytes"] == 2 * 3 * keys, "out once and in twice, in two steps"
    page = (tmp_path / "gpu_attention.md").read_text()
    assert "| plain | 256 |" in page and "| 512 |" in page and page.splitlines()[0] == "# Attention on one GPU"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu_attention.json", "gpu_attention.md"]


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_attention.main(smoke=False, out=None) == 2
    assert "no CUDA GPU here; --smoke" in capsys.readouterr().err
    assert gpu_attention.main(smoke=True, out=tmp_path / "none") == 2
    assert "no such directory" in capsys.readouterr().err
