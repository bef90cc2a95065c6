"""``--explain``: the scheme and the kernels of a configuration, with the reasons, before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from longstride import main
from models.memory import kernel_choice
from trainer.config import RunConfig
from trainer.explain import explain_run


def _config(precision: str = "bf16", deterministic: bool = True, layers: tuple[str, ...] = ("swa", "full")) -> RunConfig:
    model = {"d_model": 256, "n_heads": 2, "layers": list(layers), "window": 64}
    train = {"precision": precision, "deterministic": deterministic}
    return RunConfig.model_validate({"model": model, "data": {"seq_len": 512}, "parallel": {"cp": 2}, "train": train})


def _chosen(lines: list[str]) -> dict[str, str]:
    return {line.split("(")[1].split(")")[0]: line.rsplit(": ", 1)[1] for line in lines if line.startswith("  ") and line[2] != " "}


def test_kernels_follow_device_dtype_mask_and_determinism() -> None:
    assert set(_chosen(explain_run(_config(), "cpu")).values()) == {"flash_cpu"}
    assert _chosen(explain_run(_config(), "h100")) == {
        "causal": "flash_cuda", "none": "flash_cuda", "dense": "efficient_cuda", "band": "flash_cuda"}  # fmt: skip
    free = explain_run(_config(deterministic=False), "h100")
    assert _chosen(free) == {"causal": "cudnn", "none": "cudnn", "dense": "efficient_cuda", "band": "flash_cuda"}
    assert "      not cudnn: is not used for a band mask" in free
    assert _chosen(explain_run(_config(deterministic=False), "a100-80"))["causal"] == "flash_cuda"
    assert _chosen(explain_run(_config(precision="fp32"), "b200"))["causal"] == "efficient_cuda"


def test_scheme_and_layers_are_named() -> None:
    lines = explain_run(_config(), "h100")
    assert lines[0] == "attention layers: 1 full, 1 swa; 2 query heads, 2 key/value heads"
    assert lines[1] == "sequence: ring over 2 ranks (a window that a shard holds: the keys before it), layout zigzag"
    lines = explain_run(_config(layers=("memory",)), "cpu")
    memory = ["memory layers, model.memory.kernel auto: gated_delta_rule: eager", "      not fla: runs on CUDA only"]
    assert lines == ["attention: no layer has any", *memory]


def test_the_kernel_of_memory_layers_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "_installed", lambda: "0.6.0")
    layers = ("memory", "swa")
    assert explain_run(_config(deterministic=False, layers=layers), "h100")[-1].endswith("kernel auto: gated_delta_rule: fla")
    assert "its block sizes by timing" in explain_run(_config(layers=layers), "h100")[-1]
    monkeypatch.setattr(kernel_choice, "_installed", lambda: "")
    reason = explain_run(_config(deterministic=False, layers=layers), "h100")[-1]
    assert reason == "      not fla: the package flash-linear-attention is not installed"


def test_a_named_kernel_is_refused_before_anything_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    named = "model.memory.kernel=fla"
    assert main(["train", "quickstart", named]) == 2 and "it runs on CUDA only; use auto or eager" in capsys.readouterr().err
    assert main(["plan", "quickstart", "--device", "h100", named]) == 2
    assert "set train.deterministic=false, or use auto or eager" in capsys.readouterr().err
    free = ["train.deterministic=false", "train.precision=bf16"]
    assert main(["plan", "quickstart", "--device", "h100", named, *free, "memory.plan=estimate"]) == 2
    assert "model.memory.kernel: fla takes fla's kernels, and memory.plan estimate" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_nothing_is_started(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([verb, "debug_cpu", "--explain"]) == 0
    assert "flash_cpu" in capsys.readouterr().out and not list(tmp_path.iterdir())
