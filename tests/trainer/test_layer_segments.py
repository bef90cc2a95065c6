"""Memories inside layers read segment after segment: gradients are those of the whole sequence at once, one segment is alive at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from memory_mgmt.apply import apply_policy
from memory_mgmt.config import MemoryConfig
from memory_mgmt.offload import HostStore
from memory_mgmt.policy_settings import policy_of
from models.batch import IGNORE_INDEX, Batch, Bounds
from models.layer_segments import LayerSegments
from models.memory.attached import positions
from models.memory.protocol import detached
from models.segments import Segment
from models.transformer import Block, Transformer, init_weights
from tests.trainer.test_replay import gradients, replayed, same, through_all
from trainer.carried_states import CarriedStates
from trainer.config import RunConfig

T, VOCAB, SIZE = 45, 64, 8
PACKED = ((0, 3, 16, 37), (0, 21))
"""One document begins where a segment does."""
TITANS = {"kind": "titans", "titans": {"chunk_size": 4}}
KINDS: dict[str, dict[str, Any]] = {
    "window": {"layers": ["swa", "swa"]},
    "wide window": {"layers": ["swa"], "window": 3 * SIZE},
    "window of one": {"layers": ["swa"], "window": 1},
    "gated_deltanet": {"memory": {"chunk_size": 4}},
    "gsa": {"memory": {"kind": "gsa", "gsa": {"n_slots": 4}}},
    "mamba2": {"memory": {"kind": "mamba2", "chunk_size": 4, "mamba2": {"state_dim": 4, "expand": 1.0}}},
    "titans": {"memory": {**TITANS, "titans": {"chunk_size": 4, "network": "linear"}}},
    "titans mlp": {"memory": {**TITANS, "titans": {"chunk_size": 5, "network": "mlp", "reset_every": 20}}},
    "mag": {"layers": ["memory", "memory"], "memory": {**TITANS, "attach": "mag"}},
    "mal": {"layers": ["memory", "memory"], "memory": {"attach": "mal", "chunk_size": 4}},
    "after": {"layers": ["memory", "memory"], "memory": {"attach": "after", "chunk_size": 4}},
    "mac": {"memory": {"kind": "titans", "attach": "mac", "mac": {"segment": 5, "persistent": 2}}},
    "product keys": {
        "layers": ["swa", "swa"],
        "feedforward": ["dense", "product_keys"],
        "product_keys": {"n_keys": 4, "heads": 2, "top_k": 3, "key_dim": 4},
    },
    **{kind: {"memory": {"kind": kind}} for kind in ("infini", "mom", "slots", "fam", "neurocache")},
}
kinds = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "product keys"])


def settings(kind: str, **train) -> dict:
    model = {"d_model": 16, "n_heads": 2, "d_ff": 24, "layers": ["swa", "memory"], "window": 5, "init_std": 0.3, **KINDS[kind]}
    return {"model": model, "data": {"seq_len": T}, "train": {"precision": "fp64", "device": "cpu", "segment_tokens": SIZE, **train}}


def make(kind: str, size: int = SIZE) -> Transformer:
    config = RunConfig.model_validate({**settings(kind), "optim": {"preset": "adamw_8bit"}})
    torch.set_default_dtype(torch.float64)
    try:
        model = Transformer(config.model, VOCAB)
    finally:
        torch.set_default_dtype(torch.float32)
    init_weights(model, 1)
    model.layer_segments = LayerSegments([cast(Block, block).mixer for block in model.blocks], size)
    return model


def segments_of(model: Transformer) -> LayerSegments:
    assert model.layer_segments is not None
    return model.layer_segments


def make_batch(starts=PACKED, tokens: int = T) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(VOCAB - 1, (len(starts), tokens), generator=generator)
    labels_BT = torch.randint(VOCAB, tokens_BT.shape, generator=generator)
    labels_BT[0, 5] = IGNORE_INDEX
    bounds = Bounds(tokens, ((0, tokens),), starts)
    return Batch(tokens_BT, labels_BT, positions(bounds, torch.device("cpu")), bounds)


@kinds
def test_gradients_are_those_of_the_whole_sequence(kind):
    model, batch = make(kind), make_batch()
    want_nll, want = through_all(model, batch)
    for states in ("all", "sqrt"):
        nll_BT, got = replayed(model, batch, states=states)
        same(nll_BT, want_nll)
        same(got, want)
    with torch.no_grad():
        same(model(batch), want_nll)
    assert all(memory.handed is None for memory in segments_of(model).states.memories.values())


@pytest.mark.parametrize("kind", ["window", "wide window", "window of one", "gated_deltanet", "mag", "after"])
@pytest.mark.parametrize("policy", ["plain", "block, tiles"])
def test_where_only_the_state_is_wanted_the_last_layer_stops_at_it(kind, policy):
    """The same states, no feed-forward of the last layer; the step that follows runs it again."""
    model, batch = make(kind), make_batch()
    if policy != "plain":
        apply_policy(model, policy_of(MemoryConfig(**POLICIES[policy]), model.config.layer_kinds))
    ran: list[int] = []
    for i, block in enumerate(model.blocks):
        cast(Block, block).norm2.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    segments, states, counts = segments_of(model), [], []
    with segments.in_place(), torch.no_grad():
        for loss in (False, True):
            state, found = None, []
            for step in segments.plan_carried(batch.bounds):
                _, state = model(batch, Segment(step, state, loss=loss))
                found.append(state)
            states.append(found)
            counts.append(ran.count(len(model.blocks) - 1))
            ran.clear()
    same(states[0], states[1])
    if policy == "plain":  # a policy runs what is inside of a block without the modules' own calls
        assert counts == [0, len(states[0])]


@pytest.mark.parametrize("kind", ["gated_deltanet", "mal"])
@pytest.mark.parametrize(("window", "states"), [(1, "all"), (2, "all"), (4, "sqrt")])
def test_a_window_of_segments_truncates(kind, window, states):
    """Against every border's state, and keys, cut loose by hand; what is cut matters."""
    model, batch = make(kind), make_batch()
    state, total = None, torch.zeros((), dtype=torch.float64)
    with segments_of(model).in_place():
        for i, step in enumerate(segments_of(model).plan_carried(batch.bounds)):
            state = detached(state) if state is not None and i % window == 0 else state
            nll_Bw, state = model(batch, Segment(step, state))
            total = total + nll_Bw.sum()
    (total / 7.0).backward()
    want = gradients(model)
    _, whole = replayed(model, batch)
    assert max((whole[name] - want[name]).abs().max() for name in want) > 1e-3
    model.zero_grad()
    same(replayed(model, batch, window=window, states=states)[1], want)


