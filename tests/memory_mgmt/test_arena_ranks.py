"""The arena under FSDP2 and sequence parallelism on two gloo ranks: communication frees on threads of its own, losses stay the same."""

from __future__ import annotations

import torch
import torch.distributed as dist

from memory_mgmt.arena import Arena, arena_step
from models.batch import Batch, Bounds
from tests.distributed import run_distributed
from trainer.build import build_engine, mesh_for
from trainer.config import RunConfig

SEQ_LEN, VOCAB = 32, 64


def run(arena: Arena | None) -> tuple[list[float], float]:
    config = RunConfig.model_validate(
        {
            "model": {"d_model": 16, "n_heads": 2, "layers": ["full", "memory"], "memory": {"chunk_size": 8}},
            "data": {"seq_len": SEQ_LEN},
            "train": {"precision": "fp32", "device": "cpu"},
            "parallel": {"cp": dist.get_world_size(), "layout": "contiguous"},
        }
    )
    device = torch.device("cpu")
    engine = build_engine(config, VOCAB, mesh_for(config, device), device)
    losses = []
    for i in range(12):
        tokens_BT = torch.randint(VOCAB, (1, SEQ_LEN), generator=torch.Generator().manual_seed(i))
        batch = Batch(tokens_BT, tokens_BT.roll(-1, 1), torch.arange(SEQ_LEN)[None], Bounds.whole(1, SEQ_LEN))
        with arena_step(arena, "train"):
            losses.append(engine.forward_backward([batch]).loss)
            norm = engine.step(1e-2)
        if i % 4 == 3:
            with arena_step(arena, "evaluate"):
                losses.append(engine.evaluate([batch]).loss)
    return losses, norm


def both() -> tuple[bool, int, int]:
    arena = Arena(smallest_bytes=64, plan_seconds=0.2, warn=lambda message: None)
    same = run(arena) == run(None)
    return same, arena.stats.served, arena.stats.missed + arena.stats.conflicts


def test_losses_are_the_same_on_two_ranks() -> None:
    for same, served, astray in run_distributed(both, 2):
        assert same
        assert served > 500 and served > 10 * astray, (served, astray)
