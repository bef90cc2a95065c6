"""The traced step against the real allocator's log of the same step, and a few traced layers against all of them."""

import contextlib
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from memory_mgmt.allocator_log import record_cpu_allocations
from memory_mgmt.devices import DEVICES
from memory_mgmt.offload import HostStore
from memory_mgmt.policy import KEEP, RECOMPUTE, LayerPolicy, Policy, Split
from memory_mgmt.policy_settings import policy_of
from memory_mgmt.trace import Trace, by_kind
from memory_mgmt.trace_extend import shorten
from memory_mgmt.traced_plan import stretches
from parallel.tensor_parallel import sent_bytes
from tests.distributed import run_distributed
from trainer.build import build_engine, host_store, mesh_for
from trainer.config import RunConfig
from trainer.planning import predict, target_of
from trainer.step_trace import _batch, trace_request
from trainer.tracing import TraceRequest

VOCAB = 320
SMALL = {
    "model": {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "window": 48},
    "data": {"seq_len": 1024},
    "memory": {"loss_tile_tokens": 256},
}


PREFIXES = {"source": "jsonl", "path": "none.jsonl", "prefix_key": "prompt"}


def config(**sections):
    merged = {name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in {*SMALL, *sections}}
    return RunConfig.model_validate(merged)


def request(cfg, policy=None, whole=True):
    return TraceRequest(cfg, VOCAB, "cpu", policy, threads=1, whole=whole).to_dict()


def real_peak(cfg, policy=None):
    """Most live bytes of a steady step by the allocator's own log, parameters and states included."""
    torch.set_num_threads(1)
    device, mesh = torch.device("cpu"), mesh_for(cfg, torch.device("cpu"))
    policy = policy or policy_of(cfg.memory, cfg.model.layer_kinds)
    store = host_store(policy, device, None, None, optimizer=cfg.memory.offload_optimizer == "host")
    with contextlib.ExitStack() as cleanup, record_cpu_allocations() as log:
        if mesh is not None and mesh.dims.world_size == 1:
            cleanup.callback(dist.destroy_process_group)
        engine = build_engine(cfg, VOCAB, mesh, device, policy, store)
        batches = [_batch(cfg, cfg.data.seq_len) for _ in range(cfg.train.grad_accum)]
        for _ in range(2):
            start = log.mark()
            engine.forward_backward(batches, 1e-3)
            engine.step(1e-3)
        return log.live_bytes(0, start) + log.peak_bytes(start)


def real_peak_of_ranks(values, policy):
    return real_peak(RunConfig.model_validate(values), policy)


