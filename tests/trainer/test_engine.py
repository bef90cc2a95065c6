"""One step of the engine: ranks without labels, sums by position, accumulation."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from models.batch import IGNORE_INDEX, Batch, Bounds
from tests.distributed import run_distributed
from trainer import engine as engines
from trainer.build import build_engine, mesh_for
from trainer.config import RunConfig
from trainer.engine import Engine, LossSums

SEQ_LEN, VOCAB = 32, 64


def config(cp: int = 1) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"d_model": 16, "n_heads": 2, "layers": ["full", "memory"], "memory": {"chunk_size": 8}},
            "data": {"seq_len": SEQ_LEN},
            "train": {"precision": "fp64", "device": "cpu"},
            "parallel": {"cp": cp, "layout": "contiguous"},
        }
    )


def batch(first_valid: int, last_valid: int, seed: int = 0) -> Batch:
    """A sequence in which only positions [first_valid, last_valid) have labels."""
    tokens_BT = torch.randint(VOCAB, (1, SEQ_LEN), generator=torch.Generator().manual_seed(seed))
    labels_BT = tokens_BT.roll(-1, 1).clone()
    labels_BT[:, :first_valid] = IGNORE_INDEX
    labels_BT[:, last_valid:] = IGNORE_INDEX
    return Batch(tokens_BT, labels_BT, torch.arange(SEQ_LEN)[None], Bounds.whole(1, SEQ_LEN))


def make() -> Engine:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    settings = config(ranks)
    device = torch.device("cpu")
    return build_engine(settings, VOCAB, mesh_for(settings, device), device)


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in engine.model.named_parameters() if p.grad is not None}
    return {name: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for name, g in found.items()}


def loss_and_gradients(first_valid: int, last_valid: int) -> tuple[LossSums, dict[str, torch.Tensor]]:
    engine = make()
    sums = engine.forward_backward([batch(first_valid, last_valid)])
    return sums, gradients(engine)


@pytest.mark.parametrize(("first_valid", "last_valid"), [(0, 10), (20, 31), (0, 0)])
def test_a_rank_without_a_label_is_legal(first_valid: int, last_valid: int) -> None:
    """The last case has no label on any rank: the loss is nan by definition, gradients are zero and not nan."""
    alone, expected = loss_and_gradients(first_valid, last_valid)
    assert alone.valid_tokens == last_valid - first_valid
    for sums, found in run_distributed(loss_and_gradients, 2, first_valid, last_valid):
        assert sums.valid_tokens == alone.valid_tokens
        assert sums.nll == pytest.approx(alone.nll, rel=1e-12)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.isfinite(gradient).all()
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def test_micro_batches_add_up_to_the_loss_over_all_their_tokens() -> None:
    """Two micro-batches with unequal label counts: the mean is over tokens, not over micro-batches."""
    both = make()
    sums = both.forward_backward([batch(0, 31, seed=1), batch(0, 5, seed=2)])
    parts = [make().forward_backward([batch(0, 31, seed=1)]), make().forward_backward([batch(0, 5, seed=2)])]
    assert sums.valid_tokens == 36
    assert sums.loss == pytest.approx((parts[0].nll + parts[1].nll) / 36, rel=1e-12)
    by_hand = make()
    nll = sum(by_hand.model(b).sum() for b in (batch(0, 31, seed=1), batch(0, 5, seed=2)))
    (nll / 36).backward()  # type: ignore[union-attr]
    for name, gradient in gradients(by_hand).items():
        torch.testing.assert_close(gradients(both)[name], gradient, rtol=1e-9, atol=1e-12)


def sums_by_position() -> LossSums:
    engines.POSITION_BUCKET_TOKENS = 8
    return make().evaluate([batch(4, 24, seed=3)])


def test_losses_by_position_are_the_losses_at_those_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "POSITION_BUCKET_TOKENS", 8)
    engine = make()
    sums = engine.evaluate([batch(4, 24, seed=3)])
    with torch.no_grad():
        nll_T = engine.model(batch(4, 24, seed=3))[0]
    assert sums.bucket_tokens == (4, 8, 8, 0)
    assert sums.loss_by_position[:3] == pytest.approx([float(nll_T[4:8].mean()), float(nll_T[8:16].mean()), float(nll_T[16:24].mean())])
    assert sums.loss_by_position[3] is None
    assert [line.split(":")[1].split()[0] for line in sums.position_lines()] == ["loss", "loss", "loss", "no"]
    for split in run_distributed(sums_by_position, 2):
        assert split.bucket_tokens == sums.bucket_tokens
        assert split.bucket_nll == pytest.approx(sums.bucket_nll, rel=1e-12)


def test_a_gradient_that_is_not_finite_changes_no_parameter() -> None:
    engine = make()
    engine.forward_backward([batch(0, 31)])
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    next(engine.model.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]
    norm = engine.step(1e-2)
    assert norm != norm
    assert all(torch.equal(p, before[name]) for name, p in engine.model.named_parameters())
    assert not gradients(engine)


def names_and_kinds_after_evaluation() -> tuple[bool, bool, list[str]]:
    """Whether all parameters of the state are sharded and all have optimizer states, after an evaluation, and the names."""
    engine = make()
    engine.forward_backward([batch(0, 31)])
    engine.step(1e-2)
    engine.evaluate([batch(0, 31, seed=5)])
    state = engine.state_dict()
    sharded = all(isinstance(p, DTensor) for p in state["model"].values())
    complete = all(f"{name}.exp_avg" in state["optim"] for name in state["model"])
    registered = all(isinstance(p, DTensor) for p in engine.model.parameters())
    engine.forward_backward([batch(0, 31, seed=6)])
    engine.step(1e-2)
    return sharded and registered, complete, sorted(state["model"])


def test_the_state_after_an_evaluation_is_sharded_and_whole() -> None:
    expected = sorted(name for name, _ in make().model.named_parameters())
    assert run_distributed(names_and_kinds_after_evaluation, 2) == [(True, True, expected)] * 2
