"""FRUGAL against the paper in float64 and over ranks."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from optim.frugal import Frugal
from optim.projectors import Refresh
from tests.optim.lockstep import Simulator
from tests.optim.tape import check_sharded, close, over_all_shapes, over_shapes, tape


def indices(chosen: torch.Tensor | slice, columns: int) -> list[int]:
    return torch.arange(columns)[chosen].tolist()


@pytest.mark.parametrize("choice", ["columns", "blocks"])
@pytest.mark.parametrize("density", [0.0, 0.25, 1.0])
@over_shapes
def test_the_paper_in_float64(shape: tuple[int, int], density: float, choice: Literal["columns", "blocks"]) -> None:
    method = Frugal(density, Refresh(6, stagger=False), inactive_scale=0.5, choice=choice)
    simulator = Simulator(method, shape, key=5)
    for index, gradient in enumerate(tape(shape)):
        g = gradient.double().numpy()
        if index % 6 == 0:
            chosen = np.array(indices(method.chosen(shape[1], index + 1, 5, torch.device("cpu")), shape[1]), dtype=int)
            assert len(set(chosen)) == round(density * shape[1])
            first, second = np.zeros(()), np.zeros(())
        since = index % 6 + 1
        first = 0.9 * first + 0.1 * g[:, chosen]
        second = 0.999 * second + 0.001 * g[:, chosen] ** 2
        expected = 0.5 * np.sign(g)
        expected[:, chosen] = first / (1 - 0.9**since) / (np.sqrt(second / (1 - 0.999**since)) + 1e-8)
        close(simulator.step(gradient), expected)


def test_at_full_density_it_is_torch_adam() -> None:
    shape = (12, 9)
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    reference = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0)
    simulator = Simulator(Frugal(1.0, Refresh(50, stagger=False)), shape)
    for gradient in tape(shape):
        before = weight.detach().clone()
        weight.grad = gradient.double()
        reference.step()
        close(simulator.step(gradient), (before - weight.detach()).numpy())


def test_columns_change_at_a_refresh_only_and_all_get_their_turn() -> None:
    method = Frugal(0.25, Refresh(4, stagger=False))
    drawn = [frozenset(indices(method.chosen(40, step, 3, torch.device("cpu")), 40)) for step in range(1, 81)]
    assert all(len(set(drawn[start : start + 4])) == 1 for start in range(0, 80, 4))
    assert len(set(drawn)) == 20
    assert set().union(*drawn) == set(range(40))


@pytest.mark.parametrize(("density", "columns", "turns"), [(0.25, 40, 4), (0.3, 10, 4), (0.4, 5, 3), (1.0, 7, 1), (0.0, 7, 7)])
def test_blocks_have_their_turn_from_the_last_to_the_first(density: float, columns: int, turns: int) -> None:
    method = Frugal(density, Refresh(4, stagger=False), choice="blocks")
    runs = [indices(method.chosen(columns, step, 3, torch.device("cpu")), columns) for step in range(1, 8 * turns + 1, 4)]
    assert runs[:turns] == runs[turns:]
    assert all(len(run) == round(density * columns) for run in runs)
    if density:
        assert all(run == list(range(run[0], run[-1] + 1)) for run in runs)
        assert set().union(*runs[:turns]) == set(range(columns))
        assert [run[0] for run in runs[:turns]] == sorted((run[0] for run in runs[:turns]), reverse=True)
        assert runs[0][-1] == columns - 1


@pytest.mark.parametrize("choice", ["columns", "blocks"])
@over_all_shapes
def test_over_ranks(shape: tuple[int, int], choice: Literal["columns", "blocks"]) -> None:
    check_sharded(Frugal(0.4, Refresh(3), choice=choice), shape)


def test_requests_and_state_bytes() -> None:
    simulator = Simulator(Frugal(), (40, 16), 4)
    simulator.step(tape((40, 16))[0])
    assert simulator.requests == []
    assert simulator.local_bytes() == [4 * 2 * 10 * 4] * 4


def test_a_density_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"density 1.5 must lie in \[0, 1\]"):
        Frugal(1.5)
