"""Gradients of bfloat16 parameters that add up in float32 over the passes of a step, on one process and sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.batch import Batch, Bounds
from optim.clip import local_part
from optim.config import OptimConfig
from tests.distributed import run_distributed
from trainer.build import build_engine, mesh_for
from trainer.config import RunConfig
from trainer.engine import Engine

SEQ_LEN, VOCAB, PASSES = 32, 48, 24


def engine_of(dp_shard: int, gradients: str | None, weights: str) -> Engine:
    settings = RunConfig.model_validate(
        {
            "model": {"d_model": 64, "n_heads": 2, "layers": ["full"], "d_ff": 64},
            "data": {"seq_len": SEQ_LEN},
            "train": {"precision": "bf16", "device": "cpu"},
            "optim": {"preset": "adamw_8bit", "weights": weights, "gradients": gradients, "lr": 1e-3, "clip_norm": 0.5},
            "parallel": {"dp_shard": dp_shard},
        }
    )
    device = torch.device("cpu")
    return build_engine(settings, VOCAB, mesh_for(settings, device) if dp_shard > 1 else None, device)


def passes() -> list[Batch]:
    tokens = torch.randint(VOCAB, (PASSES, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(SEQ_LEN)[None]
    return [Batch(row[None], row[None].roll(-1, 1), positions, Bounds.whole(1, SEQ_LEN)) for row in tokens]


def gradients_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Whole, in the dtype in which they are kept."""
    kept: dict[str, Any] = {name: parameter.grad for name, parameter in engine.parameters.items() if parameter.grad is not None}
    return {name: (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone() for name, grad in kept.items()}


def summed(
    dp_shard: int, gradients: str | None, weights: str = "bf16_stochastic"
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Of one step's passes on all ranks together, and the parameters after the step."""
    engine = engine_of(dp_shard, gradients, weights)
    engine.forward_backward(passes()[engine.rank :: dp_shard])
    found = gradients_of(engine)
    norm = engine.step(1e-3)
    assert norm > 0
    after: dict[str, Any] = {name: local_part(p.detach()) for name, p in engine.parameters.items()}
    engine.forward_backward(passes()[engine.rank :: dp_shard])  # and again from none
    engine.step(1e-3)
    return found, {name: p.dequantised(torch.float32) if hasattr(p, "dequantised") else p.float() for name, p in after.items()}


def added_up(gradients: str, count: int = PASSES) -> dict[str, torch.Tensor]:
    """The same passes one by one, added in float64."""
    engine, total = engine_of(1, gradients, "bf16_stochastic"), dict[str, torch.Tensor]()
    for batch in passes()[:count]:
        engine._both_ways(batch, PASSES * SEQ_LEN)
        for name, gradient in gradients_of(engine).items():
            total[name] = total.get(name, torch.zeros_like(gradient, dtype=torch.float64)) + gradient.double()
        engine.optimizer.zero_grad(set_to_none=True)
    return total


def far(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative error of a tensor."""
    return max(float((found[name].double() - expected[name]).norm() / expected[name].norm()) for name in expected)


def on_two_ranks() -> Any:
    return [summed(2, "fp32")[0], {name: grad.dtype for name, grad in summed(2, None)[0].items()}]


def test_passes_add_up_in_float32_on_one_process_and_sharded() -> None:
    expected = added_up("fp32")
    # Of one pass a gradient is rounded once at most: 2^-9 of each element.
    assert far(added_up("bf16", 1), added_up("fp32", 1)) < 2**-9
    wide, _ = summed(1, "fp32")
    narrow, _ = summed(1, "bf16")
    assert {grad.dtype for grad in wide.values()} == {torch.float32} and {grad.dtype for grad in narrow.values()} == {torch.bfloat16}
    assert far(wide, expected) < 1e-6
    assert far(narrow, expected) > 1e-3
    for sharded, dtypes in run_distributed(on_two_ranks, 2):
        assert far(sharded, expected) < 1e-6
        assert {grad.dtype for grad in sharded.values()} == {torch.float32}
        assert set(dtypes.values()) == {torch.bfloat16}


def test_weights_in_eight_bits_and_24_take_wide_gradients() -> None:
    for weights in ("int8_stochastic", "bf16_24bit"):
        found, after = summed(1, "fp32", weights)
        assert {grad.dtype for grad in found.values()} == {torch.float32}
        assert all(bool(torch.isfinite(value).all()) for value in after.values())


def test_a_setting_without_bfloat16_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="gradients fp32 is of bfloat16 parameters"):
        OptimConfig(preset="adamw_8bit", gradients="fp32")