MIXED = Policy(
    (LayerPolicy(KEEP, RECOMPUTE, KEEP, Split(0.5, 0.0, 0.5)), LayerPolicy(KEEP, KEEP, RECOMPUTE, RECOMPUTE)), ffn_tile_tokens=256
)
FOUR_WAYS = Policy(
    (LayerPolicy(feed_forward=Split(0.25, 0.25, 0.25, 0.25)), LayerPolicy(feed_forward=Split(0.5, 0.0, 0.0, 0.5))), loss_tile_tokens=256
)
CASES = {
    "full attention": (config(model={"layers": ["full", "full", "full"]}), None),
    "window": (config(model={"layers": ["swa", "swa"]}), None),
    "memory": (config(model={"layers": ["memory", "memory"]}), None),
    "window and memory, longer": (config(data={"seq_len": 4096}), None),
    "recomputed blocks": (config(memory={"recompute": "block"}), None),
    "recomputed but the mixer": (config(model={"layers": ["full", "memory"]}, memory={"recompute": "mixer"}), None),
    "tiles": (config(memory={"recompute": "block", "ffn_tile_tokens": 128, "memory_tile_tokens": 256}), None),
    "groups of blocks": (config(model={"layers": ["full"] * 4}, memory={"recompute": "block", "group_blocks": 2}), None),
    "low precision": (config(model={"layers": ["full", "memory"]}, data={"seq_len": 4096}, train={"precision": "bf16"}), None),
    "peak inside the attention kernel's backward": (
        config(
            model={"layers": ["full", "full"], "n_layers": 2}, data={"seq_len": 4096}, memory={"recompute": "block", "loss_tile_tokens": 32}
        ),
        None,
    ),
    "the same in low precision": (
        config(
            model={"layers": ["full", "full"], "n_layers": 2},
            data={"seq_len": 4096},
            memory={"recompute": "block", "loss_tile_tokens": 32},
            train={"precision": "bf16"},
        ),
        None,
    ),
    "a stream in bf16": (
        config(
            model={"layers": ["full", "memory"]},
            data={"seq_len": 4096},
            memory={"recompute": "block", "ffn_tile_tokens": 512, "memory_tile_tokens": 512},
            train={"precision": "bf16", "residual": "bf16"},
        ),
        None,
    ),
    "moments in eight bits": (config(model={"layers": ["full", "memory"]}, optim={"preset": "adamw_8bit"}), None),
    "a projected optimizer": (config(model={"layers": ["full", "memory"]}, optim={"preset": "galore", "rank": 16}), None),
    "a scaled gradient": (config(model={"layers": ["full"]}, optim={"preset": "apollo_mini", "rest": "sgd"}), None),
    "weights rounded by chance": (
        config(
            model={"layers": ["full", "memory"]},
            data={"seq_len": 512},
            train={"precision": "bf16"},
            optim={"preset": "galore", "rank": 16, "weights": "bf16_stochastic"},
        ),
        None,
    ),
    "weights of 24 bits": (
        config(
            model={"layers": ["full"], "d_model": 128},
            data={"seq_len": 64},
            train={"precision": "bf16"},
            memory={"recompute": "block"},
            optim={"weights": "bf16_24bit"},
        ),
        None,
    ),
    "weights in eight bits": (
        config(
            model={"layers": ["full", "memory"], "d_model": 128},
            data={"seq_len": 256},
            train={"precision": "bf16"},
            memory={"recompute": "block"},
            optim={"preset": "q_galore", "rank": 16},
        ),
        None,
    ),
    "biases and normed heads": (config(model={"layers": ["full", "swa"], "qkv_bias": True, "qk_norm": True}), None),
    "the same but the mixer recomputed": (
        config(model={"layers": ["swa", "full"], "qkv_bias": True, "qk_norm": True}, memory={"recompute": "mixer", "ffn_tile_tokens": 256}),
        None,
    ),
    "double precision": (config(train={"precision": "fp64"}), None),
    "two sequences, three passes": (config(train={"micro_batch_size": 2, "grad_accum": 2}), None),
    "tied embeddings": (config(model={"tie_embeddings": True, "layers": ["full"]}), None),
    "in eight bits": (config(model={"layers": ["full", "full"]}, data={"seq_len": 2048}, memory={"quantise": "feed_forward"}), None),
    "in eight bits, by tiles, in low precision": (
        config(
            model={"layers": ["full", "full"]},
            data={"seq_len": 4096},
            memory={"quantise": "feed_forward", "ffn_tile_tokens": 512},
            train={"precision": "bf16"},
        ),
        None,
    ),
    "in all four ways by token range": (config(model={"layers": ["full", "memory"]}), FOUR_WAYS),
    "optimizer states in host memory": (
        config(data={"seq_len": 64}, model={"d_model": 128}, memory={"offload_optimizer": "host"}, train={"grad_accum": 2}),
        None,
    ),
    "few-bit states in host memory": (
        config(
            data={"seq_len": 64},
            model={"d_model": 256, "layers": ["full", "full"]},
            memory={"offload_optimizer": "host"},
            optim={"preset": "adamw_4bit", "weights": "bf16_24bit"},
            train={"precision": "bf16"},
        ),
        None,
    ),
    "projected states in host memory": (
        config(
            data={"seq_len": 64},
            model={"d_model": 256, "layers": ["full", "full"]},
            memory={"offload_optimizer": "host"},
            optim={"preset": "galore", "rank": 16},
        ),
        None,
    ),
    "parameters in host memory": (
        config(
            model={"layers": ["full"] * 4},
            data={"seq_len": 128},
            memory={"offload_optimizer": "host", "offload_parameters": "host", "recompute": "block"},
            train={"precision": "bf16"},
        ),
        None,
    ),
    "gated slots in tiles, states carried": (
        config(
            model={"layers": ["memory"], "memory": {"kind": "gsa", "gsa": {"n_slots": 16}}},
            data={"seq_len": 512, "shuffle": "documents"},
            train={"carry_state": "document", "grad_accum": 2},
            memory={"recompute": "block", "memory_tile_tokens": 256},
        ),
        None,
    ),
    "in segments through all layers": (
        config(
            model={"layers": ["swa", "memory"], "memory": {"chunk_size": 32}},
            data={"seq_len": 500},
            train={"segment_tokens": 48},
            memory={"recompute": "block", "memory_tile_tokens": 64, "segment_states": "sqrt"},
        ),
        None,
    ),
    "a policy by token range": (config(model={"layers": ["full", "full"]}), MIXED),
}


