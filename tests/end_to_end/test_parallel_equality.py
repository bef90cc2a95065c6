"""One experiment, five ways to spread it over ranks: losses, gradient norms and parameters are the same.

Model with full attention, sliding window and memory layers, fewer KV heads than sequence ranks, packed documents that start
and end anywhere, also across shard bounds.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from models.memory_config import MemoryKind
from models.stack_config import STACK_KINDS
from tests.distributed import run_distributed
from trainer.build import build_engine, mesh_for
from trainer.config import RunConfig
from trainer.data.build import build_data

STEPS = 5
SEQUENCES_PER_STEP = 4


def experiment(
    data_path: str, cache: str, precision: str, layout: str, dp_replicate: int, dp_shard: int, cp: int, **sequence: object
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {
                "d_model": 32,
                "n_heads": 4,
                "n_kv_heads": 2,
                "layers": ["full", "swa", "memory"],
                "window": 24,
                "qkv_bias": True,
                "qk_norm": True,
                "memory": {"chunk_size": 16},
            },
            "data": {"source": "jsonl", "path": data_path, "seq_len": 96, "cache_dir": cache, "valid_fraction": 0.0, "tokenize_workers": 1},
            "train": {
                "steps": STEPS,
                "precision": precision,
                "grad_accum": SEQUENCES_PER_STEP // (dp_replicate * dp_shard),
                "seed": 3,
                "device": "cpu",
            },
            # eps: at 1e-8 AdamW divides by it the gradients of 1e-7 that are rounding errors, and one process in float32 is 1.2e-5
            # away from float64 after 5 steps: then the comparison would tell of AdamW and not of the mesh.
            "optim": {"lr": 1e-2, "eps": 1e-6, "clip_norm": 0.5, "schedule": {"warmup_steps": 2}},
            "parallel": {"dp_replicate": dp_replicate, "dp_shard": dp_shard, "cp": cp, "layout": layout, **sequence},
            "memory": {"loss_tile_tokens": 20},
        }
    )


def train_steps(config: RunConfig, steps: int = STEPS) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses and gradient norms of so many steps, and the whole final parameters."""
    device = torch.device("cpu")
    mesh = mesh_for(config, device) if dist.is_initialized() and dist.get_world_size() > 1 else None
    dp_rank, dp_size = (mesh.dp_rank, mesh.dims.dp) if mesh else (0, 1)
    data = build_data(config, dp_rank, dp_size)
    engine = build_engine(config, data.vocab_size, mesh, device)
    losses, norms = [], []
    for step, (micro_batches, _) in enumerate(data.train(), start=1):
        losses.append(engine.forward_backward(micro_batches).loss)
        norms.append(engine.step(config.optim.lr))
        if step == steps:
            break
    saved = engine.state_dict()["model"]  # where tensor-parallel ranks have parts: as the whole
    parameters = {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in saved.items()}
    return losses, norms, parameters


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A JSONL file whose documents are shorter and longer than a sequence, and a token cache made from it."""
    import json
    import random

    folder = tmp_path_factory.mktemp("documents")
    source = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    lengths = [3, 1, 7, 60, 2, 25, 4, 9, 90, 5, 12, 30, 2, 2, 2, 40, 8, 120]
    lines = [json.dumps({"text": " ".join(source.choice(words) for _ in range(n))}) for n in lengths]
    path = folder / "documents.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path), str(folder / "cache")


_REFERENCE: dict[tuple[str, Path], tuple] = {}

OWN: dict[str, dict] = {
    "infini": {"infini": {"segment": 24}},
    "slots": {"slots": {"segment": 24, "n_slots": 4}},
    "fam": {"fam": {"block": 24, "n_feedback": 4}},
    "neurocache": {"neurocache": {"segment": 24, "top_k": 4}},
}
"""Segments that end inside and at the bounds of ranks."""


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize(
    ("dp_replicate", "dp_shard", "cp", "layout"),
    [
        (1, 1, 2, "zigzag"),
        (1, 1, 2, "contiguous"),
        (1, 1, 4, "zigzag"),
        (1, 1, 4, "contiguous"),
        (1, 2, 1, "auto"),
        (2, 1, 1, "auto"),
        (1, 2, 2, "zigzag"),
        (2, 1, 2, "contiguous"),
    ],
)
def test_same_training_on_any_mesh(
    documents: tuple[str, str], precision: str, dp_replicate: int, dp_shard: int, cp: int, layout: str
) -> None:
    key = (precision, Path(documents[0]))
    if key not in _REFERENCE:
        _REFERENCE[key] = train_steps(experiment(*documents, precision, "auto", 1, 1, 1))
    assert _REFERENCE[key][0][-1] < _REFERENCE[key][0][0], "the experiment must learn for the comparison to mean something"
    compare(experiment(*documents, precision, layout, dp_replicate, dp_shard, cp), *_REFERENCE[key])


GRID = [  # (dp_replicate, dp_shard, cp, tp, layout, scheme and its settings)
    (1, 1, 4, 1, "auto", {"sequence": "ulysses", "head_chunk": 1}),
    (1, 1, 4, 1, "zigzag", {"sequence": "ring_x_ulysses", "ulysses": 2}),
    (1, 2, 2, 1, "zigzag", {"sequence": "allgather_kv"}),
    (1, 1, 4, 1, "zigzag", {"sequence": "double_ring", "ring_inner": 2}),
    (2, 1, 2, 1, "zigzag", {"kv_residence": "host", "kv_chunk": 20}),
    (1, 1, 4, 1, "per_document", {}),
    (1, 1, 4, 1, "zigzag", {"kv_dtype": "bf16"}),
    (1, 2, 2, 1, "contiguous", {"sequence": "ulysses", "head_chunk": 1, "kv_dtype": "bf16"}),
    (1, 1, 2, 2, "zigzag", {"kv_residence": "host", "kv_chunk": 20, "kv_dtype": "bf16"}),
    (1, 1, 2, 2, "zigzag", {}),
    (1, 1, 2, 2, "contiguous", {"sequence": "ulysses"}),
    (1, 1, 2, 2, "zigzag", {"sequence": "allgather_kv"}),
    (1, 1, 2, 2, "zigzag", {"kv_residence": "host", "kv_chunk": 20}),
    (1, 1, 2, 2, "per_document", {"kv_residence": "host", "kv_chunk": 20}),
    (1, 2, 1, 2, "auto", {"kv_residence": "host", "kv_chunk": 20}),
    (2, 1, 1, 2, "auto", {}),
    (1, 1, 4, 2, "zigzag", {"sequence": "double_ring", "ring_inner": 2}),
    (1, 1, 4, 2, "zigzag", {"sequence": "ring_x_ulysses", "ulysses": 2}),
    (1, 2, 2, 2, "per_document", {}),
]
_ANSWERS: dict[int, dict] = {}


def on_grid(documents: tuple[str, str], replicate: int, shard: int, cp: int, tp: int, layout: str, sequence: dict) -> RunConfig:
    """Plain gradient descent at a rate of 1, so that what a step takes off the parameters are its gradients."""
    values = experiment(*documents, "fp64", "auto", replicate, shard, 1).model_dump()
    values["parallel"] |= {"cp": cp, "tp": tp, "layout": layout, **sequence}
    values["model"]["layers"] = ("full", "swa", "full") if layout == "per_document" else ("full", "swa", "memory")
    values["optim"] |= {"preset": "sgd", "lr": 1.0, "clip_norm": None, "weight_decay": 0.0}
    return RunConfig.model_validate(values)


@pytest.mark.parametrize(("replicate", "shard", "cp", "tp", "layout", "sequence"), GRID, ids=str)
def test_loss_and_gradients_are_those_of_one_process(
    documents: tuple[str, str], replicate: int, shard: int, cp: int, tp: int, layout: str, sequence: dict
) -> None:
    """Issue 6, Show 2: equal across (dp, cp, scheme, tp). All cases of so many ranks run on the same ones."""
    ranks = replicate * shard * cp * tp
    if ranks not in _ANSWERS:
        cases = [case for case in GRID if case[0] * case[1] * case[2] * case[3] == ranks]
        answers = run_distributed(train_all, ranks, [on_grid(documents, *case) for case in cases], 1)
        _ANSWERS[ranks] = {repr(case): [rank[i] for rank in answers] for i, case in enumerate(cases)}
    layers = repr(on_grid(documents, 1, 1, 1, 1, layout if layout == "per_document" else "auto", {}).model.layer_kinds)
    rounded = {"kv_dtype": sequence["kv_dtype"]} if "kv_dtype" in sequence else {}  # of one process as of many
    key = (layers + repr(rounded), Path(documents[0]))
    if key not in _REFERENCE:
        _REFERENCE[key] = train_steps(on_grid(documents, 1, 1, 1, 1, layout, rounded), 1)
    losses, norms, parameters = _REFERENCE[key]
    for found_losses, found_norms, found in _ANSWERS[ranks][repr((replicate, shard, cp, tp, layout, sequence))]:
        assert found_losses == pytest.approx(losses, rel=1e-12)
        assert found_norms == pytest.approx(norms, rel=1e-12)
        assert found.keys() == parameters.keys()
        for name, value in parameters.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")


def train_all(configs: list[RunConfig], steps: int = STEPS) -> list[tuple]:
    """``train_steps`` of one after the other, on the same ranks."""
    return [train_steps(config, steps) for config in configs]


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (
            2,
            [
                ("fp64", 1, 1, 1, "auto", {}, {}),
                ("fp32", 1, 1, 1, "auto", {}, {}),
                ("fp64", 1, 1, 1, "auto", {}, {"recompute": "mixer", "ffn_tile_tokens": 7}),
                ("fp64", 1, 1, 1, "auto", {}, {"recompute": "block", "group_blocks": 2}),
                ("fp64", 1, 1, 1, "auto", {}, {"offload_optimizer": "host", "offload_parameters": "host"}),
            ],
        ),
        (
            4,
            [
                ("fp32", 1, 1, 2, "zigzag", {}, {"recompute": "block", "ffn_tile_tokens": 8}),
                ("fp64", 1, 2, 1, "auto", {}, {}),
            ],
        ),
    ],
)
def test_same_training_with_tensor_parallel_ranks(documents: tuple[str, str], ranks: int, cases: list[tuple]) -> None:
    configs = []
    for precision, replicate, shard, cp, layout, sequence, memory in cases:
        key = (precision, Path(documents[0]))
        if key not in _REFERENCE:
            _REFERENCE[key] = train_steps(experiment(*documents, precision, "auto", 1, 1, 1))
        one = experiment(*documents, precision, layout, replicate, shard, cp, tp=2, **sequence).model_dump()
        configs.append(RunConfig.model_validate({**one, "memory": {**one["memory"], **memory}}))
        assert configs[-1].parallel.ranks_asked == ranks
    for answers in run_distributed(train_all, ranks, configs):
        for config, found in zip(configs, answers, strict=True):
            check(config.train.precision, found, *_REFERENCE[config.train.precision, Path(documents[0])])


def test_same_training_of_every_memory_over_tensor_parallel_ranks(documents: tuple[str, str]) -> None:
    """Every kind of layer, and of attention beside one; its sequence is split over the group."""
    kinds = [kind for kind in get_args(MemoryKind) if kind not in STACK_KINDS]
    models = [{"layers": ["full", "memory"], "memory": {"kind": kind, **OWN.get(kind, {})}} for kind in kinds]
    models.append({"layers": ["full", "memory"], "memory": {"kind": "slots", "slots": {"variant": "lm2", "segment": 24, "n_slots": 4}}})
    models.append({"layers": ["memory", "swa"], "memory": {"attach": "mag", "chunk_size": 16}})
    plain = [experiment(*documents, "fp64", "auto", 1, 1, 1).model_dump() for _ in models]
    for one, changed in zip(plain, models, strict=True):
        one["model"] |= changed
    shared = [RunConfig.model_validate({**one, "parallel": {"tp": 2, "layout": "contiguous"}}) for one in plain]
    answers = run_distributed(train_all, 2, shared, 2)
    for i, one in enumerate(plain):
        expected = train_steps(RunConfig.model_validate(one), 2)
        for found in answers:
            check("fp64", found[i], *expected)


def compare(config: RunConfig, losses: list[float], norms: list[float], parameters: dict[str, torch.Tensor]) -> None:
    """Train ``config`` on its ranks: every rank's numbers are those given."""
    for found in run_distributed(train_steps, config.parallel.ranks_asked, config):
        check(config.train.precision, found, losses, norms, parameters)


def check(precision: str, found: tuple, losses: list[float], norms: list[float], parameters: dict[str, torch.Tensor]) -> None:
    """What one rank found, against the numbers given."""
    for rank_losses, rank_norms, rank_parameters in [found]:
        tolerance = 1e-9 if precision == "fp64" else 1e-5
        assert rank_losses == pytest.approx(losses, rel=tolerance, abs=0)
        assert rank_norms == pytest.approx(norms, rel=tolerance, abs=0)
        assert rank_norms[0] == pytest.approx(norms[0], rel=min(tolerance, 1e-6), abs=0)
        assert rank_parameters.keys() == parameters.keys()
        if precision == "fp64":
            for name, value in parameters.items():
                torch.testing.assert_close(rank_parameters[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
