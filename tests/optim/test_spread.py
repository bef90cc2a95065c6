"""Renewals of bases and preconditioners are spread over steps: no step does more than twice the work of the median one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from optim.build import build_optimizer
from optim.driver import ComposedOptimizer
from optim.projectors import Refresh

MATRICES = 8
GAPS: dict[str, dict[str, Any]] = {
    "galore": {"rank": 16, "update_gap": 12},
    "fira": {"rank": 16, "update_gap": 12},
    "natural_galore": {"rank": 16, "update_gap": 12},
    "subset_norm_sm": {"rank": 16, "update_gap": 12},
    "apollo": {"rank": 16, "update_gap": 12},
    "frugal": {"update_gap": 12},
    "shampoo_4bit": {"statistics_gap": 12, "root_gap": 12},
    "muon": {},
}


def optimizer_of(preset: str, matrices: int = MATRICES, **settings: Any) -> ComposedOptimizer:
    model = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(matrices))
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(index))
    built = build_optimizer(model, preset=preset, **settings)
    assert isinstance(built, ComposedOptimizer)
    return built


@pytest.mark.parametrize("preset", GAPS)
def test_every_matrix_has_steps_of_its_own(preset: str) -> None:
    lanes = list(optimizer_of(preset, **GAPS[preset]).lanes.values())
    gap = getattr(lanes[0].rule, "gap", 1)
    refresh = Refresh(gap)
    if preset != "muon":
        in_a_round = [sum(refresh.due(step, lane.key) for lane in lanes) for step in range(2, gap + 2)]
        assert sorted(in_a_round) == [0] * (gap - MATRICES) + [1] * MATRICES
    assert len({lane.key for lane in lanes}) == MATRICES


def test_more_matrices_than_steps_are_spread_evenly() -> None:
    lanes = optimizer_of("galore", matrices=10, rank=4, update_gap=4).lanes.values()
    shifts = [Refresh(4).shift(lane.key) for lane in lanes]
    assert sorted(shifts.count(shift) for shift in range(4)) == [2, 2, 3, 3]


@pytest.mark.parametrize("preset", ["galore", "fira", "apollo", "muon", "shampoo_4bit"])
def test_no_step_takes_more_than_twice_the_products_of_the_median(preset: str) -> None:
    """Counted, not timed, from the second step on: the first needs a basis of every matrix. (Decompositions are not counted; they are of
    matrices of the size of the rank, or of one matrix of many.)"""
    optimizer = optimizer_of(preset, **GAPS[preset])
    counts = []
    for _ in range(37):
        with FlopCounterMode(display=False) as counted:
            optimizer.step()
        counts.append(counted.get_total_flops())
    warm = sorted(counts[25:] if preset == "shampoo_4bit" else counts[1:])
    assert warm[0] > 0
    assert warm[-1] <= 2 * warm[len(warm) // 2], counts
