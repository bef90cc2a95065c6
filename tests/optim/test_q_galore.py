"""Weights in eight bits and Q-GaLore: the same on any mesh, checkpoints that move, bytes by the formula."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from models.int8_weight import Int8Weight, stored
from optim.build import build_optimizer, quantise_matrices_
from optim.clip import local_part
from optim.fused_backward import fuse_backward
from optim.methods import Rows
from optim.plan import plan
from optim.writers import EIGHT_BITS, Chance
from tests.distributed import run_on_kept_ranks as run_distributed
from tests.optim.test_driver import feed, states_of, whole_tensors

GALORE: dict[str, Any] = {"preset": "q_galore", "rank": 8, "update_gap": 2, "svd": "exact"}
ADAM: dict[str, Any] = {"preset": "adamw_8bit", "weights": "int8_stochastic"}


class Small(nn.Module):
    """A tall and a wide matrix in eight bits, a rest in bfloat16; rows that split unevenly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(19, 64)
        self.up = nn.Linear(64, 143, bias=False)
        self.down = nn.Linear(144, 66, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(nn.functional.pad(self.up(self.embed(ids)), (0, 1)))


def small() -> Small:
    torch.manual_seed(1)
    model = Small().to(torch.bfloat16)
    quantise_matrices_(model)
    return model


def sharded(world: int) -> Small:
    model = small()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    return model


def kept(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a checkpoint holds, live."""
    parameters = {name: stored(parameter) for name, parameter in model.named_parameters()}
    return {name: value.detach() for name, value in parameters.items()} | states_of(model, optimizer)


def trained(settings: dict[str, Any], steps: int = 4, model: Small | None = None) -> dict[str, Tensor]:
    model = model or small()
    optimizer = build_optimizer(model, lr=1e-2, **settings)
    feed(model, optimizer, steps)
    return whole_tensors(kept(model, optimizer))


def trained_on_ranks(world: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int], Tensor]:
    model = sharded(world)
    bytes_ = [local_part(stored(parameter).detach()).untyped_storage().nbytes() for parameter in model.parameters()]
    adam, galore = (trained(settings, model=sharded(world)) for settings in (ADAM, GALORE))
    loss = model(torch.arange(5)).float().square().sum()
    loss.backward()
    gradient = model.up.weight.grad
    assert isinstance(gradient, DTensor) and gradient.dtype == torch.bfloat16
    return adam, galore, bytes_, loss.detach()


def test_sharded_is_whole():
    """Elementwise bit for bit; projections are summed in another order, so a rare number lies on the other side of its chance."""
    whole = [trained(settings) for settings in (ADAM, GALORE)]
    expected = small()(torch.arange(5)).float().square().sum()
    for adam, galore, bytes_, loss in run_distributed(trained_on_ranks, 3, 3):
        assert all(torch.equal(adam[name], value) for name, value in whole[0].items())
        for name in ("up.weight", "down.weight"):
            assert galore[name].shape == whole[1][name].shape
            columns = {"up.weight": 64, "down.weight": 144}[name]
            differ = (galore[name][:, :columns].int() - whole[1][name][:, :columns].int()).abs()
            assert float((differ > 0).float().mean()) < 1e-2 and int(differ.max()) <= 2, name
        assert torch.equal(loss, expected.detach())
        assert sum(bytes_) <= (sum(p.numel() for p in small().parameters()) * 1.3 + 2 * 19 * 64) / 3 + 400


def saved_on_ranks(world: int, folder: str) -> None:
    import torch.distributed.checkpoint as dcp

    model = sharded(world)
    optimizer = build_optimizer(model, lr=1e-2, **ADAM)
    feed(model, optimizer, 2)
    dcp.save({"all": kept(model, optimizer)}, checkpoint_id=folder)  # pyright: ignore[reportPrivateImportUsage]


def loaded_on_ranks(world: int, folder: str) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp

    model = sharded(world)
    optimizer = build_optimizer(model, lr=1e-2, **ADAM)
    dcp.load({"all": kept(model, optimizer)}, checkpoint_id=folder)  # pyright: ignore[reportPrivateImportUsage]
    feed(model, optimizer, 2, start=2)
    return whole_tensors(kept(model, optimizer))


def test_a_checkpoint_moves_between_numbers_of_ranks(tmp_path):
    expected = trained(ADAM, 4)
    run_distributed(saved_on_ranks, 2, 2, str(tmp_path))
    found = run_distributed(loaded_on_ranks, 3, 3, str(tmp_path))[0]
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_rows_are_written_alike_wherever_they_are_cut():
    whole, parts = (cast(Int8Weight, small().up.weight.detach()) for _ in range(2))
    start = whole.dequantised(torch.float32)
    update = torch.randn(143, 64, generator=torch.Generator().manual_seed(1))
    for step in (1, 2):
        EIGHT_BITS.write_(whole, {}, update, 1e-3, 0.1, Chance(0, 5, step, 0))
        for rank in range(3):
            rows = Rows.chunk(143, rank, 3)
            EIGHT_BITS.write_(parts[rows.slice], {}, update[rows.slice], 1e-3, 0.1, Chance(0, 5, step, rows.first * 64))
    assert torch.equal(whole.packed, parts.packed)
    step = 2 * float(start.abs().max()) / 255
    moved = whole.dequantised(torch.float32) - start - (-2e-3 * update - 2e-4 * start)
    assert float(moved.abs().max()) < 2.5 * step and abs(float(moved.mean())) < 0.02 * step  # by chance, and right on average


def test_small_updates_are_not_lost_in_eight_bits():
    """An update of a hundredth of a step, 60 times, with the ends of each group at rest: nearest would never move."""
    weight = Int8Weight.empty(200, 256)
    value = torch.linspace(-1, 1, 256).expand(200, -1).contiguous()
    weight.copy_(value)
    update = torch.full((200, 256), 2 / 255 / 100)
    update[:, 0] = update[:, -1] = 0
    for step in range(1, 61):
        EIGHT_BITS.write_(weight, {}, update, 1.0, 0.0, Chance(0, 5, step, 0))
    moved = (value - weight.dequantised(torch.float32))[:, 1:-1] / (2 / 255)
    assert float(moved.mean()) == pytest.approx(0.6, rel=0.02)


def test_bytes_are_the_formula_s():
    """Research section 1.2: 2 r hi (1 + 4/256) + r lo (0.5 + 8/256) + weights (1 + 8/256); blocks here are 128 in moments."""
    m, n, r = 1024, 512, 256
    model = nn.Sequential(nn.Linear(n, m, bias=False)).to(torch.bfloat16)
    quantise_matrices_(model)
    row = plan(build_optimizer(model, preset="q_galore", rank=r))[0]
    lazy, counter = 8 * 4, 4
    assert row.planned_bytes == row.measured_bytes == 2 * r * m * (1 + 4 / 128) + r * n * (0.5 + 8 / 256) + lazy + counter
    assert stored(next(model.parameters())).numel() == m * n * (1 + 8 / 256)


def test_a_basis_keeps_its_bits_between_refreshes_and_trains():
    model = small()
    optimizer = build_optimizer(model, lr=1e-2, preset="q_galore", rank=32, update_gap=4)
    weight = model.down.weight
    seen = []
    for step in range(6):
        feed(model, optimizer, 1, start=step)
        seen.append({key: value.clone() for key, value in optimizer.state[weight].items() if key.startswith("basis")})
    changes = [any(not torch.equal(a[key], b[key]) for key in a) for a, b in itertools.pairwise(seen)]
    assert len(seen[0]) == (3 if 66 * 32 >= 4096 else 1) and sum(changes) in (1, 2)


@pytest.mark.parametrize("weights", [None, "int8_stochastic", "bf16_stochastic", "fp32"])
def test_losses_fall_alike(weights):
    torch.manual_seed(1)
    model = Small().to(torch.float32 if weights == "fp32" else torch.bfloat16)
    if weights in (None, "int8_stochastic"):
        quantise_matrices_(model)
    optimizer = build_optimizer(model, preset="q_galore", rank=32, update_gap=10, lr=2e-2, weights=weights)
    ids = torch.arange(19)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(ids).float(), ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < 0.2


@pytest.mark.parametrize("settings", [GALORE, ADAM], ids=["q_galore", "adamw_8bit"])
def test_updated_in_the_backward_pass_is_the_same(settings):
    ends = []
    for fused in (False, True):
        model = small()
        optimizer = build_optimizer(model, lr=1e-2, **settings)
        inside = fuse_backward(model, optimizer) if fused else None
        for step in range(3):
            ids = torch.arange(19) * (step + 2) % 19
            loss = nn.functional.cross_entropy(model(ids).float(), ids)
            if inside is not None:
                with inside.update():
                    loss.backward()
            else:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        ends.append(kept(model, optimizer))
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no parameter is in eight bits; call optim.build.quantise_matrices_"):
        build_optimizer(Small().to(torch.bfloat16), preset="q_galore")
    with pytest.raises(ValueError, match="up.weight is kept in eight bits; set weights .* int8_stochastic, not bf16"):
        build_optimizer(small(), preset="sgd", weights="bf16")
