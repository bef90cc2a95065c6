"""Loops of equal turns that are followed through a few of them (models/repeat.py) trace what all of them would."""

from collections import Counter

import pytest

import models.repeat
import optim.driver
import optim.pieces
from memory_mgmt.cost_model import Rates, Topology, step_schedule
from memory_mgmt.devices import device_named
from memory_mgmt.trace import Trace
from memory_mgmt.traced_plan import stretches
from parallel.dims import ParallelDims
from trainer.config import RunConfig
from trainer.step_trace import trace_request
from trainer.tracing import TraceRequest

MODEL = {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 256, "layers": ["full"]}
PIECE = 1 << 12
"""Elements; rows of the model above fill pieces and the hash's tiles without rest, as whole tiles they would leave a few bytes."""
CASES = {
    "ring of twelve": {"parallel": {"cp": 12}, "data": {"seq_len": 3072}},
    "ring of twelve, in order": {"parallel": {"cp": 12, "layout": "contiguous"}, "data": {"seq_len": 3072}},
    "adamw in eight bits by pieces": {"optim": {"preset": "adamw_8bit", "weights": "bf16_stochastic"}, "train": {"precision": "bf16"}},
    "loss in many tiles, the last one short": {"memory": {"loss_tile_tokens": 12}},
    "loss in many tiles of two ranks' tokens": {"parallel": {"tp": 2}, "memory": {"loss_tile_tokens": 16}},
    "adamw of 24 bits, updated in the backward pass": {
        "optim": {"preset": "adamw_4bit", "weights": "bf16_24bit", "fuse_backward": True, "clip_norm": None},
        "train": {"precision": "bf16"},
    },
}


def traced(sections: dict) -> tuple[RunConfig, Trace]:
    config = RunConfig.model_validate({"model": MODEL, "data": {"seq_len": 256}, "memory": {"loss_tile_tokens": 256}, **sections})
    return config, trace_request(TraceRequest(config, 1280, "cpu", None, whole=True).to_dict())


def work(trace: Trace) -> Counter:
    """Operations, their flops, traffic and messages, by name and phase."""
    found: Counter = Counter()
    for op in trace.ops:
        for what, much in (("times", op.repeats), ("flops", op.flops), ("bytes", op.bytes), ("message", op.message_bytes)):
            found[op.phase, op.name, what] += much
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_few_turns_are_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim.driver, "CHUNK_ELEMENTS", PIECE)
    monkeypatch.setattr(optim.pieces, "_CPU_PIECE", PIECE)
    config, few = traced(CASES[name])
    monkeypatch.setattr(models.repeat, "repeated", lambda n, x: range(n))
    _, every = traced(CASES[name])
    assert len(few.ops) < 0.95 * len(every.ops)
    assert few.peak()[0] == every.peak()[0]
    assert stretches(few) == stretches(every)
    assert work(few) == work(every)
    rates = Rates.from_device(device_named("h100"), cores=1)
    topology = Topology.of(ParallelDims.from_config(config.parallel, config.parallel.ranks_asked), 8)
    ours, theirs = step_schedule(few, rates, topology), step_schedule(every, rates, topology)
    assert [s.label for s in ours] == [s.label for s in theirs]
    for what in ("start", "end", "waited_communication"):
        assert [getattr(s, what) for s in ours] == pytest.approx([getattr(s, what) for s in theirs], rel=1e-9, abs=1e-12)