POLICIES: dict[str, dict[str, Any]] = {
    "block": {"recompute": "block"},
    "block, tiles": {"recompute": "block", "ffn_tile_tokens": 3, "memory_tile_tokens": 4, "loss_tile_tokens": 5},
    "mixer": {"recompute": "mixer"},
    "tiles": {"memory_tile_tokens": 4},
    "host": {"recompute": "mixer", "offload": "inputs"},
    "host, all": {"offload": "kept"},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["gated_deltanet", "titans", "mag", "mal"])
def test_gradients_are_the_same_whatever_is_recomputed_or_swapped(kind, policy):
    model, batch = make(kind, 2 * SIZE), make_batch()
    want = through_all(model, batch)
    store = HostStore(torch.device("cpu"))
    apply_policy(model, policy_of(MemoryConfig(**POLICIES[policy]), model.config.layer_kinds), store)
    same(replayed(model, batch), want)
    store.close()


@pytest.mark.parametrize("kind", ["window", "gated_deltanet", "titans mlp", "mag", "slots"])
def test_states_go_on_to_the_next_sequence(kind):
    """Rows that continue and rows that begin anew; what is left, and gradients, are those of whole sequences."""
    model, found = make(kind), []
    for by_segments in (False, True):
        carried = CarriedStates(model, 2, 1, torch.device("cpu"), torch.float64, None)
        for continued in ((False, False), (True, False), (True, True)):
            batch = replace(make_batch(), continued=continued)
            with carried.handed_on(0, batch):
                found.append([*(replayed if by_segments else through_all)(model, batch), carried.kept])
        found[-1] = [*found[-1], carried.gathered()]
    same(found[3:], found[:3])


