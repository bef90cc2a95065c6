"""The engine with updates in the backward pass: the same parameters under every memory policy and on ranks, a plan without gradients."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from torch.distributed.tensor import DTensor

from memory_mgmt.allocator_log import record_cpu_allocations
from memory_mgmt.policy_settings import policy_of
from models.batch import Batch, Bounds
from models.errors import UserError
from tests.distributed import run_distributed
from tests.trainer.test_step_trace import real_peak, request
from trainer.build import build_engine, host_store, mesh_for
from trainer.config import RunConfig
from trainer.config_file import resolve
from trainer.engine import Engine
from trainer.state import TrainState
from trainer.step_trace import _batch, trace_request

VOCAB, SEQ_LEN = 64, 64


def config(**sections) -> RunConfig:
    small = {
        "model": {"d_model": 32, "n_heads": 2, "layers": ["full", "memory"], "memory": {"chunk_size": 8}},
        "data": {"seq_len": SEQ_LEN},
        "optim": {"clip_norm": None},
        "train": {"device": "cpu"},
        "parallel": {"layout": "contiguous"},
    }
    return RunConfig.model_validate({name: {**small.get(name, {}), **sections.get(name, {})} for name in {*small, *sections}})


def batch(seed: int) -> Batch:
    tokens_BT = torch.randint(VOCAB, (1, SEQ_LEN), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens_BT, tokens_BT.roll(-1, 1), torch.arange(SEQ_LEN)[None], Bounds.whole(1, SEQ_LEN))


def engine_of(cfg: RunConfig) -> Engine:
    policy, device = policy_of(cfg.memory, cfg.model.layer_kinds), torch.device("cpu")
    return build_engine(cfg, VOCAB, mesh_for(cfg, device), device, policy, host_store(policy, device, None, None))


def fused_and_not(sections: dict, steps: int = 2, k: int = 2) -> list[tuple[list, list, dict]]:
    """Losses, norms and all tensors of the state after some steps, fused and not."""
    results = []
    for fuse in (True, False):
        engine = engine_of(config(**{**sections, "optim": {"clip_norm": None, **sections.get("optim", {}), "fuse_backward": fuse}}))
        losses, norms = [], []
        for step in range(steps):
            losses.append(engine.forward_backward([batch(10 * step + i) for i in range(k)], 1e-2).loss)
            norms.append(engine.step(1e-2))
        state = engine.state_dict()
        named = {**state["model"], **state["optim"]}
        whole = {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in named.items()}
        results.append((losses, norms, whole))
    return results


def assert_equal(results: list[tuple[list, list, dict]]) -> None:
    (losses, norms, found), (expected_losses, expected_norms, expected) = results
    assert losses == expected_losses and norms == pytest.approx(expected_norms, rel=1e-12)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("memory", "model", "precision", "preset"),
    [
        ({}, {}, "fp32", "adamw"),
        ({"recompute": "block"}, {"tie_embeddings": True}, "bf16", "apollo_mini"),
        ({"recompute": "mixer", "offload": "kept", "ffn_tile_tokens": 16}, {}, "fp32", "adamw"),
        ({"recompute": "block", "group_blocks": 2, "memory_tile_tokens": 16}, {"layers": ["full", "memory"] * 2}, "fp32", "galore"),
        ({"quantise": "feed_forward", "ffn_tile_tokens": 32}, {"layers": ["swa", "full"]}, "fp32", "adamw_8bit"),
        ({"recompute": "block", "offload": "inputs"}, {}, "bf16", "adamw"),
    ],
)
def test_parameters_are_those_of_an_update_afterwards(memory, model, precision, preset):
    k = 1 if preset == "galore" else 2  # its micro-batches are summed in the subspace
    assert_equal(fused_and_not({"memory": memory, "model": model, "train": {"precision": precision}, "optim": {"preset": preset}}, k=k))


def several_on_ranks(cases: list[dict]) -> list:
    return [fused_and_not(case) for case in cases]


def test_on_ranks_too():
    cases = [
        {"parallel": {"cp": 2, "dp_replicate": 2}, "optim": {"preset": "adafactor"}, "memory": {"recompute": "block"}},
        {"parallel": {"dp_shard": 2, "cp": 2}, "optim": {"preset": "adamw"}, "memory": {"recompute": "block", "group_blocks": 2}},
    ]
    for results in run_distributed(several_on_ranks, 4, cases):
        for result in results:
            assert_equal(result)


def not_finite() -> tuple[float, bool, bool, float]:
    """The loss of a broken model, whether anything moved, whether gradients are gone, and the loss after it is mended."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    engine = engine_of(config(optim={"clip_norm": None, "fuse_backward": True}, parallel={"cp": ranks}))
    embed = engine.parameters["embed.weight"]
    local = embed.to_local() if isinstance(embed, DTensor) else embed
    kept = local.detach().clone()
    with torch.no_grad():
        if torch.distributed.is_initialized() is False or torch.distributed.get_rank() == 0:  # one rank's alone is enough
            local[0] = float("inf")
    before = {name: value.detach().clone() for name, value in engine.parameters.items()}
    broken = Batch(torch.zeros(1, SEQ_LEN, dtype=torch.long), *(getattr(batch(0), n) for n in ("labels_BT", "positions_BT", "bounds")))
    loss = engine.forward_backward([batch(1), broken], 1e-2).loss
    norm = engine.step(1e-2)
    assert norm != norm
    same = all(torch.equal(local_of(value), local_of(before[name])) for name, value in engine.parameters.items())
    gone = all(value.grad is None for value in engine.parameters.values())
    with torch.no_grad():
        local.copy_(kept)
    return loss, same, gone, engine.forward_backward([batch(1)], 1e-2).loss


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def test_a_loss_that_is_not_finite_moves_nothing():
    for loss, same, gone, after in [not_finite(), *run_distributed(not_finite, 2)]:
        assert not torch.isfinite(torch.tensor(loss)) and same and gone and after < 10


