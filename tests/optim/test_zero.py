"""Elementwise presets on flat partitions, as DeepSpeed hands them over; and, where it is installed, under DeepSpeed itself."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from optim.placement import storage_bytes
from optim.zero import PRESETS, ZeroOptimizer, build_zero_optimizer
from tests.optim.test_driver import make
from tests.optim.test_row_sparse import model_of

ROOT = Path(__file__).resolve().parents[2]


def handed_over(model: nn.Module, ranks: int, **settings: object) -> tuple[ZeroOptimizer, list[list[Tensor]], list[list[nn.Parameter]]]:
    """The optimizer of one process that holds the partitions of all ``ranks``: of each group, its flat pieces and its parameters."""
    optimizer = build_zero_optimizer(model, **settings)
    pieces, members = [], []
    for group in optimizer.param_groups:
        members.append(group["params"])
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in group["params"]])
        pieces.append([piece.clone().requires_grad_() for piece in flat.tensor_split(ranks)])
        group["params"] = pieces[-1]
    return optimizer, pieces, members


def gradients(model: nn.Module, step: int) -> dict[nn.Parameter, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {parameter: torch.randn(parameter.shape, generator=generator) for parameter in model.parameters()}


def train(model: nn.Module, ranks: int, steps: int, **settings: object) -> tuple[ZeroOptimizer, dict[nn.Parameter, Tensor]]:
    optimizer, pieces, members = handed_over(model, ranks, **settings)
    for step in range(steps):
        given = gradients(model, step)
        for flats, group in zip(pieces, members, strict=True):
            whole = torch.cat([given[parameter].reshape(-1) for parameter in group])
            for flat, piece in zip(flats, whole.tensor_split(ranks), strict=True):
                flat.grad = piece.clone()
        optimizer.step()
    found = {}
    for flats, group in zip(pieces, members, strict=True):
        values = torch.cat([flat.detach() for flat in flats]).split([parameter.numel() for parameter in group])
        found |= {parameter: value.view(parameter.shape) for parameter, value in zip(group, values, strict=True)}
    return optimizer, found


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("preset", ["adamw", "sgd"])
def test_flat_pieces_are_updated_as_parameters_are(preset: str, ranks: int) -> None:
    """Against torch on the parameters themselves: groups, decay, uneven pieces."""
    model, plain = make(), make()
    settings = {"momentum": 0.9, "weight_decay": 0.0} if preset == "sgd" else {"weight_decay": 0.1}
    _, found = train(model, ranks, 6, preset=preset, lr=1e-2, **settings)
    names = dict(plain.named_parameters())
    decayed = [parameter for name, parameter in names.items() if name in ("up.weight", "down.weight", "few.weight", "head.weight")]
    rest = [parameter for parameter in names.values() if all(parameter is not other for other in decayed)]
    if preset == "sgd":
        reference: torch.optim.Optimizer = torch.optim.SGD(plain.parameters(), lr=1e-2, momentum=0.9)
    else:
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(6):
        for parameter, gradient in gradients(plain, step).items():
            parameter.grad = gradient
        reference.step()
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found[parameter], expected.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("preset", "near"), [("adamw_8bit", 0.05), ("adamw_4bit", 0.5)])
def test_few_bits_of_pieces(preset: str, near: float) -> None:
    """What is planned is held, small tensors stay exact, and the rest stays near, on any number of pieces."""
    plain, start = make(), make()
    exact = train(plain, 1, 6, preset="adamw", lr=1e-2)[1]
    for ranks in (1, 3):
        model = make()
        optimizer, found = train(model, ranks, 6, preset=preset, lr=1e-2)
        for group in optimizer.param_groups:
            for flat in group["params"]:
                held = sum(storage_bytes(tensor) for tensor in optimizer.state[flat].values())
                assert held == optimizer.state_bytes(flat.numel(), group["storage"])
        distance = (found[model.up.weight] - exact[plain.up.weight]).norm()
        assert 0 < distance < near * (exact[plain.up.weight] - start.up.weight.detach()).norm()
        assert torch.equal(found[model.few.bias], exact[plain.few.bias])


def test_states_come_back() -> None:
    first, second = (handed_over(make(), 2, preset="adamw_8bit") for _ in range(2))
    flats = [[flat for group in pieces for flat in group] for _, pieces, _ in (first, second)]
    optimizers = first[0], second[0]

    def step(which: int, number: int) -> None:
        for index, flat in enumerate(flats[which]):
            flat.grad = torch.randn(flat.shape, generator=torch.Generator().manual_seed(100 * number + index))
        optimizers[which].step()

    step(0, 0)
    step(0, 1)
    buffer = io.BytesIO()
    torch.save(optimizers[0].state_dict(), buffer)
    buffer.seek(0)
    optimizers[1].load_state_dict(torch.load(buffer, weights_only=True))
    for mine, theirs in zip(*flats, strict=True):
        theirs.data.copy_(mine.data)
    for number in (2, 3):
        step(0, number)
        step(1, number)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*flats, strict=True))


def test_presets_that_need_matrices_are_refused_by_name() -> None:
    for preset in ("galore", "apollo_mini", "adafactor", "muon", "shampoo_4bit", "composed"):
        with pytest.raises(ValueError, match=f"optim.preset {preset} updates whole matrices.*FSDP2.*or take preset adamw, adamw_8bit"):
            build_zero_optimizer(make(), preset=preset)
    with pytest.raises(ValueError, match=r"values\.weight is a table"):
        build_zero_optimizer(model_of(), preset="adamw_8bit")
    assert all(build_zero_optimizer(make(), preset=preset) for preset in PRESETS)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_under_deepspeed() -> None:
    """Two ranks train as one does under every stage; a checkpoint of DeepSpeed's own goes on bit for bit."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(ROOT / "tests/optim/zero_run.py"),
    ]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "1", "2", "3"], capture_output=True, text=True, env=environment, timeout=280)
    found = [done.stdout.count(f"stage {stage} as one process") for stage in (1, 2, 3)]
    assert done.returncode == 0 and found == [2, 2, 2], done.stdout + done.stderr
