"""A run that begins from an imported model on several ranks: the imported bits on each, and the loss that transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from models.int8_weight import dequantised, stored
from tests.distributed import run_distributed
from tests.trainer.interchange.hf_models import batch_of, make, save, tokens
from trainer.build import build_engine, mesh_for
from trainer.checkpoint import CheckpointManager
from trainer.config import RunConfig
from trainer.initial_weights import fill_from
from trainer.interchange.families import hf_name
from trainer.interchange.importing import import_model
from trainer.run_dir import RunDir

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "adamw": {"parallel": {"dp_shard": 2}},
    "muon": {"parallel": {"cp": 2}, "optim": {"preset": "muon"}},
    "galore": {"parallel": {"cp": 2}, "optim": {"preset": "galore"}},
    "adamw_8bit": {"parallel": {"dp_replicate": 2}, "optim": {"preset": "adamw_8bit"}},
    "tiles": {"parallel": {"cp": 2, "sequence": "ulysses"}, "memory": {"recompute": "block", "ffn_tile_tokens": 7}},
    "offloaded": {"parallel": {"cp": 2}, "memory": {"offload_parameters": "host", "offload_optimizer": "host"}},
    "bf16": {"parallel": {"cp": 2}, "train": {"precision": "bf16"}},
    "bf16 weights": {"parallel": {"cp": 2}, "train": {"precision": "bf16"}, "optim": {"weights": "bf16"}},
    "eight bits": {"parallel": {"dp_shard": 2}, "train": {"precision": "bf16"}, "optim": {"preset": "q_galore"}},
}


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """Its numbers, from all ranks."""
    kept = stored(parameter)
    values = (kept.full_tensor() if isinstance(kept, DTensor) else kept).detach()
    return dequantised(values, parameter.shape[1], torch.float32) if values.dtype == torch.uint8 else values.float().clone()


def begin(base: dict, folder: str) -> dict[str, tuple[float, float, dict[str, torch.Tensor]]]:
    """Of every case: two losses, and the parameters before."""
    found = {}
    checkpoints = CheckpointManager(RunDir(folder), RunConfig().checkpoint)
    for name, changes in CASES.items():
        values = {key: {**value, **changes.get(key, {})} if isinstance(value, dict) else value for key, value in base.items()}
        config = RunConfig.model_validate(values)
        device = torch.device("cpu")
        mesh = mesh_for(config, device)
        assert mesh is not None and config.model.vocab_size is not None
        engine = build_engine(config, config.model.vocab_size, mesh, device, fill=lambda m: fill_from(folder, m, checkpoints))
        live = engine.offloaded.tensors if engine.offloaded else engine.parameters
        begun = {name: whole(parameter) for name, parameter in live.items()}
        ids = tokens()[mesh.dp_rank : mesh.dp_rank + 1] if mesh.dims.dp > 1 else tokens()
        losses = []
        for _ in range(2):
            losses.append(engine.forward_backward([batch_of(ids)]).loss)
            engine.step(1e-2)
        found[name] = (*losses, begun)
    return found


def test_every_rank_begins_from_the_imported_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    theirs = make("qwen3_windows", hidden_size=64, intermediate_size=80)
    ids = tokens()
    want = float(theirs(ids, labels=ids).loss.detach())
    base = RunConfig.model_validate({"train": {"device": "cpu"}, "data": {"seq_len": 48}})
    config = import_model(save(theirs, tmp_path / "hf"), tmp_path / "in", base, lambda line: None)
    original = {name: parameter.detach() for name, parameter in theirs.named_parameters()}
    for found in run_distributed(begin, 2, config.model_dump(), str(tmp_path / "in")):
        for name, (first, second, begun) in found.items():
            rounded = name in ("bf16", "bf16 weights", "eight bits")
            assert first == pytest.approx(want, abs=0.05 if rounded else 1e-5), name
            assert second < first, name
            # bfloat16 has 8 bits; a step of eight bits is a 255th of a group's range.
            error = {"bf16 weights": 2**-8, "eight bits": 2**-6}.get(name, 0.0)
            for key, values in begun.items():
                wanted = original[hf_name(key, "qwen3")]
                assert float((values - wanted).abs().max()) <= error * float(wanted.abs().max()), (name, key)
