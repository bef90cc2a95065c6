"""A traced step with value tables against the real allocator's log, on one rank and on two that share them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from memory_mgmt.allocator_log import record_cpu_allocations
from memory_mgmt.estimate import estimate
from memory_mgmt.policy_settings import policy_of
from memory_mgmt.trace import Trace
from parallel.columns import sent_bytes
from tests.distributed import run_distributed
from tests.trainer.test_step_trace import VOCAB, config, request
from tests.trainer.test_step_trace import real_peak as peak_of
from trainer.build import build_engine, mesh_for
from trainer.config import RunConfig
from trainer.step_trace import _batch, _cuts, trace_request

MODEL = {
    "layers": ["swa"],
    "n_layers": 3,
    "feedforward": ["product_keys", "dense"],
    "product_keys": {"n_keys": 32, "heads": 2, "top_k": 8, "key_dim": 16, "value_dim": 96, "qk_norm": True},
}
CASES = {"kept": {}, "recomputed": {"recompute": "block", "ffn_tile_tokens": 256}}


def config_of(memory: dict[str, Any], **parallel: Any) -> RunConfig:
    return config(model=MODEL, memory=memory, optim={"preset": "adamw_8bit"}, parallel=parallel, train={"grad_accum": 2})


@cache
def traced(name: str, cp: int = 1) -> Trace:
    return trace_request({**request(config_of(CASES[name], cp=cp)), "world_size": cp})


def real_peak(values: dict[str, Any]) -> tuple[int, int]:
    """Most live bytes of a steady step, and rows of the table's gradient. Tokens by chance: equal ones would read a few rows only."""
    torch.set_num_threads(1)
    cfg = RunConfig.model_validate(values)
    mesh = mesh_for(cfg, torch.device("cpu")) if dist.is_initialized() else None
    rows: list[int] = []
    with record_cpu_allocations() as log:
        engine = build_engine(cfg, VOCAB, mesh, torch.device("cpu"))
        empty = [_batch(cfg, cfg.data.seq_len) for _ in range(cfg.train.grad_accum)]
        g = torch.Generator().manual_seed(0)
        batches = [replace(b, tokens_BT=torch.randint(VOCAB, b.tokens_BT.shape, generator=g)) for b in empty]
        for _ in range(2):
            start = log.mark()
            engine.forward_backward(batches)
            gradient = engine.parameters["value_tables.0.weight"].grad
            assert gradient is not None
            rows.append(gradient._values().shape[0])
            del gradient
            engine.step(1e-3)
        return log.live_bytes(0, start) + log.peak_bytes(start), rows[-1]


@pytest.mark.parametrize("name", CASES)
def test_traced_peak_is_the_allocator_s(name: str) -> None:
    cfg = config_of(CASES[name])
    trace = traced(name)
    measured, rows = real_peak(cfg.model_dump(mode="json"))
    assert rows > 0.98 * 32**2  # the plan counts as many rows as can be read, here all
    assert trace.peak()[0] == pytest.approx(measured, rel=0.01)
    assert any(b.kind == "gradient" and b.size == 32**2 * 96 * 4 for b in trace.of("device"))


def test_two_ranks_that_share_the_table() -> None:
    cfg = config_of({}, cp=2)
    trace = traced("kept", 2)
    peaks = run_distributed(real_peak, 2, cfg.model_dump(mode="json"))
    assert trace.peak()[0] == pytest.approx(max(peak for peak, _ in peaks), rel=0.02)
    # What the readings exchange: all-gathers of entries and all-to-alls of sums, in both passes.
    tokens, width = 512, 96
    sent = sent_bytes([tokens, tokens], 1, 16, width, 4, 4)
    exchanged = [op for op in trace.ops if "alltoall" in op.name and op.module.endswith("ffn") and op.phase == "forward"]
    assert len(exchanged) == 2 * 2 and exchanged[0].message_bytes == tokens * width * 4
    assert sent[0] == tokens * 16 * 8 + tokens * 48 * 4


HIERARCHICAL = {
    "layers": ["swa"],
    "n_layers": 3,
    "feedforward": ["hierarchical", "dense"],
    "hierarchical": {"branching": [4, 4], "units": [24, 40], "planned_documents": 4},
}


def test_planned_documents_of_hierarchical_memories() -> None:
    """As many as are planned for, of clusters apart from each other: the allocator's peak, and their rows of the table's gradient."""
    settings = config_of({}).model_dump(mode="json") | {"model": HIERARCHICAL}
    settings["data"] |= {"source": "jsonl", "path": "any", "cluster_key": "cluster"}
    settings["train"] |= {"grad_accum": 1}
    cfg = RunConfig.model_validate(settings)
    trace = trace_request(request(cfg))
    measured, rows = real_peak(cfg.model_dump(mode="json"))
    assert rows == 2 * 4 * (24 + 40)  # two layers
    assert trace.peak()[0] == pytest.approx(measured, rel=0.02)
    assert any(b.kind == "gradient" and b.size == rows * 3 * cfg.model.d_model * 4 for b in trace.of("device"))
    # Over two ranks each fetches for its two documents, half of the columns from the other.
    settings["parallel"] |= {"cp": 2}
    shared = trace_request({**request(RunConfig.model_validate(settings)), "world_size": 2})
    sent = [op for op in shared.ops if "alltoall" in op.name and op.module.endswith("ffn") and op.phase == "forward"]
    assert [op.message_bytes for op in sent] == [2 * 2 * (24 + 40) * (3 * cfg.model.d_model // 2) * 4] * 2


def test_routed_memories_take_what_is_planned_whatever_the_routing() -> None:
    """The trace knows no routing; lanes are as large as they can need to be."""
    mixture = {"kind": "mom", "chunk_size": 32, "mom": {"n_memories": 6, "top_k": 1}}
    model = {"layers": ["memory", "swa"], "n_layers": 2, "memory": mixture}
    cfg = config(model=model, memory={"memory_tile_tokens": 256}, optim={"preset": "adamw_8bit"})
    trace = trace_request(request(cfg))
    assert trace.peak()[0] == pytest.approx(peak_of(cfg), rel=0.02)


def test_layers_with_tables_of_their_own_are_all_traced() -> None:
    """A few layers would have a few of the tables."""
    for tables, cut in (({}, True), ({"shared_table": False}, False)):
        keys = {**MODEL["product_keys"], **tables}
        cfg = config(model={**MODEL, "n_layers": 8, "feedforward": ["product_keys"], "product_keys": keys}, optim={"preset": "adamw_8bit"})
        assert bool(_cuts(cfg, policy_of(cfg.memory, cfg.model.layer_kinds))) == cut


@pytest.mark.parametrize("cp", [1, 2])
def test_formulas_know_tables(cp: int) -> None:
    cfg = config_of({}, cp=cp)
    trace = traced("kept", cp)
    states = sum(b.size for b in trace.of("device") if b.kind == "optimizer" and not b.lower)
    plan = estimate(
        cfg.model, cfg.parallel, cfg.memory, cfg.optim, seq_len=1024, micro_batch_size=1, grad_accum=2, precision="fp32",
        vocab_size=VOCAB, layout=cfg.layout, optimizer_bytes=states,
    )  # fmt: skip
    overheads = sum(term.bytes for term in plan.terms if term.kind in ("overhead", "outside"))
    assert plan.peak_bytes - overheads == pytest.approx(trace.peak()[0], rel=0.15)
    assert any(term.name == "gradients of value tables" and term.bytes for term in plan.terms)
