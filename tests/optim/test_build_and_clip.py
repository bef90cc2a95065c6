"""Groups, allocated states, and a global norm that does not depend on sharding."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from optim.build import build_optimizer
from optim.clip import clip_grad_norm, local_part
from optim.config import OptimConfig
from tests.distributed import run_distributed


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 11, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.linear(self.embed(ids))))


def make(dtype: torch.dtype = torch.float64) -> Small:
    torch.manual_seed(0)
    return Small().to(dtype)


def test_only_linear_weights_are_decayed_and_tied_weights_count_once() -> None:
    model = make()
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.3 for p in group["params"]}
    assert decayed == {id(model.linear.weight), id(model.head.weight)}
    tied = nn.Module()
    tied.embed = nn.Embedding(11, 5)
    tied.head = nn.Linear(5, 11, bias=False)
    tied.head.weight = tied.embed.weight
    groups = build_optimizer(tied, OptimConfig(weight_decay=0.3)).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.0)]


def test_the_preset_decides_which_optimizer_is_built() -> None:
    assert isinstance(build_optimizer(make(), OptimConfig(preset="adamw")), torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"optim\.preset 'other' is unknown; known: adamw"):
        build_optimizer(make(), OptimConfig().model_copy(update={"preset": "other"}))


def test_allocating_states_changes_nothing() -> None:
    """Training after allocation equals a plain torch AdamW bit for bit."""
    ids = torch.arange(8)
    ours, plain = make(), make()
    optimizer = build_optimizer(ours, OptimConfig(weight_decay=0.0, lr=1e-2))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    assert all(float(value.abs().sum()) == 0 for state in optimizer.state.values() for value in state.values())
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for _ in range(3):
        for model, opt in ((ours, optimizer), (plain, reference)):
            opt.zero_grad()
            model(ids).square().mean().backward()
            opt.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_clip_matches_torch() -> None:
    ours, plain = make(torch.float32), make(torch.float32)
    for model in (ours, plain):
        model(torch.arange(8)).square().sum().backward()
    norm = clip_grad_norm(ours.parameters(), 0.25, None)
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.25)
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-9)


def test_clip_without_limit_only_measures() -> None:
    model = make()
    model(torch.arange(8)).square().sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    assert float(clip_grad_norm(model.parameters(), None, None)) > 0
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))


def test_no_gradient_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        clip_grad_norm(make().parameters(), 1.0, None)


def _sharded_norm() -> tuple[float, list[torch.Tensor]]:
    model = make()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    model.set_gradient_divide_factor(1.0)
    ids = torch.arange(8)
    chunk = ids.tensor_split(dist.get_world_size())[dist.get_rank()]
    model(chunk).square().sum().backward()
    norm = clip_grad_norm(model.parameters(), 0.25, mesh.get_group())
    assert all(local_part(p.grad).numel() <= p.numel() for p in model.parameters())
    return float(norm), [p.grad.full_tensor() for p in model.parameters()]


@pytest.mark.parametrize("world_size", [2, 3])
def test_norm_and_clipped_gradients_do_not_depend_on_sharding(world_size: int) -> None:
    model = make()
    model(torch.arange(8)).square().sum().backward()
    norm = float(clip_grad_norm(model.parameters(), 0.25, None))
    for rank_norm, gradients in run_distributed(_sharded_norm, world_size):
        assert rank_norm == pytest.approx(norm, rel=1e-12)
        for ours, expected in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(ours, expected.grad, rtol=1e-10, atol=1e-12)
