"""Weights gathered in bf16: the same bits as gathered in float32, half the bytes, and what is read in float32 stays so."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from memory_mgmt.apply import apply_policy
from memory_mgmt.offload import HostStore
from memory_mgmt.policy_settings import policy_of
from models.batch import Batch, Bounds
from models.transformer import Transformer, init_weights
from optim.clip import local_part
from parallel.fsdp import reshard
from parallel.parallelize import parallelize
from tests.distributed import run_distributed
from trainer.build import build_engine, engine_for, mesh_for
from trainer.config import RunConfig

SEQ_LEN, VOCAB = 64, 48


def config(cp: int, dp_shard: int, precision: str = "bf16", tied: bool = False, **memory: object) -> RunConfig:
    model = {"d_model": 24, "n_heads": 2, "n_kv_heads": 1, "layers": ["full", "swa", "memory"], "window": 10, "tie_embeddings": tied}
    model |= {"qkv_bias": True, "qk_norm": True}
    return RunConfig.model_validate(
        {
            "model": {**model, "memory": {"chunk_size": 8}},
            "data": {"seq_len": SEQ_LEN},
            "train": {"precision": precision, "device": "cpu"},
            "optim": {"lr": 1e-2, "clip_norm": 0.5},
            "parallel": {"cp": cp, "dp_shard": dp_shard},
            "memory": {"loss_tile_tokens": 10, **memory},
        }
    )


def batches(n: int) -> list[Batch]:
    tokens = torch.randint(VOCAB, (n, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(SEQ_LEN)[None]
    return [Batch(row[None], row[None].roll(-1, 1), positions, Bounds.whole(1, SEQ_LEN)) for row in tokens]


def steps(cp: int, dp_shard: int, tied: bool, memory: dict, gather: bool) -> list[torch.Tensor]:
    """Losses, norms, and all gradients and parameters of two steps of two passes each."""
    settings = config(cp, dp_shard, tied=tied, **memory)
    device = torch.device("cpu")
    mesh = mesh_for(settings, device)
    assert mesh is not None
    store = HostStore(device)
    if gather:
        engine = build_engine(settings, VOCAB, mesh, device, store=store)
    else:
        model = Transformer(settings.model, VOCAB)
        apply_policy(model, policy_of(settings.memory, settings.model.layer_kinds), store)
        parallelize(model, mesh, settings.layout)
        init_weights(model, settings.train.seed)
        engine = engine_for(settings, model, mesh, device)
    found = []
    for _ in range(2):
        some = batches(2 * dp_shard)[2 * mesh.dp_rank :][:2]
        found.append(torch.tensor(engine.forward_backward(some).nll))
        found += [local_part(p.grad).clone() for p in engine.parameters.values() if p.grad is not None]
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in engine.parameters.values())
        found.append(torch.tensor(engine.step(1e-2)))
    found.append(torch.tensor(engine.evaluate(batches(dp_shard)[mesh.dp_rank :][:1]).nll))
    assert all(isinstance(p, DTensor) for p in engine.model.parameters())  # nothing stays gathered
    return [*found, *(local_part(p).detach().clone() for p in engine.parameters.values())]


CASES: list[tuple[int, bool, dict]] = [
    (2, False, {}),
    (1, True, {"recompute": "block"}),
    (2, False, {"recompute": "block", "ffn_tile_tokens": 8, "memory_tile_tokens": 16, "offload": "inputs"}),
    (1, False, {"recompute": "block", "group_blocks": 2, "memory_tile_tokens": 16}),
]
"""Ranks that share a sequence, tied embeddings, memory settings."""


def test_gathered_in_bf16_is_bit_for_bit_as_gathered_in_float32() -> None:
    for cases in run_distributed(both, 2):
        for case, (wide, narrow) in zip(CASES, cases, strict=True):
            assert len(wide) == len(narrow) > 20
            for a, b in zip(wide, narrow, strict=True):
                assert torch.equal(a, b), case


def both() -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    return [tuple(steps(cp, 2 // cp, tied, memory, gather) for gather in (False, True)) for cp, tied, memory in CASES]  # type: ignore[misc]


def gathered_dtypes(tied: bool, precision: str) -> dict[str, str]:
    """Of every parameter while its unit is whole."""
    settings = config(1, 2, precision, tied)
    device = torch.device("cpu")
    engine = build_engine(settings, VOCAB, mesh_for(settings, device), device)
    engine.evaluate(batches(2)[:1])
    for module in engine.model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    found = {name: str(p.dtype).removeprefix("torch.") for name, p in engine.model.named_parameters()}
    reshard(engine.model)
    return found


WIDE = ("norm", "A_log", "dt_bias", "conv_")


def test_what_is_read_in_float32_is_gathered_in_float32() -> None:
    untied, tied, plain = run_distributed(three, 2)[0]
    assert set(plain.values()) == {"float32"}
    for found, also in ((untied, {"embed.weight"}), (tied, {"embed.weight"})):
        wide = {name for name, dtype in found.items() if dtype == "float32"}
        assert wide == {name for name in found if any(part in name for part in WIDE)} | also
        assert {dtype for name, dtype in found.items() if name not in wide} == {"bfloat16"}
    assert untied["head.weight"] == untied["blocks.0.ffn.w_up.weight"] == untied["blocks.2.mixer.w_beta.weight"] == "bfloat16"


def three() -> list[dict[str, str]]:
    return [gathered_dtypes(False, "bf16"), gathered_dtypes(True, "bf16"), gathered_dtypes(False, "fp32")]
