"""The driver: equal to torch's optimizers where states are exact, the same on any number of ranks, checkpoints that move between them."""

from __future__ import annotations

import functools
import io

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from optim import driver
from optim.build import build_optimizer
from optim.clip import local_part
from optim.driver import ComposedOptimizer
from optim.elementwise import ElementwiseAdam, Sgd
from optim.lane import Lane
from optim.placement import Placed
from optim.plan import plan, table
from optim.routing import route
from optim.rules import Adam
from tests.distributed import run_on_kept_ranks as run_distributed

ELEMENTWISE = {"adamw_8bit": {}, "adamw_4bit": {}, "sgd": {"momentum": 0.9}}
MATRICES = {
    "adafactor": {},
    "adalomo": {},
    "galore": {"rank": 8, "update_gap": 3, "svd": "exact"},
    "galore_8bit": {"rank": 8, "update_gap": 3},
    "fira": {"rank": 8, "update_gap": 3},
    "apollo": {"rank": 8, "update_gap": 3},
    "apollo_mini": {"update_gap": 3},
    "natural_galore": {"rank": 8, "update_gap": 3, "svd": "exact"},
    "frugal": {"update_gap": 3},
    "subset_norm_sm": {"rank": 8, "update_gap": 3, "svd": "exact"},
    "muon": {},
    "shampoo_4bit": {"block_order": 80, "statistics_gap": 1, "root_gap": 2},
}
PRESETS = ELEMENTWISE | MATRICES
NEAR = {"fira": 1e-5, "galore_8bit": 1e-4}
"""Relative distance of a sharded run's parameters where it is above 1e-6: the iterated subspace in float32; codes that round the
other way."""


class Tiny(nn.Module):
    """Shapes that split unevenly over 2, 3 and 4 ranks, a head and an embedding, a norm and a scalar-like gate."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(67, 96)
        self.up = nn.Linear(96, 130, bias=False)
        self.down = nn.Linear(130, 96, bias=False)
        self.few = nn.Linear(96, 3)
        self.norm = nn.LayerNorm(96)
        self.head = nn.Linear(96, 67, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.down(torch.relu(self.up(self.norm(x)))) * self.few(x).sum(-1, keepdim=True).sigmoid()
        return self.head(x)


def make(dtype: torch.dtype = torch.float32) -> Tiny:
    torch.manual_seed(1)
    return Tiny().to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        ids = (torch.arange(48) * (step + 3)) % 67
        loss = torch.nn.functional.cross_entropy(model(ids), (ids + 1) % 67)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()
        optimizer.zero_grad()


@functools.cache
def given_gradient(seed: int, shape: tuple[int, ...], graded: bool) -> torch.Tensor:
    """To be copied: it is the same for all presets and meshes."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if graded and gradient.ndim == 2:
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        gradient = left * 0.5 ** torch.arange(left.shape[1]).clamp(max=20) @ right
    return gradient


def feed(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    start: int = 0,
    *,
    graded: bool = True,
    through: torch.dtype | None = None,
) -> None:
    """Steps with given gradients, the same on any mesh. ``graded``: matrices' singular values halve one after the other, so that a
    projection to some of them is well determined. ``through``: a dtype that gradients are rounded to first."""
    for step in range(start, start + steps):
        for i, parameter in enumerate(model.parameters()):
            gradient = given_gradient(1000 * step + i, tuple(parameter.shape), graded)
            gradient = gradient.to(through or parameter.dtype).to(parameter.dtype).clone()
            if isinstance(parameter, DTensor):
                placed = Placed.of(parameter)
                local = gradient[placed.rows.slice].clone()
                shape, stride = parameter.shape, parameter.stride()
                gradient = DTensor.from_local(local, parameter.device_mesh, parameter.placements, shape=shape, stride=stride)
            parameter.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()
        optimizer.zero_grad()


def sharded(world: int, replicas: int = 1, dtype: torch.dtype = torch.float32) -> Tiny:
    model = make(dtype)
    shape, names = ((replicas, world), ("replicate", "shard")) if replicas > 1 else ((world,), ("shard",))
    fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    return model


def whole_tensors(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in named.items()}


def states_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": value for name, p in model.named_parameters() for key, value in optimizer.state[p].items()}


