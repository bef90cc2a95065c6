"""What cannot combine with ``engine: deepspeed`` is refused by name with the remedy; what ZeRO holds is in the plan."""

from __future__ import annotations

import importlib.metadata
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from memory_mgmt.plan import MemoryPlan, Moment, Term
from models.errors import UserError
from trainer import resume_rules
from trainer.commands.open_run import check_engine
from trainer.config import RunConfig
from trainer.engine_config import DeepSpeedSection
from trainer.zero_plan import CPU_MODULES, with_zero


def config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate(sections)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"optim": {"preset": "galore"}}, "optim.preset galore .* set optim.preset adamw, or engine native"),
        ({"optim": {"preset": "auto"}}, "optim.preset auto .* set optim.preset adamw"),
        ({"optim": {"weights": "bf16"}, "train": {"precision": "bf16"}}, "optim.weights bf16.* leave optim.weights null"),
        ({"optim": {"fuse_backward": True, "fused_clip": "previous"}}, "optim.fuse_backward"),
        ({"train": {"precision": "fp64"}}, "train.precision fp64.* set train.precision fp32 or bf16"),
        ({"memory": {"offload_optimizer": "host"}}, "memory.offload_optimizer host .* deepspeed.offload_optimizer cpu"),
        (
            {"memory": {"offload_optimizer": "auto", "offload_parameters": "auto"}},
            "memory.offload_optimizer auto .* deepspeed.offload_optimizer cpu",
        ),
        ({"memory": {"recompute": "auto"}}, "memory.recompute auto .* set memory.recompute none, mixer or block"),
        ({"memory": {"plan": "estimate"}}, "memory.plan estimate"),
        ({"memory": {"arena": True}}, "memory.arena"),
        ({"parallel": {"dp_shard": "auto"}}, "parallel.dp_shard auto .* give a number"),
        ({"parallel": {"dp_replicate": 2, "dp_shard": 3}}, "parallel.dp_replicate 2.* parallel.dp_shard 6"),
        (
            {"model": {"layers": ["full"]}, "parallel": {"tp": 2, "dp_shard": 3}},
            "parallel.tp 2.* set parallel.tp 1 and parallel.dp_shard 6",
        ),
        ({"model": {"layers": ["full"]}, "parallel": {"kv_residence": "host"}}, "parallel.kv_residence host.* set .* device"),
        (
            {"train": {"carry_state": "document"}, "data": {"shuffle": "none"}, "model": {"layers": ["memory"]}},
            "train.carry_state document",
        ),
        (
            {"model": {"layers": ["full"], "feedforward": ["product_keys"]}, "optim": {"preset": "adamw_8bit"}},
            "optim.preset adamw_8bit",
        ),
    ],
)
def test_refused_by_name(sections: dict[str, Any], words: str) -> None:
    config(**sections)  # lawful with the native engine
    with pytest.raises(ValidationError, match=f"engine deepspeed: {words}"):
        config(engine="deepspeed", **sections)


def test_memories_around_the_stack_are_refused_by_name() -> None:
    segments: dict[str, Any] = {"model": {"layers": ["full"], "memory": {"kind": "rmt"}}}
    config(**segments)
    with pytest.raises(ValidationError, match="engine deepspeed runs whole sequences, and rmt runs segments; set engine native"):
        config(engine="deepspeed", **segments)


def test_settings_that_nobody_would_read_are_refused() -> None:
    with pytest.raises(ValidationError, match="deepspeed.stage is read with engine deepspeed"):
        config(deepspeed={"stage": 1})
    with pytest.raises(ValidationError, match="offload_parameters cpu .* stage 2 has none of: set stage 3"):
        config(engine="deepspeed", deepspeed={"stage": 2, "offload_parameters": "cpu"})


def test_a_resumed_run_may_have_the_other_engine() -> None:
    resume_rules.check(config(), config(engine="deepspeed", deepspeed={"stage": 2}))


def test_a_missing_or_unknown_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UserError, match="deepspeed is not installed; .*-m pip install"):
        check_engine(config(engine="deepspeed"))
    check_engine(config())
    for found in ("0.17.2", "0.19.7", "0.20.0", "1.0"):
        monkeypatch.setattr(importlib.metadata, "version", lambda _, found=found: found)
        with pytest.raises(UserError, match=f"deepspeed {found} is installed.*pip install 'deepspeed>=0.19.8,<0.20'"):
            check_engine(config(engine="deepspeed"))
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.19.12+cu130")
    check_engine(config(engine="deepspeed"))
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["deepspeed"] == ["deepspeed>=0.19.8,<0.20"]


N, RANKS = 1003, 4
SHARE = 4 * math.ceil(N / RANKS)


def planned(cuda: bool, gradients: int = 0, gathered: int = 0, **asked: Any) -> MemoryPlan:
    """A step of FSDP2 with so many bytes of gradients at the peak, corrected."""
    terms = (
        Term("parameters", "parameters", SHARE, SHARE),
        Term("gradients", "gradients", gradients, SHARE),
        Term("optimizer states", "optimizer", 2 * SHARE, 2 * SHARE),
        Term("gathered parameters and messages", "communication", gathered, gathered),
    )
    moments = (Moment("forward", sum(term.bytes for term in terms)), Moment("update", 3 * SHARE))
    plan = MemoryPlan("traced step", "h100" if cuda else "cpu", RANKS, terms, moments, None, None)
    return with_zero(plan, DeepSpeedSection(bucket_elements=100, **asked), N, RANKS, cuda)


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("gradients", [0, SHARE])
def test_every_stage_holds_what_zero_says(cuda: bool, gradients: int) -> None:
    """float32: 16 bytes per parameter in all, of which each stage shares more (arXiv 1910.02054, section 5), beside a bucket."""
    bucket = 4 * 100
    for stage, resident in ((1, 4 * N + SHARE + 2 * SHARE), (2, gradients + SHARE + 2 * SHARE), (3, SHARE + 2 * SHARE)):
        plan = planned(cuda, gradients, stage=stage)
        assert plan.peak_bytes == SHARE + resident + bucket + (0 if cuda else CPU_MODULES), stage
        assert plan.host_bytes == 0
        assert plan.moments[0].bytes == plan.peak_bytes


def test_what_is_offloaded_leaves_a_gpu_and_stays_on_a_cpu() -> None:
    gpu = planned(True, SHARE, stage=3, offload_optimizer="cpu", offload_parameters="cpu")
    assert gpu.by_kind().keys() == {"communication", "gradients"}
    assert gpu.host_bytes == (2 + 1 + 1 + 1) * SHARE  # states, parameters, the update's weights and gradients
    cpu = planned(False, SHARE, stage=3, offload_optimizer="cpu", offload_parameters="cpu")
    assert cpu.host_bytes == 0
    assert cpu.peak_bytes == gpu.peak_bytes + gpu.host_bytes + CPU_MODULES
    second = planned(True, SHARE, stage=2, offload_optimizer="cpu")
    assert second.host_bytes == (2 + 1 + 1 + 1) * SHARE  # states, weights, gradients, copies on their way back
    assert second.by_kind()["parameters"] == SHARE