@pytest.mark.parametrize("name", CASES)
def test_traced_peak_is_the_allocators(name):
    cfg, policy = CASES[name]
    traced = trace_request(request(cfg, policy)).peak()[0]
    assert traced == pytest.approx(real_peak(cfg, policy), rel=1e-3)


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"layers": ["full", "full"]}},
        {"memory": {"recompute": "block", "memory_tile_tokens": 128}},
        {"model": {"layers": ["full", "full"]}, "memory": {"offload_optimizer": "host"}},
        {
            "model": {"layers": ["full", "full"]},
            "train": {"precision": "bf16"},
            "optim": {"preset": "adamw_8bit", "weights": "bf16_24bit"},
        },
        {
            "model": {"layers": ["full", "full"]},
            "train": {"precision": "bf16"},
            "optim": {"preset": "q_galore", "rank": 16},
        },
        {"memory": {"recompute": "block", "memory_tile_tokens": 128}, "train": {"precision": "bf16"}},
        {
            "model": {"layers": ["memory", "swa"], "memory": {"kind": "mamba2"}},
            "data": {"shuffle": "documents"},
            "train": {"carry_state": "document"},
        },
        {"model": {"layers": ["full"] * 3}, "memory": {"offload_optimizer": "host", "offload_parameters": "host"}},
        {"model": {"layers": ["full", "memory"]}, "parallel": {"tp": 2}},
        {"model": {"layers": ["full", "full"]}, "memory": {"recompute": "block"}, "parallel": {"tp": 2}},
        {"model": {"layers": ["full", "full"]}, "data": PREFIXES},
        {"model": {"layers": ["full", "swa"]}, "data": PREFIXES},
        {
            "model": {"layers": ["full", "full"]},
            "optim": {"preset": "muon"},
            "parallel": {"tp": 2, "kv_residence": "host", "kv_chunk": 256},
        },
    ],
)
def test_traced_peak_is_the_allocators_on_two_ranks(sections):
    cfg = config(**{"parallel": {"cp": 2}, **sections})
    traced = trace_request(request(cfg)).peak()[0]
    measured = run_distributed(real_peak_of_ranks, 2, cfg.model_dump(mode="json"), None)
    assert traced == pytest.approx(max(measured), rel=1e-3)


def test_a_traced_step_attends_as_prefixes_ask():
    """The keys after a query, inside the prefix, cost products; where the documents come from changes no trace."""
    elsewhere, causal = PREFIXES | {"path": "other.jsonl", "prefix_key": "q"}, PREFIXES | {"prefix_mask": "causal"}
    requests = [request(config(model={"layers": ["full"]}, data=data)) for data in ({}, PREFIXES, elsewhere, causal)]
    assert requests[1] == requests[2] and requests[3] == requests[0]
    plain, seen = (sum(op.flops * op.repeats for op in trace_request(one).ops) for one in requests[:2])
    assert seen > 1.1 * plain