def test_a_fused_engine_needs_its_rate_before_the_backward_pass():
    engine = engine_of(config(optim={"clip_norm": None, "preset": "lomo"}))
    with pytest.raises(ValueError, match="learning rate"):
        engine.forward_backward([batch(0)])


def test_a_restart_goes_on_with_the_norm_of_the_last_step():
    cfg = config(optim={"fuse_backward": True, "clip_norm": 0.1, "fused_clip": "previous"})
    ends = []
    for stops in (False, True):
        engine, state = engine_of(cfg), TrainState()
        for step in range(4):
            if stops and step == 2:
                kept, state = engine.state_dict(), TrainState.from_json(json.loads(json.dumps(state.to_json())))
                engine = engine_of(cfg)
                with torch.no_grad():
                    for part, tensors in engine.state_dict().items():
                        for name, tensor in tensors.items():
                            tensor.copy_(kept[part][name])
                assert engine.fused is not None
                engine.fused.load_state_dict({"norm": state.grad_norm})
            engine.forward_backward([batch(step)], 1e-2)
            state.grad_norm = engine.step(1e-2)
        ends.append((state.grad_norm, engine.state_dict()["model"]))
    assert ends[0][0] == ends[1][0] and all(torch.equal(ends[0][1][name], value) for name, value in ends[1][1].items())
    assert TrainState.from_json({"step": 3, "tokens": 5, "cursor": {}}).grad_norm is None  # of a checkpoint from before


# --- the plan

WIDE = {"model": {"d_model": 128, "n_heads": 4, "layers": ["full"] * 4}, "data": {"seq_len": 32}, "memory": {"loss_tile_tokens": 32}}
TRACED = {
    "adamw": {"optim": {"preset": "adamw"}},
    "lomo, two passes": {"optim": {"preset": "lomo"}, "train": {"grad_accum": 2}},
    "a method for matrices": {"optim": {"preset": "apollo_mini", "rest": "sgd"}, "memory": {"recompute": "block"}},
    "clipped": {"optim": {"preset": "sgd", "momentum": 0.9, "clip_norm": 1.0, "fused_clip": "per_tensor"}},
}


def traced_config(sections: dict, fuse: bool | None = True) -> RunConfig:
    merged = {name: {**WIDE.get(name, {}), **sections.get(name, {})} for name in {*WIDE, *sections}}
    merged["optim"] = {"clip_norm": None, "fuse_backward": fuse, **merged["optim"]}
    return RunConfig.model_validate(merged)


@pytest.mark.parametrize("name", TRACED)
def test_traced_peak_is_the_allocators(name):
    cfg = traced_config(TRACED[name])
    assert trace_request(request(cfg)).peak()[0] == pytest.approx(real_peak(cfg), rel=1e-3)


