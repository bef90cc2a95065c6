"""Checkpoints of tensor-parallel ranks: the same bits on the same mesh, and the whole of every tensor on any other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from models.batch import Batch, Bounds
from optim.driver import ComposedOptimizer
from optim.plan_collectives import collectives_of_step
from tests.distributed import run_distributed
from tests.optim.test_driver import MATRICES, NEAR
from trainer.build import build_engine, mesh_for
from trainer.checkpoint import CheckpointManager
from trainer.config import RunConfig
from trainer.engine import Engine
from trainer.initial_weights import fill_from
from trainer.run_dir import RunDir

VOCABULARY, TOKENS = 128, 32
MODEL = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "d_ff": 256, "layers": ["full", "memory"], "qkv_bias": True}


WHOLE = {name: own for name, own in MATRICES.items() if name != "lomo" and "weights" not in own}
"""Presets that update whole matrices, with settings of their own."""


def settings(preset: str, seed: int = 0, precision: str = "fp32", states: str = "none", **parallel: int) -> RunConfig:
    train = {"device": "cpu", "seed": seed, "precision": precision}
    sections = {"data": {"seq_len": TOKENS}, "train": train, "optim": {"preset": preset, "lr": 1e-2, **WHOLE.get(preset, {})}}
    return RunConfig.model_validate({"model": MODEL, **sections, "parallel": parallel, "memory": {"offload_optimizer": states}})


def engine_of(config: RunConfig, init_from: Path | None = None, checkpoints: CheckpointManager | None = None) -> Engine:
    device = torch.device("cpu")
    mesh = mesh_for(config, device) if dist.is_initialized() else None
    fill = None if init_from is None or checkpoints is None else lambda model: fill_from(str(init_from), model, checkpoints)
    return build_engine(config, VOCABULARY, mesh, device, fill=fill)


def step(engine: Engine, number: int) -> float:
    torch.manual_seed(number)
    tokens_BT = torch.randint(VOCABULARY, (1, TOKENS))
    batch = Batch(tokens_BT, tokens_BT.roll(-1, 1), torch.arange(TOKENS)[None], Bounds.whole(1, TOKENS))
    loss = engine.forward_backward([batch]).loss
    engine.step(1e-2)
    return loss


def whole(engine: Engine) -> dict[str, torch.Tensor]:
    """Parameters and states, each the whole tensor."""
    state = engine.state_dict()
    named = {f"{entry}.{name}": value for entry, values in state.items() for name, value in values.items()}
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for name, v in named.items()}


def on_two_ranks(folder: str, preset: str) -> dict:
    """Two steps on two tensor-parallel ranks, saved; what the next step is there, from the checkpoint there, and on two cp ranks."""
    checkpoints = CheckpointManager(RunDir(folder), settings(preset).checkpoint)
    trained = engine_of(settings(preset, tp=2))
    for number in range(2):
        step(trained, number)
    checkpoints.save(2, trained.state_dict())
    found = {"saved": whole(trained), "next": (step(trained, 2), whole(trained))}
    path = RunDir(folder).checkpoint(2)
    for name, config in (("tp", settings(preset, seed=1, tp=2)), ("cp", settings(preset, seed=1, cp=2))):
        other = engine_of(config)
        checkpoints.load(path, other.state_dict())
        found[name] = whole(other), (step(other, 2), whole(other))
    begun = engine_of(settings(preset, seed=1, tp=2), path, checkpoints)
    found["begun"] = {name: value for name, value in whole(begun).items() if name.startswith("model.")}
    checkpoints.close()
    return found


@pytest.mark.parametrize("preset", ["adamw", "adamw_8bit", "muon", "galore_8bit"])
def test_a_checkpoint_of_parts_is_that_of_the_whole(tmp_path: Path, preset: str) -> None:
    for found in run_distributed(on_two_ranks, 2, str(tmp_path), preset):
        saved, (loss, after) = found["saved"], found["next"]
        assert any(not torch.equal(saved[name], after[name]) for name in saved)
        for name in ("tp", "cp"):
            assert same(found[name][0], saved), f"what is loaded with {name} is what was saved"
        assert found["tp"][1][0] == loss and same(found["tp"][1][1], after), "the same mesh goes on with the same bits"
        assert found["cp"][1][0] == pytest.approx(loss, rel=1e-6)
        assert same(found["begun"], {name: saved[name] for name in found["begun"]})
    alone, checkpoints = engine_of(settings(preset, seed=1)), CheckpointManager(RunDir(tmp_path), settings(preset).checkpoint)
    checkpoints.load(RunDir(tmp_path).checkpoint(2), alone.state_dict())
    assert same(whole(alone), saved)
    assert step(alone, 2) == pytest.approx(loss, rel=1e-6)
    checkpoints.close()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same bits under the same names."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def counted(optimizer: ComposedOptimizer) -> Callable[[], Any]:
    """Its step, which takes as many collectives as are foretold."""
    names, taken = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "all_to_all_single"), 0
    numbers, plain = count(1), optimizer.step

    def counting(of: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        return of(*args, **kwargs)

    def stepped() -> Any:
        nonlocal taken
        taken, kept = 0, {name: getattr(dist, name) for name in names}
        for name, of in kept.items():
            setattr(dist, name, partial(counting, of))
        try:
            answer = plain()
        finally:
            for name, of in kept.items():
                setattr(dist, name, of)
        assert taken == collectives_of_step(optimizer, next(numbers))
        return answer

    return stepped


def updated(
    presets: list[str], states: str = "none", **parallel: int
) -> dict[str, tuple[list[float], dict[str, torch.Tensor], list[tuple]]]:
    """Of each preset: losses, parameters and states after three steps on these ranks, and each parameter's planned and measured bytes."""
    found = {}
    for preset in presets:
        engine = engine_of(settings(preset, precision="fp64", states=states, **parallel))
        optimizer = engine.optimizer
        assert isinstance(optimizer, ComposedOptimizer)
        if states == "none":  # in buckets each has messages of its own
            cast(Any, optimizer).step = counted(optimizer)
        losses = [step(engine, number) for number in range(3)]
        rows = optimizer.plan() if states == "none" else []  # in host memory they lie side by side in one piece
        found[preset] = (losses, whole(engine), [(row.name, row.planned_bytes, row.measured_bytes) for row in rows])
    return found


def updated_on_ranks() -> list[dict]:
    """Parts that are sharded further, copies of whole groups, states in host memory."""
    copies, moved = updated(["muon", "adafactor"], tp=2, dp_replicate=2), updated(["muon", "galore"], "host", tp=2, dp_shard=2)
    return [updated(list(WHOLE), tp=2, dp_shard=2), copies, moved]


def test_whole_matrices_are_updated_as_by_one_process() -> None:
    alone = updated(list(WHOLE))
    for answers in run_distributed(updated_on_ranks, 4):
        for found in answers:
            for preset, (losses, tensors, sizes) in found.items():
                wanted_losses, wanted, _ = alone[preset]
                assert losses == pytest.approx(wanted_losses, rel=NEAR.get(preset, 1e-6)), preset
                assert tensors.keys() == wanted.keys()
                for name, value in wanted.items():
                    assert tensors[name].shape == value.shape and tensors[name].dtype == value.dtype, (preset, name)
                    far = float((tensors[name] - value).norm() / value.norm()) if name.startswith("model.") else 0
                    assert far <= NEAR.get(preset, 1e-6), (preset, name, far)
                assert all(planned == measured for _, planned, measured in sizes), preset