def test_a_plan_counts_the_bytes_of_tensor_parallel_ranks():
    layers, tokens, width = 2, 1024, 64
    cfg = config(model={"layers": ["full"] * layers}, parallel={"tp": 2, "cp": 2, "layout": "contiguous"}, train={"device": "cpu"})
    found = predict(target_of(cfg, DEVICES["h100"]), trace_request(request(cfg)))
    assert found is not None
    message = tokens // 2 * width * 4 // 2
    blocks = layers * sum(sent_bytes(tokens // 2, width, 2, 4))
    ends, norms = 4 * message + 2 * tokens // 2 * 4, (2 * layers + 1) * width // 2 * 4  # norms are sharded over cp
    assert found.tensor_bytes == blocks + ends + norms
    assert 0 < found.tensor_seconds <= found.exposed_communication_seconds


def test_swapped_tensors_count_as_host_memory():
    cfg = config(model={"layers": ["full"] * 4}, memory={"recompute": "mixer", "offload": "kept"})
    kept = replace(policy_of(config(model={"layers": ["full"] * 4}, memory={"recompute": "mixer"}).memory, ("full",) * 4))
    here, there = trace_request(request(cfg, kept)), trace_request(request(cfg))
    inputs = 4 * 1024 * 64 * 4  # the residual stream that enters each of four layers
    assert here.peak("host")[0] == 0 and there.peak("host")[0] >= inputs
    assert there.peak()[0] < here.peak()[0]


def test_offloaded_states_are_host_memory_and_their_buckets_the_devices():
    here = trace_request(request(config()))
    cfg = config(memory={"offload_optimizer": "host"})
    there = trace_request(request(cfg))
    states = sum(b.size for b in here.buffers if b.kind == "optimizer" and b.requested > 4)
    on_host = [b for b in there.of("host") if b.kind == "optimizer"]
    assert states <= sum(b.size for b in on_host) < 1.01 * states + 2 * 4 * 64 * 100  # parameters begin at multiples of 64 elements
    with HostStore("cpu") as store:
        build_engine(cfg, VOCAB, None, torch.device("cpu"), store=store)
        assert store.used_bytes == sum(b.size for b in on_host)
    assert all(b.lower == 0 and b.upper == there.end for b in on_host) and {b.layer for b in on_host} >= {0, 1}
    assert not [b for b in there.of("device") if b.kind == "optimizer" and b.requested > 4]
    buffers = [b for b in there.of("device") if b.phase == "update" and b.op == "aten::empty" and b.requested > 4]
    assert len({b.size for b in buffers}) == 1 and len(buffers) == 2 and {b.kind for b in buffers} == {"transient"}
    updates = [label for _, label in there.marks if label.startswith("update")]
    assert updates == [
        "update",
        "update embed",
        *(f"update blocks.{i}" for i in range(len(cfg.model.layer_kinds))),
        "update norm",
        "update head",
    ]


# --- a few layers for many ---------------------------------------------------------------------------------------------------

EXTENDED = {
    "equal layers": config(model={"layers": ["full"], "n_layers": 10}),
    "a pattern of two, two ranks": config(model={"layers": ["swa", "memory"], "n_layers": 17}, data={"seq_len": 512}, parallel={"cp": 2}),
    "recomputed, two passes, four shards": config(
        model={"layers": ["full"], "n_layers": 20},
        data={"seq_len": 512},
        train={"grad_accum": 3},
        parallel={"cp": 2, "dp_shard": 2},
        memory={"recompute": "block", "ffn_tile_tokens": 128},
    ),
    "groups of two blocks": config(
        model={"layers": ["full"], "n_layers": 18}, data={"seq_len": 256}, memory={"recompute": "block", "group_blocks": 2}
    ),
    "in eight bits": config(model={"layers": ["full"], "n_layers": 9}, data={"seq_len": 128}, memory={"quantise": "feed_forward"}),
    "swapped inputs": config(
        model={"layers": ["full"], "n_layers": 18}, data={"seq_len": 256}, memory={"recompute": "block", "offload": "inputs"}
    ),
    "offloaded optimizer states, two shards": config(
        model={"layers": ["full"], "n_layers": 14},
        data={"seq_len": 256},
        parallel={"dp_shard": 2},
        memory={"offload_optimizer": "host", "recompute": "block"},
    ),
    "offloaded states in eight bits, two shards": config(
        model={"layers": ["full"], "n_layers": 14},
        data={"seq_len": 256},
        parallel={"dp_shard": 2},
        optim={"preset": "adamw_8bit", "weights": "bf16_stochastic"},
        train={"precision": "bf16"},
        memory={"offload_optimizer": "host", "recompute": "block"},
    ),
    "parameters in host memory": config(
        model={"layers": ["full"], "n_layers": 20},
        memory={"offload_optimizer": "host", "offload_parameters": "host", "recompute": "block", "offload": "inputs"},
    ),
}


def summary(trace: Trace):
    """Everything that must be equal: how often which buffer lived from where to where, and all work."""
    buffers = sorted(
        (b.kind, b.op, b.module, b.layer or 0, b.phase, b.freed_in or "", b.size) for b in trace.buffers if b.op != "aten::stack"
    )
    ops = sorted((o.name, o.module, o.phase, o.flops, o.bytes, o.message_bytes, o.repeats) for o in trace.ops if o.name != "aten::stack")
    return buffers, ops


@pytest.mark.parametrize("name", EXTENDED)
def test_extended_trace_is_the_whole_one(name):
    cfg = EXTENDED[name]
    whole, extended = trace_request(request(cfg)), trace_request(request(cfg, whole=False))
    assert extended.notes.get("traced_layers", 99) < len(cfg.model.layer_kinds), extended.notes
    assert [label for _, label in whole.marks] == [label for _, label in extended.marks]
    # One tensor differs: the list of gradient norms, a number per parameter.
    slack = 8 * 16 * len(cfg.model.layer_kinds)
    ours, theirs = stretches(extended), stretches(whole)
    assert [label for label, _ in ours] == [label for label, _ in theirs]
    assert all(abs(a - b) <= slack for (_, a), (_, b) in zip(ours, theirs, strict=True))
    assert whole.peak("host")[0] == extended.peak("host")[0]
    assert whole.peak()[0] == pytest.approx(extended.peak()[0], abs=slack)
    ours, theirs = summary(extended), summary(whole)
    assert [entry[:-1] for entry in ours[0] if entry[4] != "clip"] == [entry[:-1] for entry in theirs[0] if entry[4] != "clip"]
    # What one operation does to the tensors of all layers is recorded layer by layer.
    counted = [[entry for entry in ops if entry[2] != "clip" or "_foreach" in entry[0]] for _, ops in (ours, theirs)]
    assert counted[0] == counted[1]


def test_what_is_cut():
    cut = shorten("x" + "ab" * 20 + "c")
    assert (cut.start, cut.period, cut.copies) == (1, 2, 13) and len(cut.traced) == 42 - 26
    assert [("x" + "ab" * 20 + "c")[i] for i in cut.traced] == list("x" + "ab" * 7 + "c")
    assert shorten("a" * 7).copies == 0 and shorten("abcabc").copies == 0
    assert shorten("a" * 20, multiple=2).period == 2


def test_kinds_add_up_and_save_round_trips(tmp_path):
    trace = trace_request(request(config()))
    peak, time = trace.peak()
    kinds = by_kind(trace.live_at(time))
    assert sum(kinds.values()) == peak
    parameters = sum(b.size for b in trace.buffers if b.kind == "parameter")
    assert sum(b.size for b in trace.buffers if b.kind == "optimizer") >= 2 * parameters > 0
    assert {"skeletal", "loss", "transient", "batch", "gradient"} <= {b.kind for b in trace.buffers}
    trace.save(tmp_path / "t.json.gz")
    loaded = Trace.load(tmp_path / "t.json.gz")
    assert loaded == trace
    (tmp_path / "bad.json.gz").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a saved trace"):
        Trace.load(tmp_path / "bad.json.gz")
    assert os.listdir(tmp_path) == sorted(os.listdir(tmp_path)) and not list(tmp_path.glob("*.tmp"))
