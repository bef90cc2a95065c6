"""Parameters of few bits: right on average where rounded by chance, near float32 with 24 bits, the same bits on any mesh."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from optim.build import build_optimizer
from optim.config import Weights
from optim.driver import ComposedOptimizer
from optim.methods import Rows
from optim.plan import plan, table
from optim.writers import WRITERS, Chance
from optim.zero import build_zero_optimizer
from tests.distributed import run_on_kept_ranks as run_distributed
from tests.optim.test_driver import PRESETS, feed, make, sharded, states_of, train, whole_tensors

BF16 = torch.bfloat16
LOW: tuple[Weights, ...] = ("bf16", "bf16_stochastic", "bf16_24bit")
ALL: tuple[Weights, ...] = ("fp32", *LOW)


def chance(step: int, seed: int = 0, first: int = 0) -> Chance:
    return Chance(seed, key=5, step=step, first=first)


def written(name: Weights, start: Tensor, update: Tensor, steps: int, lr: float = 1.0, decay: float = 0.0, seed: int = 0) -> Tensor:
    """The weight, as precisely as it is kept, after equal updates."""
    writer = WRITERS[name]
    weight = start.to(torch.float32 if name == "fp32" else BF16, copy=True)
    states = {key: torch.zeros(spec.shape, dtype=spec.dtype) for key, spec in writer.states(tuple(start.shape)).items()}
    for step in range(1, steps + 1):
        writer.write_(weight, states, update, lr, decay, chance(step, seed))
    return writer.read(weight, states)


# --- one parameter


def test_chance_is_right_on_average_where_the_nearest_never_moves():
    """G13: within 1e-4 of float32's mean. An update of 0.0015 on a weight of 1 is below half of bfloat16's step downwards (1/256)."""
    start, update = torch.ones(1 << 10, 1 << 8), torch.full((1 << 10, 1 << 8), 0.0015)
    exact = written("fp32", start, update, 20)
    assert torch.equal(written("bf16", start, update, 20), start)
    found = written("bf16_stochastic", start, update, 20)
    assert float(found.mean()) == pytest.approx(float(exact.mean()), rel=1e-4)
    means = torch.stack([written("bf16_stochastic", start[:16], update[:16], 20, seed=seed).mean() for seed in range(32)])
    error = means.mean() - exact.mean()
    assert abs(float(error)) < 4 * float(means.std()) / 32**0.5 < 1e-3  # many seeds: no bias beyond chance
    assert float(means.std()) > 0  # seeds differ


def test_chance_follows_a_random_walk_of_updates_and_decay():
    """Mean over elements with the same weight and updates against float32; the nearest is far off."""
    generator = torch.Generator().manual_seed(1)
    updates = torch.randn(30, generator=generator) * 3e-4
    rows = torch.ones(1 << 16, 1) * 0.7
    ends = {}
    for name in ALL:
        writer, weight = WRITERS[name], rows.to(torch.float32 if name == "fp32" else BF16, copy=True)
        states = {key: torch.zeros(spec.shape, dtype=spec.dtype) for key, spec in writer.states((1 << 16, 1)).items()}
        for step, size in enumerate(updates.tolist(), 1):
            writer.write_(weight, states, torch.full_like(rows, size), 1.0, 2e-3, chance(step))
        ends[name] = float(writer.read(weight, states).double().mean())
    start = float(rows[0].to(BF16))
    exact = ends["fp32"] + (start - 0.7) * (1 - 2e-3) ** 30  # from the bfloat16 that the others start from
    assert abs(ends["bf16_stochastic"] - exact) < 1e-4 * exact < abs(ends["bf16"] - exact) / 10
    assert abs(ends["bf16_24bit"] - exact) < 30 * 2**-16 * exact


def test_24_bits_are_within_their_rounding_of_float32():
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(300, 70, generator=generator).to(BF16).float()
    update = torch.randn(300, 70, generator=generator)
    one = written("bf16_24bit", start, update, 1, lr=1e-3, decay=0.1)
    exact = start.double() * (1 - 1e-3 * 0.1) - 1e-3 * update.double()
    assert float(((one - exact).abs() / exact.abs()).max()) <= 2**-16 * 1.01
    small = written("bf16_24bit", torch.ones(1, 9), torch.full((1, 9), 1.0), 100, lr=3e-5)
    assert torch.allclose(small, torch.ones(1, 9) - 3e-3, atol=100 * 2**-16) and float(small.max()) < 1 - 2e-3


@pytest.mark.parametrize("name", LOW)
def test_rows_are_written_alike_wherever_they_are_cut(name):
    generator = torch.Generator().manual_seed(3)
    start, update = torch.randn(70, 130, generator=generator).to(BF16), torch.randn(70, 130, generator=generator)
    writer = WRITERS[name]
    states = {key: torch.zeros(spec.shape, dtype=spec.dtype) for key, spec in writer.states((70, 130)).items()}
    whole, parts = start.clone(), start.clone()
    others = {key: value.clone() for key, value in states.items()}
    for step in (1, 2):
        writer.write_(whole, states, update, 1e-2, 0.1, chance(step))
        for rank in range(3):
            rows = Rows.chunk(70, rank, 3)
            mine = {key: value[rows.slice] for key, value in others.items()}
            writer.write_(parts[rows.slice], mine, update[rows.slice], 1e-2, 0.1, chance(step, first=rows.first * 130))
    assert torch.equal(whole, parts) and all(torch.equal(states[key], others[key]) for key in states)
    assert not torch.equal(whole, start)


# --- optimizers


@pytest.mark.parametrize("preset", ["adamw", *PRESETS])
def test_every_preset_takes_every_writer(preset):
    """Against the same preset on float32 parameters, from the same numbers and gradients."""
    settings = PRESETS.get(preset, {})
    plain, start = make(BF16).float(), make(BF16)
    feed(plain, build_optimizer(plain, preset=preset, **settings), 2, through=BF16)
    for weights in LOW:
        ours = make(BF16)
        optimizer = build_optimizer(ours, preset=preset, weights=weights, **settings)
        assert isinstance(optimizer, ComposedOptimizer)
        feed(ours, optimizer, 2)
        step = 2**-16 if weights == "bf16_24bit" else 2**-8
        for (name, parameter), exact, before in zip(ours.named_parameters(), plain.parameters(), start.parameters(), strict=True):
            found = optimizer.lanes[parameter].writer.read(parameter.detach(), optimizer.state[parameter])
            moved, size = float((exact - before).detach().norm()), float(exact.detach().norm())
            assert parameter.dtype == BF16 and float((found - exact).detach().norm()) < 2 * step * size + 1e-4 * moved, (weights, name)
            assert 2 * step * size < 0.5 * moved or weights != "bf16_24bit" or preset == "sgd", name  # the bound means something
        rows = plan(optimizer)
        assert all(row.planned_bytes == row.measured_bytes and row.weights == weights for row in rows)
        assert weights in table(rows)


def test_states_stay_float32_beside_bfloat16_and_come_back():
    model = make(BF16)
    optimizer = build_optimizer(model, preset="adamw", weights="bf16_24bit")
    train(model, optimizer, 3)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other = make(BF16)
    resumed = build_optimizer(other, preset="adamw", weights="bf16_24bit")
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optim"])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert {k: v.dtype for k, v in optimizer.state[a].items()} == {k: v.dtype for k, v in resumed.state[b].items()}
        assert all(torch.equal(value, resumed.state[b][key]) for key, value in optimizer.state[a].items())
        assert optimizer.state[a]["exp_avg"].dtype == torch.float32 and optimizer.state[a]["correction"].dtype == torch.int8
    train(model, optimizer, 2, start=3)
    train(other, resumed, 2, start=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_seed_changes_the_chance():
    ends = []
    for seed in (1, 1, 2):
        model = make(BF16)
        feed(model, build_optimizer(model, preset="sgd", weights="bf16_stochastic", seed=seed), 1)
        ends.append(model.up.weight.detach().clone())
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_what_does_not_fit_is_refused():
    for preset in ("adamw", "sgd"):
        with pytest.raises(ValueError, match="is bfloat16; say how it is rounded with weights .*: bf16, bf16_stochastic, bf16_24bit"):
            build_optimizer(make(BF16), preset=preset)
        with pytest.raises(ValueError, match="no parameter is bfloat16"):
            build_optimizer(make(), preset=preset, weights="bf16")
    with pytest.raises(ValueError, match="float16"):
        build_optimizer(make(torch.float16), preset="sgd", weights="bf16")
    with pytest.raises(ValueError, match="optim.weights bf16 is not for DeepSpeed's ZeRO"):
        build_zero_optimizer(make(BF16), preset="adamw_8bit", weights="bf16")


# --- on ranks


class Small(nn.Module):
    """Rows that split unevenly, one matrix large enough for eight bits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(19, 24)
        self.up = nn.Linear(24, 201, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.up(self.embed(ids))


def small() -> Small:
    torch.manual_seed(1)
    return Small().to(BF16)


def hundred_steps(model: Small, weights: str, trained: bool = False) -> dict[str, Tensor]:
    """Parameters, as bits, and states after 100 steps with given gradients or, ``trained``, those of a loss."""
    optimizer = build_optimizer(model, preset="adamw_8bit", weights=weights)
    for step in range(100):
        if trained:
            ids = torch.arange(12) * (step + 3) % 19
            nn.functional.cross_entropy(model(ids).float(), ids + 7).backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            feed(model, optimizer, 1, start=step, graded=False)
    bits = {name: value.view(torch.int16) for name, value in whole_tensors(dict(model.named_parameters())).items()}
    return bits | whole_tensors(states_of(model, optimizer))


HUNDRED = ("bf16_stochastic", "bf16_24bit")


def on_two_ranks() -> dict[str, dict[str, Tensor]]:
    """100 steps with given gradients on rows of two ranks and on two replicas; 100 of real training on two replicas."""
    ends = {}
    for weights in HUNDRED:
        for kind, mesh in {"sharded": (1, 2), "replicas": (2, 1), "trained": (2, 1)}.items():
            model = small()
            fully_shard(model, mesh=init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard")))
            ends[f"{weights} {kind}"] = hundred_steps(model, weights, kind == "trained")
    return ends


def test_after_100_steps_replicas_and_shards_hold_the_same_bits():
    first, second = run_distributed(on_two_ranks, 2)
    for kind in first:
        assert all(torch.equal(value, second[kind][name]) for name, value in first[kind].items()), kind
    for weights in HUNDRED:
        expected = hundred_steps(small(), weights)
        for kind in ("sharded", "replicas"):
            assert all(torch.equal(value, first[f"{weights} {kind}"][name]) for name, value in expected.items()), kind


def saved_on_ranks(weights: str, world: int, folder: str) -> None:
    import torch.distributed.checkpoint as dcp

    model = sharded(world, dtype=BF16)
    optimizer = build_optimizer(model, preset="adamw_8bit", weights=weights)
    feed(model, optimizer, 3, graded=False)
    dcp.save(  # pyright: ignore[reportPrivateImportUsage]
        {"model": dict(model.named_parameters()), "optim": states_of(model, optimizer)}, checkpoint_id=folder
    )


def loaded_on_ranks(weights: str, world: int, folder: str) -> tuple[dict, dict]:
    import torch.distributed.checkpoint as dcp

    model = sharded(world, dtype=BF16)
    optimizer = build_optimizer(model, preset="adamw_8bit", weights=weights)
    dcp.load(  # pyright: ignore[reportPrivateImportUsage]
        {"model": dict(model.named_parameters()), "optim": states_of(model, optimizer)}, checkpoint_id=folder
    )
    feed(model, optimizer, 3, start=3, graded=False)
    return whole_tensors(dict(model.named_parameters())), whole_tensors(states_of(model, optimizer))


def test_a_checkpoint_moves_between_numbers_of_ranks(tmp_path):
    model = make(BF16)
    optimizer = build_optimizer(model, preset="adamw_8bit", weights="bf16_24bit")
    feed(model, optimizer, 6, graded=False)
    run_distributed(saved_on_ranks, 2, "bf16_24bit", 2, str(tmp_path))
    parameters, states = run_distributed(loaded_on_ranks, 3, "bf16_24bit", 3, str(tmp_path))[0]
    assert all(torch.equal(parameters[name], value) for name, value in model.named_parameters())
    assert all(torch.equal(states[name], value) for name, value in states_of(model, optimizer).items())
