"""Diagonals of (segment, layer) give what one segment after the other gives: losses, gradients, states, in the trainer's replay too."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor

from models.batch import Batch, Bounds
from models.memory.armt import AssociativeMemory
from models.memory.armt_diagonals import Diagonals
from models.segments import Segment, joined, plan_segments
from models.transformer import Transformer, init_weights
from trainer.config import RunConfig
from trainer.engine import forward
from trainer.replay import SegmentRunner

VOCAB, SIZE = 64, 8
MODELS = {
    "windows": {"layers": ["full", "swa", "swa"], "window": 5},
    "biases, norms, groups": {"layers": ["full"], "n_layers": 2, "qkv_bias": True, "qk_norm": True, "n_kv_heads": 1},
    "one layer": {"layers": ["full"]},
}


def make(name: str, dtype: torch.dtype = torch.float64) -> Transformer:
    memory = {"kind": "armt", "armt": {"segment": SIZE, "tokens": 6, "key_dim": 16, "features": 3}}
    config = {"d_model": 16, "n_heads": 2, "init_std": 0.3, "memory": memory, **MODELS[name]}
    model = Transformer(RunConfig.model_validate({"model": config}).model, VOCAB).to(dtype)
    init_weights(model, 1)
    with torch.no_grad():  # values and biases begin at 0
        generator = torch.Generator().manual_seed(2)
        for parameter in model.parameters():
            if not parameter.any():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype), alpha=0.3)
            elif parameter.dim() == 1:  # norms begin at 1 in all layers
                parameter.add_(torch.rand(parameter.shape, generator=generator).to(dtype), alpha=0.3)
    return model


def batch_of(tokens: int, documents: tuple[tuple[int, ...], ...] = ((0,), (0,))) -> Batch:
    text = torch.randint(VOCAB, (len(documents), tokens + 1), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    return Batch(text[:, :-1], text[:, 1:], torch.zeros_like(text[:, 1:]), Bounds(tokens, ((0, tokens),), documents))


def run(model: Transformer, batch: Batch, replay: bool, **how: object) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    if replay:
        nll_BT = SegmentRunner(model, **how)(lambda shard, segment: forward(model, shard, torch.device("cpu"), "fp64", segment), batch, 7.0)  # type: ignore[arg-type]
    else:
        nll_BT = model(batch)
        (nll_BT.sum() / 7.0).backward()
    return nll_BT.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("tokens", "documents"),
    [(48, ((0,), (0,))), (45, ((0,), (0,))), (61, ((0, 24), (0, 24))), (45, ((0, 3, 20), (0,)))],
    ids=["whole", "rest", "documents", "ragged"],
)
@pytest.mark.parametrize("segments", [2, 9])
def test_losses_and_gradients_are_those_of_the_plain_order(
    name: str, tokens: int, documents: tuple[tuple[int, ...], ...], segments: int
) -> None:
    model, batch = make(name), batch_of(tokens, documents)
    want_nll, want = run(model, batch, replay=False)
    memory = cast(AssociativeMemory, model.stack)
    steps = len(memory.plan_carried(batch.bounds))
    for kept in (True, False):  # everything and at once; diagonals made again, and in the trainer's replay
        memory.diagonals = Diagonals(segments, recompute=not kept)
        assert (len(memory.plan_carried(batch.bounds)) < steps) == (documents[0] == documents[1])
        nll_BT, got = run(model, batch, replay=False) if kept else run(model, batch, replay=True, states="sqrt")
        torch.testing.assert_close(nll_BT, want_nll, rtol=1e-12, atol=1e-12)
        assert got.keys() == want.keys()
        for name_of, gradient in want.items():
            assert (got[name_of] - gradient).norm() <= 1e-12 * gradient.norm(), name_of
    assert want["stack.layers.0.w_v"].abs().max() > 1e-3


def test_a_state_goes_on_and_low_precision_is_as_near() -> None:
    """In bfloat16 autocast: the state after two sequences, the second from what the first left, and the loss."""
    model, batch = make("windows", torch.float32), batch_of(32)
    found = []
    for diagonals in (None, Diagonals(3)):
        cast(AssociativeMemory, model.stack).diagonals = diagonals
        memory = cast(AssociativeMemory, model.stack)
        steps, state, losses = memory.plan_carried(batch.bounds), None, []
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(2):
                for step in steps:
                    nll_Bw, state = model(batch, Segment(step, state))
                    losses.append(nll_Bw)
        assert state is not None and all(value.dtype == torch.float32 for value in state.values())
        found.append((torch.cat(losses, 1), state))
    (plain, state), (nll, other) = found
    assert (nll - plain).abs().max() < 0.3 and (nll - plain).abs().mean() < 0.03
    assert all((state[name] - other[name]).abs().max() < 0.1 * state[name].abs().max() for name in state)


def test_steps_are_joined_where_all_rows_give_whole_segments() -> None:
    def spans(documents: tuple[tuple[int, ...], ...], n: int) -> list[tuple[int, int]]:
        steps = plan_segments(Bounds(50, ((0, 50),), documents), SIZE, [0] * len(documents), whole=True)
        return [(step.parts[0].start, step.parts[0].end) for step in joined(steps, SIZE, n)]

    assert spans(((0,),), 1) == [(a, min(a + 8, 50)) for a in range(0, 50, 8)]
    assert spans(((0,),), 4) == [(0, 32), (32, 48), (48, 50)]
    assert spans(((0, 16),) * 2, 9) == [(0, 16), (16, 48), (48, 50)]  # a document begins with a step
    assert spans(((0, 20),), 9) == [(0, 16), (16, 20), (20, 44), (44, 50)]
    assert len(spans(((0,), (0, 9)), 9)) == 7 + 1  # rows in different places