def least_peaks(values: list[dict]) -> list[int]:
    """Of a few steady steps of each configuration: gloo's threads let go of a message now and then late."""
    torch.set_num_threads(1)
    found = []
    for cfg in map(RunConfig.model_validate, values):
        with record_cpu_allocations() as log:
            engine = build_engine(cfg, 320, mesh_for(cfg, torch.device("cpu")), torch.device("cpu"))
            peaks = []
            for _ in range(4):
                start = log.mark()
                engine.forward_backward([_batch(cfg, cfg.data.seq_len)], 1e-3)
                engine.step(1e-3)
                peaks.append(log.live_bytes(0, start) + log.peak_bytes(start))
            found.append(min(peaks[1:]))
        del engine  # what it frees later would be counted in the next one's log
        gc.collect()
    return found


def test_on_two_ranks_the_plan_is_lower_by_what_the_allocator_says():
    sections = {"parallel": {"cp": 2}, "optim": {"preset": "adamw"}}
    fused, plain = traced_config(sections), traced_config(sections, fuse=False)
    planned = [trace_request(request(cfg)).peak()[0] for cfg in (fused, plain)]
    measured = run_distributed(least_peaks, 2, [cfg.model_dump(mode="json") for cfg in (fused, plain)])
    less = min(m[1] for m in measured) - min(m[0] for m in measured)
    assert planned[1] - planned[0] == pytest.approx(less, rel=1e-3) and less > 0.05 * planned[1]


def test_the_plan_counts_a_step_that_renews_all_bases():
    """The first one, which holds whole gradients of all micro-batches; later ones hold sums in subspaces."""
    cfg = traced_config({"optim": {"preset": "galore", "rank": 8, "rest": "sgd"}, "train": {"grad_accum": 2}})
    engine, peaks = build_engine(cfg, 320, None, torch.device("cpu")), []
    with record_cpu_allocations() as log:
        for _ in range(2):
            start = log.mark()
            engine.forward_backward([_batch(cfg, cfg.data.seq_len)] * 2, 1e-3)
            engine.step(1e-3)
            peaks.append(log.peak_bytes(start))
    trace = trace_request(request(cfg))
    # Memory that the driver keeps from step to step is there before the traced step and not before the first real one.
    there = sum(b.size for b in trace.of("device") if b.lower == 0 and b.kind != "batch")
    assert trace.peak()[0] - there == pytest.approx(peaks[0], rel=1e-2)
    gradients = sum(b.size for b in trace.buffers if b.kind == "parameter" and b.layer is not None)
    assert peaks[0] - peaks[1] > 0.8 * gradients


def test_the_plan_of_a_fused_run_is_lower_by_the_gradients():
    fused, plain = (trace_request(request(traced_config({"optim": {"preset": "adamw"}}, fuse))) for fuse in (True, False))
    gradients = sum(b.size for b in plain.of("device") if b.kind == "gradient")
    parameters = sum(b.size for b in plain.of("device") if b.kind == "parameter")
    assert gradients == parameters
    assert sum(b.size for b in fused.of("device") if b.kind == "gradient") == parameters  # each is seen, for a shorter time
    layer = max(sum(b.size for b in plain.of("device") if b.kind == "parameter" and b.layer == i) for i in range(4))
    assert plain.peak()[0] - fused.peak()[0] > gradients - 1.5 * layer


def test_a_few_layers_stand_for_many():
    cfg = traced_config({"optim": {"preset": "adamw"}, "model": {"d_model": 64, "n_heads": 4, "layers": ["full"], "n_layers": 8}})
    whole, extended = trace_request(request(cfg)), trace_request(request(cfg, whole=False))
    assert extended.notes.get("traced_layers", 99) < 8, extended.notes
    assert extended.peak()[0] == pytest.approx(whole.peak()[0], abs=8 * 16 * 8)
    assert [label for _, label in whole.marks] == [label for _, label in extended.marks]


# --- refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["optim.fuse_backward=true"], ["optim.clip_norm 1.0", "optim.fused_clip=previous", "optim.clip_norm=null"]),
        (["optim.preset=lomo"], ["optim.preset lomo", "per_tensor"]),
        (["optim.fuse_backward=true", "optim.clip_norm=null", "memory.offload_optimizer=host"], ["memory.offload_optimizer host"]),
    ],
)
def test_what_a_fused_run_cannot_do_is_refused(settings, words):
    with pytest.raises(UserError) as error:
        resolve("configs/debug_cpu.yaml", settings)
    assert all(word in str(error.value) for word in words)
