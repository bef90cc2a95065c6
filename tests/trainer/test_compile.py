"""``train.compile``: the same losses and gradients to rounding, alone and over ranks; what is left, refused or told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch.distributed.tensor import DTensor

from models.batch import Batch, Bounds
from models.compiled import compile_blocks
from models.errors import UserError
from tests.distributed import run_distributed
from trainer import resume_rules
from trainer.build import build_engine, mesh_for
from trainer.compile_rules import announced, check_compiler, compile_lines, compiled_layers, plan_note
from trainer.config import RunConfig
from trainer.tracing import TraceRequest

T, VOCAB = 32, 64


def config(compile: str = "none", layers: tuple[str, ...] = ("full", "swa"), **sections: Any) -> RunConfig:
    model = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "layers": list(layers), "window": 6, "qk_norm": True, "qkv_bias": True}
    train = {"device": "cpu", "compile": compile} | sections.pop("train", {})
    model |= sections.pop("model", {})
    return RunConfig.model_validate({"model": model, "data": {"seq_len": T}, "train": train} | sections)


def one_step(settings: RunConfig, backend: str | None) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss in nats, gradients by name, and graphs compiled; two micro-batches of other documents, then held-out loss."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    device = torch.device("cpu")
    engine = build_engine(settings, VOCAB, mesh_for(settings, device), device)
    if backend:
        compile_blocks(engine.model, compiled_layers(settings), backend)
    tokens_BT = torch.randint(VOCAB, (1, T), generator=torch.Generator().manual_seed(0))
    batches = []
    for start in (9, 20):
        positions = torch.cat([torch.arange(start), torch.arange(T - start)])[None]
        batches.append(Batch(tokens_BT, tokens_BT.roll(-1, 1), positions, Bounds(T, ((0, T),), ((0, start),))))
    sums = engine.forward_backward(batches)
    found = {name: p.grad for name, p in engine.model.named_parameters() if p.grad is not None}
    return sums.loss, {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}, graphs()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def assert_same(
    got: tuple[float, dict[str, torch.Tensor], int], want: tuple[float, dict[str, torch.Tensor], int], tolerance: float
) -> None:
    assert got[0] == pytest.approx(want[0], abs=tolerance) and got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=0, atol=tolerance)


def test_inductor_gives_losses_and_gradients_to_rounding_with_one_pair_of_graphs() -> None:
    plain, compiled = one_step(config(), None), one_step(config("block"), "inductor")
    assert_same(compiled, plain, 1e-6)
    assert (plain[2], compiled[2]) == (0, 2)  # of both layers and both micro-batches


def both_ways(precision: str) -> tuple[Any, Any]:
    """One step on all ranks, plain and with blocks that are captured and differentiated as whole graphs but not made into kernels."""
    sections = {"train": {"precision": precision}, "parallel": {"cp": dist.get_world_size(), "layout": "zigzag"}}
    return one_step(config(**sections), None), one_step(config("block", **sections), "aot_eager")


def test_over_ranks_graphs_are_whole_and_gradients_the_same() -> None:
    for plain, compiled in run_distributed(both_ways, 2, "fp64"):
        assert_same(compiled, plain, 1e-12)
        assert compiled[2] == 2


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"memory": {"recompute": "block"}}, "memory.recompute block .* set memory.recompute=none, or train.compile=none"),
        ({"memory": {"ffn_tile_tokens": 8}}, "memory.ffn_tile_tokens 8"),
        ({"memory": {"offload": "inputs"}}, "memory.offload inputs"),
        ({"memory": {"quantise": "feed_forward"}}, "memory.quantise feed_forward"),
        ({"memory": {"offload_parameters": "host", "offload_optimizer": "host"}}, "memory.offload_parameters"),
        ({"parallel": {"tp": 2}}, "parallel.tp exchanges .* set parallel.tp=1"),
        ({"parallel": {"kv_residence": "host"}}, "parallel.kv_residence host"),
        ({"engine": "deepspeed"}, "engine deepspeed"),
        (
            {"optim": {"weights": "bf16", "preset": "adamw_8bit", "gradients": "fp32"}, "train": {"precision": "bf16"}},
            "optim.gradients fp32",
        ),
        ({"optim": {"fuse_backward": True, "clip_norm": None}}, "optim.fuse_backward"),
        ({"layers": ("memory",)}, "no layer of attention"),
    ],
)
def test_refused_by_name_and_auto_says_why_nothing_is_compiled(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=f"train.compile block: .*{words}"):
        config("block", **sections)
    left = config("auto", **sections)
    assert compiled_layers(left) == () and compile_lines(left)[0].startswith("compiled: no block") and not plan_note(left)


def test_layers_that_stay_as_they_are_are_named_and_plan_and_trace_know() -> None:
    mixed = config("block", ("full", "memory", "swa"))
    assert compiled_layers(mixed) == (0, 2)
    first, second = compile_lines(mixed)
    assert first.startswith("compiled: layers 0, 2, before and after attention") and "layers 1 (memory layers" in second
    assert plan_note(mixed).startswith("2 blocks; ")
    assert compile_lines(config()) == [] and not plan_note(config())
    assert TraceRequest(mixed, VOCAB, "cpu").to_dict()["config"]["train"]["compile"] == "auto"


def test_a_resumed_run_may_switch_and_is_told() -> None:
    resume_rules.check(config(), config("block"))
    assert "not bit for bit" in announced(config(), config("block"))[0] and not announced(config("auto"), config("block"))


def test_without_a_compiler_it_is_refused_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    check_compiler(config("block"))
    monkeypatch.setenv("PATH", "/nonexistent")
    check_compiler(config())
    with pytest.raises(UserError, match=r"train.compile auto needs a C\+\+ compiler.* set train.compile=none"):
        check_compiler(config("auto"))