def test_value_tables_are_read_segment_after_segment():
    model, batch = make("product keys"), make_batch()
    want_nll, want = through_all(model, batch)
    nll_BT, got = replayed(model, batch, states="sqrt")
    same(nll_BT, want_nll)
    same({name: g.to_dense() for name, g in got.items()}, {name: g.to_dense() for name, g in want.items()})


def test_what_runs_again_draws_the_same_random_numbers():
    model, batch = make("mag"), make_batch()
    dropout, plain, found = nn.Dropout(0.5), model.run_blocks, []
    model.run_blocks = lambda blocks, x, *rest: dropout(plain(blocks, x, *rest))
    for states in ("all", "sqrt"):
        torch.manual_seed(3)
        found.append([*replayed(model, batch, states=states, draws=True), torch.rand(1)])
    torch.manual_seed(3)
    with segments_of(model).in_place():  # all kept
        state, total = None, torch.zeros((), dtype=torch.float64)
        for step in segments_of(model).plan_carried(batch.bounds):
            nll_Bw, state = model(batch, Segment(step, state))
            total = total + nll_Bw.sum()
    (total / 7.0).backward()
    want = gradients(model)
    for nll_BT, got, after in found:
        same(got, want)
        same(nll_BT.sum(), total.detach())
        assert torch.equal(after, found[0][2])


@pytest.mark.parametrize("kind", ["gated_deltanet", "mag"])
@pytest.mark.parametrize("policy", ["tiles", "block, tiles"])
def test_one_segment_is_alive_at_a_time(kind, policy):
    """Bytes that autograd holds between forward and backward, at most, whatever the length."""
    held = []
    for tokens in (3 * SIZE, 9 * SIZE):
        model, alive, most = make(kind), 0, 0
        apply_policy(model, policy_of(MemoryConfig(**POLICIES[policy]), model.config.layer_kinds))

        class Saved:
            def __init__(self, x):
                nonlocal alive, most
                self.x = x.detach()  # with its node it would hold the graph that holds it
                alive += x.numel()
                most = max(most, alive)

            def __del__(self):
                nonlocal alive
                alive -= self.x.numel()

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.x):
            replayed(model, make_batch(((0,),), tokens))
        held.append(most)
    assert held[0] == held[1] > 0


SWA = {"layers": ["swa"], "window": 5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"layers": ["swa", "full"]}}, "train.segment_tokens 8 needs model.layers of kind swa and memory"),
        ({"model": {**SWA, "memory": {"kind": "rmt"}}}, "rmt has segments of its own .model.memory.rmt.segment.; leave it out"),
        ({"parallel": {"cp": 3}, "model": SWA}, "needs parallel.cp=1 .*parallel.dp_shard=3"),
        ({"parallel": {"tp": 5}, "model": SWA}, "needs parallel.tp=1"),
        ({"engine": "deepspeed"}, "engine native"),
        ({"memory": {"recompute": "auto"}}, "memory.recompute none, mixer or block"),
        ({"memory": {"recompute": "block", "group_blocks": 2}}, "memory.group_blocks 1"),
        ({"train": {"bptt_segments": 2}}, "train.bptt_segments is read where a sequence is in segments"),
    ],
    ids=str,
)
def test_what_segments_cannot_do_is_refused(change: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate({**settings("gated_deltanet"), **change})


def test_prefixes_are_refused():
    batch = make_batch()
    bounds = replace(batch.bounds, prefixes=((2, 3, 16, 37), (0, 21)))
    with pytest.raises(ValueError, match="no document can have a prefix"):
        segments_of(make("window")).plan_carried(bounds)
