"""Memories inside layers read segment after segment: gradients are those of the whole sequence at once, one segment is alive at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from memory_mgmt.apply import apply_policy
from memory_mgmt.config import MemoryConfig
from memory_mgmt.policy_settings import policy_of
from models.batch import IGNORE_INDEX, Batch, Bounds
from models.layer_segments import LayerSegments
from models.memory.attached import positions
from models.memory.protocol import Carried, detached
from models.segments import Segment
from models.transformer import Transformer, init_weights
from tests.trainer.test_replay import gradients, replayed, same, through_all
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
    **{kind: {"memory": {"kind": kind}} for kind in ("infini", "mom", "slots", "fam", "neurocache")},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def settings(kind: str, **train) -> dict:
    model = {"d_model": 16, "n_heads": 2, "d_ff": 24, "layers": ["swa", "memory"], "window": 5, "init_std": 0.3, **KINDS[kind]}
    return {"model": model, "data": {"seq_len": T}, "train": {"precision": "fp64", "device": "cpu", "segment_tokens": SIZE, **train}}


def make(kind: str, size: int = SIZE) -> Transformer:
    config = RunConfig.model_validate(settings(kind))
    torch.set_default_dtype(torch.float64)
    try:
        model = Transformer(config.model, VOCAB)
    finally:
        torch.set_default_dtype(torch.float32)
    init_weights(model, 1)
    model.layer_segments = LayerSegments([block.mixer for block in model.blocks], size)
    return model


def make_batch(starts=PACKED, tokens: int = T) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(VOCAB - 1, (len(starts), tokens), generator=generator)
    labels_BT = torch.randint(VOCAB, tokens_BT.shape, generator=generator)
    labels_BT[0, 5] = IGNORE_INDEX
    bounds = Bounds(tokens, ((0, tokens),), starts)
    return Batch(tokens_BT, labels_BT, positions(bounds, torch.device("cpu")), bounds)


@kinds
@pytest.mark.parametrize("starts", [((0,), (0,)), PACKED], ids=["one document", "packed"])
def test_gradients_are_those_of_the_whole_sequence(kind, starts):
    model, batch = make(kind), make_batch(starts)
    want_nll, want = through_all(model, batch)
    for states in ("all", "sqrt"):
        nll_BT, got = replayed(model, batch, states=states)
        same(nll_BT, want_nll)
        same(got, want)
    with torch.no_grad():
        same(model(batch), want_nll)
    assert all(memory.handed is None for memory in model.layer_segments.states.memories.values())