# --- against torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_adam_is_torch_s(dtype, monkeypatch):
    monkeypatch.setattr(driver, "CHUNK_ELEMENTS", 1000)  # several chunks per tensor, the last ones short
    ours, plain = make(dtype), make(dtype)
    lanes = [Lane(r.name, r.parameter, ElementwiseAdam(Adam((0.9, 0.95), 1e-8, "torch")), "fp32") for r in route(ours)]
    optimizer = ComposedOptimizer([{"params": list(ours.parameters()), "weight_decay": 0.1}], lanes, 1e-2)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    feed(ours, optimizer, 20)  # given gradients: small ones would grow differences of rounding
    feed(plain, reference, 20)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_exact_sgd_is_torch_s(momentum):
    ours, plain = make(torch.float64), make(torch.float64)
    optimizer = build_optimizer(ours, preset="sgd", momentum=momentum, weight_decay=0.0)
    reference = torch.optim.SGD(plain.parameters(), lr=1e-2, momentum=momentum)
    train(ours, optimizer, 8)
    train(plain, reference, 8)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert sum(len(state) for state in optimizer.state.values()) == (2 if momentum else 1) * len(list(ours.parameters()))


@pytest.mark.parametrize(("preset", "near"), [("adamw_8bit", 0.02), ("adamw_4bit", 0.15)])
def test_few_bits_train_like_many(preset, near):
    ours, plain = make(), make()
    train(ours, build_optimizer(ours, preset=preset, weight_decay=0.0), 40)
    train(plain, build_optimizer(plain, preset="adamw", weight_decay=0.0), 40)
    ids = torch.arange(67)
    losses = [float(torch.nn.functional.cross_entropy(model(ids), (ids + 1) % 67)) for model in (ours, plain, make())]
    assert losses[1] < losses[2] and losses[0] < losses[1] + near * (losses[2] - losses[1])


# --- on ranks


def trained_on_ranks(preset: str, world: int, replicas: int) -> tuple[dict, dict, list[tuple[int, int]]]:
    model = sharded(world, replicas)
    optimizer = build_optimizer(model, preset=preset, **PRESETS[preset])
    feed(model, optimizer, 5)
    bytes_ = [(row.planned_bytes, row.measured_bytes) for row in plan(optimizer)]
    return whole_tensors(dict(model.named_parameters())), whole_tensors(states_of(model, optimizer)), bytes_


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("world", "replicas"), [(2, 1), (3, 1), (4, 1), (2, 2)])
def test_sharded_is_whole(preset, world, replicas):
    """Elementwise rules and codecs know nothing of where rows are cut: bit for bit. Methods sum over ranks in another order."""
    exact = preset in ELEMENTWISE
    model = make()
    optimizer = build_optimizer(model, preset=preset, **PRESETS[preset])
    feed(model, optimizer, 5)
    whole_bytes = {row.shape: row.measured_bytes for row in plan(optimizer)}
    results = run_distributed(trained_on_ranks, world * replicas, preset, world, replicas)
    for parameters, states, sizes in results:
        for name, value in model.named_parameters():
            difference = float((parameters[name] - value).norm() / value.norm())
            assert difference <= (0 if exact else NEAR.get(preset, 1e-6)), name
        for name, value in states_of(model, optimizer).items():
            assert states[name].shape == value.shape and states[name].dtype == value.dtype, name
            assert torch.equal(states[name], value) or not exact, name
        assert all(planned == measured for planned, measured in sizes)
    # Rows are dealt whole, so the largest share is up to a row more; counters and norms of updates are on every rank.
    total = sum(row.measured_bytes for row in plan(optimizer))
    one_row = sum(size / min(shape) for shape, size in whole_bytes.items())
    largest = max(sum(measured for _, measured in sizes) for _, _, sizes in results)
    assert largest <= 1.05 * total / world + one_row + 12 * len(results[0][2])


def save_on_ranks(preset: str, world: int, folder: str) -> None:
    import torch.distributed.checkpoint as dcp

    model = sharded(world)
    optimizer = build_optimizer(model, preset=preset, **PRESETS[preset])
    feed(model, optimizer, 3)
    dcp.save(  # pyright: ignore[reportPrivateImportUsage]
        {"model": dict(model.named_parameters()), "optim": states_of(model, optimizer)}, checkpoint_id=folder
    )


def load_on_ranks(preset: str, world: int, folder: str) -> tuple[dict, dict]:
    import torch.distributed.checkpoint as dcp

    model = sharded(world)
    optimizer = build_optimizer(model, preset=preset, **PRESETS[preset])
    dcp.load(  # pyright: ignore[reportPrivateImportUsage]
        {"model": dict(model.named_parameters()), "optim": states_of(model, optimizer)}, checkpoint_id=folder
    )
    feed(model, optimizer, 3, start=3)
    return whole_tensors(dict(model.named_parameters())), whole_tensors(states_of(model, optimizer))


