"""One rank of the DeepSpeed runs that tests/optim/test_zero.py starts: ``torchrun ... zero_run.py STAGE ...``."""

from __future__ import annotations

import sys
import tempfile

import deepspeed  # pyright: ignore[reportMissingImports]
import torch
import torch.distributed as dist

from optim.build import build_optimizer
from optim.zero import build_zero_optimizer
from tests.optim.test_driver import Tiny, make

RATE = {"lr": 1e-3, "eps": 1e-3, "weight_decay": 0.1}


def loss_of(model: torch.nn.Module, step: int, rank: int, ranks: int) -> torch.Tensor:
    ids = ((torch.arange(48) * (step + 3)) % 67).tensor_split(ranks)[rank]
    return torch.nn.functional.cross_entropy(model(ids), (ids + 1) % 67)


def engine_of(stage: int, preset: str) -> deepspeed.DeepSpeedEngine:
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # by default DeepSpeed clips to a norm of 1
        "steps_per_print": 10**6,
    }
    model = make()
    return deepspeed.initialize(model=model, optimizer=build_zero_optimizer(model, preset=preset, **RATE), config=settings)[0]


def train(engine: deepspeed.DeepSpeedEngine, steps: range) -> None:
    for step in steps:
        engine.backward(loss_of(engine, step, dist.get_rank(), dist.get_world_size()))
        engine.step()


def weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    model = engine.module
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def alone(preset: str, steps: int) -> Tiny:
    model = make()
    optimizer = build_optimizer(model, preset=preset, **RATE)
    for step in range(steps):
        loss_of(model, step, 0, 1).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def check(stage: int) -> None:
    exact = engine_of(stage, "adamw")
    train(exact, range(4))
    for name, value in alone("adamw", 4).named_parameters():
        torch.testing.assert_close(weights(exact)[name], value.detach(), rtol=1e-5, atol=1e-6)
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    few = engine_of(stage, "adamw_8bit")
    train(few, range(2))
    few.save_checkpoint(folder[0], tag="two")
    train(few, range(2, 4))
    again = engine_of(stage, "adamw_8bit")
    again.load_checkpoint(folder[0], tag="two")
    train(again, range(2, 4))
    assert all(torch.equal(value, weights(few)[name]) for name, value in weights(again).items())
    start, one = dict(make().named_parameters()), dict(alone("adamw_8bit", 4).named_parameters())
    for name, value in weights(few).items():
        assert (value - one[name]).norm() < 0.1 * (one[name] - start[name]).norm(), name
    print(f"stage {stage} as one process", flush=True)


def main(stages: list[int]) -> None:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for minutes, and not called in training
    deepspeed.init_distributed(dist_backend="gloo")
    for stage in stages:
        check(stage)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main([int(stage) for stage in sys.argv[1:]])
