"""Time inside a sequence: replayed segments give the gradients of a backward pass through all of it, cut where they are to be cut."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from memory_mgmt.plan import MemoryPlan, Moment, Term
from memory_mgmt.plan_view import plain
from models.batch import IGNORE_INDEX, Batch, Bounds
from models.memory.protocol import detached
from models.segments import Segment
from models.transformer import Transformer, init_weights
from trainer.config import RunConfig
from trainer.engine import forward
from trainer.replay import SegmentRunner
from trainer.segment_rules import not_shared

T, VOCAB, SIZE = 45, 64, 8
DOCUMENTS = {"one document": ((0,), (0,)), "packed": ((0, 3, 20, 37), (0, 21))}
KINDS = {"rmt": {"tokens": 3}, "armt": {"tokens": 3}, "hmt": {"summary": 3, "sensory": 2, "cache": 3}}

documents = pytest.mark.parametrize("starts", DOCUMENTS.values(), ids=DOCUMENTS)
kinds = pytest.mark.parametrize("kind", KINDS)


def settings(kind: str, **train) -> dict:
    memory = {"kind": kind, kind: {"segment": SIZE, **KINDS[kind]}}
    model = {"d_model": 16, "n_heads": 2, "layers": ["full", "swa"], "window": 5, "init_std": 0.3, "memory": memory}
    return {"model": model, "data": {"seq_len": T}, "train": {"precision": "fp64", "device": "cpu", **train}}


def make(kind: str) -> Transformer:
    config = RunConfig.model_validate(settings(kind))
    model = Transformer(config.model, VOCAB).double()
    init_weights(model, 1)
    with torch.no_grad():  # values begin at 0, and what was written then is not read
        for name, p in model.named_parameters():
            if name.endswith("w_v"):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    return model


def make_batch(starts, tokens: int = T, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(VOCAB - 1, (len(starts), tokens), generator=generator)
    labels_BT = torch.randint(VOCAB, tokens_BT.shape, generator=generator)
    labels_BT[0, 5] = IGNORE_INDEX
    bounds = Bounds(tokens, ((0, tokens),), starts)
    return Batch(tokens_BT, labels_BT, torch.zeros_like(tokens_BT), bounds)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def replayed(model: Transformer, batch: Batch, **how) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    def call(shard, segment):
        return forward(model, shard, torch.device("cpu"), "fp64", segment)

    nll_BT = SegmentRunner(model, **how)(call, batch, 7.0)
    return nll_BT, gradients(model)


def through_all(model: Transformer, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Backpropagation through all segments, everything kept."""
    nll_BT = model(batch)
    (nll_BT.sum() / 7.0).backward()
    return nll_BT.detach(), gradients(model)


def same(got, want, tolerance=1e-12):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@kinds
@documents
@pytest.mark.parametrize("states", ["all", "sqrt"])
def test_gradients_are_those_of_backpropagation_through_all_segments(kind, starts, states):
    model, batch = make(kind), make_batch(starts)
    want_nll, want = through_all(model, batch)
    nll_BT, got = replayed(model, batch, states=states)
    same(nll_BT, want_nll)
    same(got, want)
    memory = want["stack.layers.0.w_k" if kind == "armt" else "stack.initial"]
    assert memory.abs().max() > 1e-3  # the memory's beginning matters, through all segments after it


@kinds
@documents
@pytest.mark.parametrize("states", ["all", "sqrt"])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_window_truncates(kind, starts, window, states):
    """Against every border's state cut loose by hand."""
    model, batch = make(kind), make_batch(starts)
    state, total = None, 0.0
    for i, step in enumerate(model.stack.plan_carried(batch.bounds)):
        if state is not None and i % window == 0:
            state = detached(state)
        nll_Bw, state = model(batch, Segment(step, state))
        total = total + nll_Bw.sum()
    (total / 7.0).backward()
    want = gradients(model)
    _, got = replayed(model, batch, window=window, states=states)
    same(got, want)


