"""Run under TRITON_INTERPRET=1: the triton kernels against the eager path, step by step from the same states. Prints one line of JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from optim.fused_triton import launch
from tests.optim.fused_cases import SHAPES, gradients, kept, optimizer_of, stepped


def triton_step(state: dict[str, torch.Tensor], gradient: torch.Tensor, bits: int, step: int, writes: bool) -> torch.Tensor:
    """One step in place; what was written where the weight is."""
    beta1, beta2, eps, lr, decay = 0.9, 0.95, 1e-8, 1e-2, 0.1
    root = (1 - beta2**step) ** 0.5
    numbers = [beta2, 1 - beta1, 1 - beta2, eps * root, root / (1 - beta1**step), 1 - lr * decay, lr]
    weight = state["weight"] if writes else gradient.clone()
    names = [f"{name}.{part}" for name in ("exp_avg", "exp_avg_sq") for part in ("codes", "scales")]
    launch((weight, gradient, *(state[name] for name in names)), bits, numbers, writes)
    return weight


def compared(preset: str, shape: tuple[int, int], steps: int = 4) -> dict[str, float]:
    """Of single steps from the states of the eager path: how many elements of anything differ, and by how much the update alone does."""
    optimizer = optimizer_of(shape, preset, "eager", betas=(0.9, 0.95))
    found = {"differ": 0.0, "update": 0.0}
    for step, gradient in enumerate(gradients(shape, steps), 1):
        moved = {name: tensor.clone() for name, tensor in kept(optimizer).items()}
        alone = {name: tensor.clone() for name, tensor in moved.items()}
        after = stepped(optimizer, [gradient])
        bits = 8 if preset == "adamw_8bit" else 4
        triton_step(moved, gradient, bits, step, writes=True)
        update = triton_step(alone, gradient, bits, step, writes=False)
        for name in set(after) - {"step"}:
            found["differ"] += float((moved[name] != after[name]).sum())
            found["differ"] += float((alone[name] != after[name]).sum()) if name != "weight" else 0.0
        expected = (alone["weight"] * (1 - 1e-3) - after["weight"]) / 1e-2
        found["update"] = max(found["update"], float((update - expected).abs().max()))
    return found


print(json.dumps({f"{preset} {shape}": compared(preset, shape) for preset in ("adamw_8bit", "adamw_4bit") for shape in SHAPES}))
