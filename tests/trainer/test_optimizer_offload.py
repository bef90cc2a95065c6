"""A run with its optimizer's states in host memory: the same bits as without, alone and sharded, and checkpoints that serve both."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from memory_mgmt.offload import HostStore
from memory_mgmt.optimizer_lanes import OffloadedLanes
from memory_mgmt.optimizer_offload import OffloadedOptimizer
from memory_mgmt.optimizer_on_host import OnHost
from models.batch import Batch, Bounds
from optim.build import build_optimizer, lanes_of, parameter_groups
from optim.routing import route
from tests.distributed import run_distributed
from trainer.build import build_engine, mesh_for
from trainer.checkpoint import CheckpointManager
from trainer.config import CheckpointSection, RunConfig
from trainer.engine import Engine
from trainer.run_dir import RunDir

SEQ_LEN, VOCAB = 32, 75
BUCKET_BYTES = 4096
"""Small, so that a parameter goes in several buckets and a block in many."""


def config(where: str, ranks: int, cp: int = 1, preset: str = "adamw") -> RunConfig:
    width = 24 if preset == "adamw" else 96  # few bits are for what is not small
    return RunConfig.model_validate(
        {
            "model": {"d_model": width, "n_heads": 3, "layers": ["full", "memory"], "memory": {"chunk_size": 8}},
            "data": {"seq_len": SEQ_LEN},
            "train": {"device": "cpu", "grad_accum": 2},
            "optim": {"clip_norm": 0.05, "preset": preset, **({"rank": 8} if preset == "galore" else {})},
            "parallel": {"dp_shard": ranks // cp, "cp": cp, "layout": "contiguous"},
            "memory": {"offload_optimizer": where},
        }
    )


def engine_of(where: str, cp: int = 1, preset: str = "adamw") -> Engine:
    settings = config(where, dist.get_world_size() if dist.is_initialized() else 1, cp, preset)
    device = torch.device("cpu")
    engine = build_engine(settings, VOCAB, mesh_for(settings, device), device)
    if where == "host" and preset != "adamw":
        assert isinstance(engine.optimizer, OffloadedLanes)
        lanes = lanes_of(engine.model, settings.optim, settings.train.seed)
        assert lanes is not None
        groups = parameter_groups(engine.model, route(engine.model), settings.optim)
        engine.optimizer = OffloadedLanes(groups, lanes, settings.optim.lr, HostStore(device), BUCKET_BYTES)
        split = [unit for load in engine.optimizer._loads for unit in load.units if not unit.last]
        assert bool(split) == (preset == "adamw_8bit")  # galore's matrices go as wholes, and the rest is small here
    elif where == "host":
        assert isinstance(engine.optimizer, OffloadedOptimizer)
        plain = build_optimizer(engine.model, settings.optim, with_states=False)
        engine.optimizer = OffloadedOptimizer(plain, engine.parameters, HostStore(device), BUCKET_BYTES)
        assert max(sum(not piece.last for piece in load.bucket.pieces) for load in engine.optimizer._loads) > 0  # some are split
    return engine


def batches(step: int) -> list[Batch]:
    seeds = torch.Generator().manual_seed(100 * step + (dist.get_rank() if dist.is_initialized() else 0))
    tokens = [torch.randint(VOCAB, (1, SEQ_LEN + 1), generator=seeds) for _ in range(2)]
    return [Batch(t[:, :-1], t[:, 1:], torch.arange(SEQ_LEN)[None], Bounds.whole(1, SEQ_LEN)) for t in tokens]


def steps(engine: Engine, first: int, last: int) -> list[float]:
    norms = []
    for step in range(first, last):
        engine.forward_backward(batches(step))
        norms.append(engine.step(1e-2))
    return norms


def values(engine: Engine) -> dict[str, torch.Tensor]:
    """This rank's part of every parameter and state, by name."""
    state = engine.state_dict()
    named = {f"{part}.{name}": tensor for part, entries in state.items() for name, tensor in entries.items()}
    return {name: (t._local_tensor if isinstance(t, DTensor) else t).detach().clone() for name, t in named.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def both_ways(cp: int = 1, preset: str = "adamw") -> list[str]:
    """Four steps each way; gives the placements of the states, as text."""
    plain, offloaded = engine_of("none", cp, preset), engine_of("host", cp, preset)
    assert isinstance(offloaded.optimizer, OnHost) and not isinstance(plain.optimizer, OnHost)
    before = values(plain)
    equal(before, values(offloaded))
    norms = steps(plain, 0, 4)
    assert norms == steps(offloaded, 0, 4) and min(norms) > 0.05  # clipping has scaled them
    after = values(plain)
    equal(after, values(offloaded))
    changed = [name for name, tensor in after.items() if tensor.numel() and not torch.equal(tensor, before[name])]
    assert len(changed) > 0.9 * len(after)
    state = offloaded.state_dict()["optim"]
    return [str(getattr(tensor, "placements", "")) for tensor in state.values()]


def test_the_same_bits_on_one_process() -> None:
    assert set(both_ways()) == {""}


def sharded(folder: str) -> list[str]:
    for first, then in (("host", "none"), ("none", "host")):
        saved_and_resumed(f"{folder}/{first}", first, then)
    saved_and_resumed(f"{folder}/few bits", "host", "none", "adamw_8bit")
    return both_ways(cp=1) + both_ways(cp=2) + both_ways(2, "adamw_8bit") + both_ways(1, "galore")


def test_the_same_bits_and_checkpoints_on_two_ranks(tmp_path: Path) -> None:
    for placements in run_distributed(sharded, 2, str(tmp_path)):
        assert any("Shard(dim=0)" in text for text in placements)


def manager(folder: str) -> CheckpointManager:
    return CheckpointManager(RunDir(Path(folder)), CheckpointSection())


def saved_and_resumed(folder: str, first: str, then: str, preset: str = "adamw") -> None:
    """Two steps, a checkpoint, two steps with the states elsewhere; against four steps without a break."""
    checkpoints = manager(folder)
    whole, before, after = engine_of("none", 1, preset), engine_of(first, 1, preset), engine_of(then, 1, preset)
    steps(whole, 0, 4)
    steps(before, 0, 2)
    checkpoints.save(2, before.state_dict(), block=True)
    steps(after, 0, 1)  # values that the checkpoint must replace
    found = checkpoints.latest_good()
    assert found is not None and found.step == 2
    checkpoints.load(found, after.state_dict())
    equal(values(before), values(after))
    steps(after, 2, 4)
    equal(values(whole), values(after))
    checkpoints.close()


@pytest.mark.parametrize(("first", "then"), [("host", "none"), ("none", "host")])
def test_a_checkpoint_serves_both(tmp_path: Path, first: str, then: str) -> None:
    saved_and_resumed(str(tmp_path), first, then)


def test_auto_is_for_the_planner() -> None:
    with pytest.raises(ValueError, match="offload_optimizer auto is decided by the planner"):
        engine_of("auto")