@kinds
def test_beyond_the_window_the_gradient_is_exactly_zero(kind):
    """A token that only the first segment has, and labels in the last one only: its embedding moves with every window but those cut off."""
    model, batch = make(kind), make_batch(((0,),))
    batch.tokens_BT[0, 2] = VOCAB - 1
    batch.labels_BT[:, :-3] = IGNORE_INDEX
    steps = len(model.stack.plan_carried(batch.bounds))
    for window in (1, 2, 4, 5, None):
        _, got = replayed(model, batch, window=window)
        row = got["embed.weight"][VOCAB - 1]
        assert (row.abs().max() > 0) == (window is None or window >= steps)
        assert window is None or window >= steps or torch.equal(row, torch.zeros_like(row))


@kinds
@pytest.mark.parametrize("states", ["all", "sqrt"])
def test_what_runs_again_draws_the_same_random_numbers(kind, states):
    model, batch = make(kind), make_batch(DOCUMENTS["packed"])
    dropout = nn.Dropout(0.5)
    plain = model.run_blocks
    model.run_blocks = lambda blocks, x, *rest: dropout(plain(blocks, x, *rest))
    torch.manual_seed(3)
    want_nll, want = through_all(model, batch)
    after = torch.rand(1)
    torch.manual_seed(3)
    nll_BT, got = replayed(model, batch, states=states, draws=True)
    same(nll_BT, want_nll)
    same(got, want)
    assert torch.equal(torch.rand(1), after)


@kinds
def test_one_segment_is_alive_at_a_time(kind):
    """Bytes that autograd holds between forward and backward, at most, whatever the length."""
    model, held = make(kind), []
    for tokens in (2 * SIZE, 8 * SIZE):
        alive, most = 0, 0

        class Saved:
            def __init__(self, x):
                nonlocal alive, most
                self.x = x
                alive += x.numel()
                most = max(most, alive)

            def __del__(self):
                nonlocal alive
                alive -= self.x.numel()

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.x):
            replayed(model, make_batch(((0,),), tokens))
        held.append(most)
    assert held[0] == held[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel": {"cp": 2}}, r"cp 2: rmt is not parallel inside one sequence.*set parallel.cp=1 parallel.dp_shard=2"),
        ({"parallel": {"tp": 2}}, r"parallel.tp 2: rmt is not split over tensor-parallel ranks"),
        ({"memory": {"recompute": "auto"}}, "recompute auto plans whole sequences"),
        ({"model": {"layers": ["full"]}, "train": {"bptt_segments": 2}}, "train.bptt_segments is read where a sequence is in segments"),
        (
            {"model": {"layers": ["full"]}, "memory": {"segment_states": "sqrt"}},
            "memory.segment_states is read where a sequence is in segments",
        ),
        ({"model": {"layers": ["full", "memory"], "memory": {"kind": "rmt"}}}, "stands around the whole stack and is no layer of it"),
    ],
    ids=str,
)
def test_what_segments_cannot_do_is_refused(change: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate({**settings("rmt"), **change})


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("rmt", {}, "diagonal_segments 3 is for model.memory.kind armt"),
        ("armt", {"parallel": {"dp_shard": 2}}, "done on one rank; set all degrees of parallel to 1"),
        ("armt", {"parallel": {"dp_shard": "auto"}}, "done on one rank; set all degrees of parallel to 1"),
        ("armt", {"train": {"bptt_segments": 2}}, "gradients cannot end inside a diagonal"),
        ("armt", {"memory": {"recompute": "mixer", "offload": "kept"}}, "needs memory.recompute none or block and memory.offload none"),
        ("armt", {"optim": {"fuse_backward": True, "clip_norm": None}}, "needs optim.fuse_backward false"),
    ],
    ids=str,
)
def test_what_diagonals_cannot_do_is_refused(kind: str, change: dict, message: str):
    train = {"diagonal_segments": 3, **change.get("train", {})}
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate({**settings(kind), **change, "train": train})


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_says_that_ranks_do_not_share_a_sequence(kind: str):
    bare = MemoryPlan("trace", "cpu", 1, (Term("step", "transient", 8, 8),), (Moment("forward", 8),), None, None)
    plan = replace(bare, sequence=not_shared(RunConfig.model_validate(settings(kind))))
    assert MemoryPlan.from_json(plan.to_json()) == plan
    assert re.search(rf"one sequence +not parallel inside: a segment of {kind} begins .*parallel.dp_shard", plain(plan))
    assert not not_shared(RunConfig()) and "one sequence" not in plain(bare)
