"""Tables: rows that are touched are updated as tensors of their own, others not at all, on any mesh and from any kind of gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from models.tables import table_parameters
from optim import driver
from optim.build import build_optimizer
from optim.clip import clip_grad_norm
from optim.row_sparse import COUNTER
from tests.distributed import run_distributed
from tests.optim.test_driver import states_of, whole_tensors

ROWS, COLUMNS = 45, 128


class Values(nn.Module):
    """As a product-key memory has them: rows picked by index, dense gradients."""

    row_sparse = ("weight",)

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.sparse = sparse
        self.weight = nn.Parameter(torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(index, self.weight, sparse=self.sparse)


def model_of(sparse: bool = False) -> nn.Module:
    model = nn.Module()
    model.values = Values(sparse)
    model.norm = nn.LayerNorm(8)
    return model


def touched(step: int) -> torch.Tensor:
    """Some rows several times, row 3 always, most never at first."""
    return torch.tensor([3, (7 * step) % ROWS, (7 * step) % ROWS, (11 * step + 1) % ROWS])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        rows = model.values(touched(step))
        (rows.sin().sum() + rows.square().sum()).backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_touched_row_is_a_tensor_of_its_own(sparse: bool, decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's AdamW in float64 on each row by itself, which sees only the steps that touch it."""
    monkeypatch.setattr(driver, "CHUNK_ELEMENTS", 10 * COLUMNS)
    model = model_of(sparse).double()
    settings = {"groups": ({"match": "values.*", "weight_decay": decay},)} if decay else {}
    optimizer = build_optimizer(model, preset="adamw_8bit", **settings)
    rows = [model.values.weight[i].detach().clone().requires_grad_() for i in range(ROWS)]
    alone = [torch.optim.AdamW([row], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay) for row in rows]
    for step in range(12):
        before = {name: value.clone() for name, value in states_of(model, optimizer).items()}
        weights = model.values.weight.detach().clone()
        train(model, optimizer, 1, step)
        picked = touched(step).unique().tolist()
        for i in picked:
            times = int((touched(step) == i).sum())
            (times * (rows[i].sin().sum() + rows[i].square().sum())).backward()
            alone[i].param_groups[0]["lr"] = 1e-2 / (1 + step)
            alone[i].step()
            alone[i].zero_grad()
        others = [i for i in range(ROWS) if i not in picked]
        assert torch.equal(model.values.weight[others], weights[others])
        for name, value in states_of(model, optimizer).items():
            if name.startswith("values") and not name.endswith("step"):
                assert torch.equal(value[others], before[name][others]), name
    torch.testing.assert_close(model.values.weight.detach(), torch.stack(rows).detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("preset", ["adamw_8bit", "adamw_4bit", "sgd"])
def test_sparse_gradients_are_dense_ones(preset: str) -> None:
    settings = {"momentum": 0.9} if preset == "sgd" else {}
    models = [model_of(sparse) for sparse in (False, True)]
    optimizers = [build_optimizer(model, preset=preset, **settings) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 6)
    assert torch.equal(models[0].values.weight, models[1].values.weight)
    first, second = (states_of(model, optimizer) for model, optimizer in zip(models, optimizers, strict=True))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    kinds = {row.name: (row.kind, row.planned_bytes == row.measured_bytes) for row in optimizers[0].plan()}  # pyright: ignore
    assert kinds["values.weight"] == ("RowSparse", True) and kinds["norm.weight"][1]
    counted = first.get(f"values.weight.{COUNTER}")
    assert (counted is None) == (preset == "sgd") and (counted is None or int(counted[3]) == 6)


def on_ranks(world: int) -> tuple[dict, dict, bool]:
    model = model_of()
    fully_shard(model.values, mesh=init_device_mesh("cpu", (world,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = build_optimizer(model, preset="adamw_8bit")
    model.values.set_gradient_divide_factor(1.0)
    for step in range(4):
        gradient = torch.zeros(ROWS, COLUMNS)
        gradient[touched(step)] = torch.randn(4, COLUMNS, generator=torch.Generator().manual_seed(step))
        parameter = model.values.weight
        own = gradient.tensor_split([min(-(-ROWS // world) * (r + 1), ROWS) for r in range(world - 1)])[torch.distributed.get_rank()]
        parameter.grad = DTensor.from_local(
            own.clone(), parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )
        optimizer.step()
    exact = all(row.planned_bytes == row.measured_bytes for row in optimizer.plan())  # pyright: ignore
    return whole_tensors(dict(model.named_parameters())), whole_tensors(states_of(model, optimizer)), exact


def test_sharded_is_whole_bit_for_bit() -> None:
    model = model_of()
    optimizer = build_optimizer(model, preset="adamw_8bit")
    for step in range(4):
        gradient = torch.zeros(ROWS, COLUMNS)
        gradient[touched(step)] = torch.randn(4, COLUMNS, generator=torch.Generator().manual_seed(step))
        model.values.weight.grad = gradient
        optimizer.step()
    for parameters, states, exact in run_distributed(on_ranks, 2, 2):
        assert exact and torch.equal(parameters["values.weight"], model.values.weight)
        assert all(torch.equal(states[name], value) for name, value in states_of(model, optimizer).items())


def test_the_norm_of_a_sparse_gradient() -> None:
    models = [model_of(sparse) for sparse in (False, True)]
    for model in models:
        model.values(touched(1)).square().sum().backward()
        norm = clip_grad_norm(model.parameters(), 0.5, None)
    assert float(norm) == pytest.approx(float(clip_grad_norm(models[0].parameters(), None, None)) * float(norm) / 0.5, rel=1e-5)
    torch.testing.assert_close(models[1].values.weight.grad.to_dense(), models[0].values.weight.grad)


def test_what_cannot_be_is_refused() -> None:
    embedding = nn.Sequential(nn.EmbeddingBag(9, 4, sparse=True))
    assert table_parameters(embedding) == {embedding[0].weight} and table_parameters(nn.Embedding(9, 4)) == set()
    with pytest.raises(ValueError, match=r"adamw is torch's and updates every row of values\.weight.*set optim\.preset adamw_8bit"):
        build_optimizer(model_of(), preset="adamw")
    wrong = model_of()
    wrong.values.row_sparse = ("bias",)
    with pytest.raises(ValueError, match="values.row_sparse names 'bias', which is no parameter of two dims"):
        build_optimizer(wrong, preset="adamw_8bit")