@pytest.mark.parametrize(
    ("preset", "moves"),
    [("adamw_8bit", {1: (3,), 2: (3, 4), 3: (2,), 4: (1,)}), ("adamw_4bit", {2: (3,)})],
)
def test_a_checkpoint_moves_between_numbers_of_ranks(preset, moves, tmp_path):
    """Training goes on bit for bit as if it had never stopped."""
    model = make()
    optimizer = build_optimizer(model, preset=preset, **PRESETS[preset])
    feed(model, optimizer, 6)
    uninterrupted = whole_tensors(dict(model.named_parameters())), whole_tensors(states_of(model, optimizer))
    for save, loads in moves.items():
        folder = str(tmp_path / str(save))
        run_distributed(save_on_ranks, save, preset, save, folder)
        for load in loads:
            for found, expected in zip(run_distributed(load_on_ranks, load, preset, load, folder)[0], uninterrupted, strict=True):
                assert all(torch.equal(found[name], value) for name, value in expected.items()), (save, load)


# --- as a library


@pytest.mark.parametrize("preset", PRESETS)
def test_state_dict_is_tensors_and_numbers(preset):
    model = make()
    optimizer = build_optimizer(model, preset=preset, **PRESETS[preset])
    train(model, optimizer, 3)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other = make()
    resumed = build_optimizer(other, preset=preset, **PRESETS[preset])
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optim"])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert {k: v.dtype for k, v in optimizer.state[a].items()} == {k: v.dtype for k, v in resumed.state[b].items()}
    train(model, optimizer, 3, start=3)
    train(other, resumed, 3, start=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_closure_computes_gradients():
    model = make()
    optimizer = build_optimizer(model, preset="sgd", lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.arange(8)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure)


@pytest.mark.parametrize("preset", ["adamw", "adamw_8bit"])
def test_the_rest_has_its_own_rate(preset):
    model = make()
    optimizer = build_optimizer(model, preset=preset, lr=1e-3, rest_lr=1e-2)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    for routed in route(model):
        assert rates[id(routed.parameter)] == pytest.approx(1e-3 if routed.part == "matrix" else 1e-2)
    before = whole_tensors(dict(model.named_parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # a first step of Adam moves every element by its rate, less what decay takes
    moved = {name: float((before[name] - value.detach()).mean()) for name, value in model.named_parameters()}
    assert moved["norm.weight"] == pytest.approx(1e-2, rel=1e-2) and moved["up.weight"] == pytest.approx(1e-3, rel=1e-1)


def test_the_plan_counts_every_byte():
    model = make()
    rows = plan(build_optimizer(model, preset="adamw_8bit"))
    assert [row.name for row in rows if row.planned_bytes != row.measured_bytes] == []
    assert {row.name for row in rows} == {name for name, _ in model.named_parameters()}
    plain = plan(build_optimizer(make(), preset="adamw"))
    assert [row for row in plain if row.planned_bytes != row.measured_bytes] == []
    assert sum(row.planned_bytes for row in rows) < 0.4 * sum(row.planned_bytes for row in plain)
    assert table(rows).splitlines()[-1].startswith("total")


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match="unknown; known: adamw"):
        build_optimizer(make(), build_config_with("other"))
    with pytest.raises(ValueError, match="bfloat16"):
        build_optimizer(make(torch.bfloat16), preset="sgd")
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(nn.Module(), preset="sgd")
    with pytest.raises(ValueError, match="has no lane"):
        ComposedOptimizer([{"params": list(make().parameters())}], [], 1e-3)


def build_config_with(preset: str):
    from optim.config import OptimConfig

    return OptimConfig().model_copy(update={"preset": preset})


def shard_columns() -> str:
    model = nn.Linear(8, 8, bias=False)
    mesh = init_device_mesh("cpu", (2,))
    weight = DTensor.from_local(torch.zeros(8, 4), mesh, [Shard(1)])
    model.weight = nn.Parameter(weight)
    with pytest.raises(ValueError) as error:
        build_optimizer(model, preset="sgd")
    return str(error.value)


def test_an_unknown_placement_is_refused():
    assert all("Shard(0)" in text for text in run_distributed(shard_columns, 2))


def test_matrices_are_linear_weights_of_hidden_layers():
    parts = {routed.name: (routed.part, routed.decayed) for routed in route(make())}
    assert parts["up.weight"] == parts["few.weight"] == ("matrix", True)
    assert parts["embed.weight"] == ("rest", False) and parts["head.weight"] == ("rest", True)
    assert parts["norm.weight"] == parts["few.bias"] == ("rest", False)
    tied = make()
    tied.head.weight = tied.embed.weight
    assert "head.weight" not in {routed.name for routed in route(tied)}


def test_local_part_of_a_plain_tensor_is_itself():
    tensor = torch.zeros(3)
    assert local_part(tensor) is tensor and isinstance(Sgd(), Sgd)
