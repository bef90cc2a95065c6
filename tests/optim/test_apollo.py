"""APOLLO and APOLLO-Mini against the paper in float64 and over ranks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from optim.apollo import Apollo, apollo_mini
from optim.counter_random import gaussian_rows
from optim.methods import Rows, StateSpec, Steps
from optim.projectors import GaussianProjector, Refresh, Side, SingularProjector, short_side
from tests.optim.lockstep import Simulator, relative
from tests.optim.tape import bias, check_sharded, close, hf_adam, over_all_shapes, over_shapes, tape

GAP = 6


def random_basis(shape: tuple[int, int], rank: int, key: int, index: int) -> np.ndarray:
    rows = gaussian_rows(key, index // GAP, 0, min(shape), rank, torch.device("cpu"))
    return rows.double().numpy() / np.sqrt(rank)


def apollo(gradients: list[np.ndarray], rank: int, key: int, scaling: str, scale: float) -> list[np.ndarray]:
    """Algorithm 1 of arXiv 2412.05270, written for wide matrices; a tall one is transposed."""
    moments = [np.zeros(()), np.zeros(())]
    limited, updates = 0.0, []
    for index, gradient in enumerate(gradients):
        tall = gradient.shape[0] >= gradient.shape[1]
        g = gradient.T if tall else gradient
        low = random_basis(gradient.shape, rank, key, index).T @ g
        ratio = hf_adam(moments, low)
        axis = 0 if scaling == "channel" else None
        scaled = g * (np.linalg.norm(ratio, axis=axis) / (np.linalg.norm(low, axis=axis) + 1e-8)) * np.sqrt(scale)
        norm = np.linalg.norm(scaled)
        if index and norm > 1.01 * limited:
            scaled *= 1.01 * limited / norm
            norm = 1.01 * limited
        limited = norm
        updates.append(bias(index + 1) * (scaled.T if tall else scaled))
    return updates


@pytest.mark.parametrize(("rank", "scaling", "scale"), [(4, "channel", 1.0), (4, "tensor", 2.0), (1, "tensor", 128.0)])
@over_shapes
def test_the_paper_in_float64(shape: tuple[int, int], rank: int, scaling: str, scale: float) -> None:
    refresh = Refresh(GAP, stagger=False)
    method = Apollo(GaussianProjector(rank, refresh), scaling, scale=scale)  # pyright: ignore[reportArgumentType]
    simulator = Simulator(method, shape, key=31)
    expected = apollo([g.double().numpy() for g in tape(shape)], rank, 31, scaling, scale)
    for gradient, wanted in zip(tape(shape), expected, strict=True):
        close(simulator.step(gradient), wanted)


def test_mini_is_rank_one_by_tensor() -> None:
    shape = (24, 10)
    simulator = Simulator(apollo_mini(), shape, key=31)
    expected = apollo([g.double().numpy() for g in tape(shape)[:GAP]], 1, 31, "tensor", 128.0)
    for gradient, wanted in zip(tape(shape), expected, strict=False):
        close(simulator.step(gradient), wanted)
    assert simulator.local_bytes() == [4 * (2 * 24 + 1)]


@dataclass(frozen=True)
class Given:
    """A recorded basis."""

    vectors: Tensor
    rank: int
    refresh: Refresh

    def side(self, shape: tuple[int, int]) -> Side:
        return short_side(shape)

    def states(self, shape: tuple[int, int]) -> dict[str, StateSpec]:
        return {}

    def basis(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        return self.vectors
        yield  # pyright: ignore[reportUnreachable]


@pytest.mark.parametrize(("kind", "rank", "scaling", "scale"), [("channel", 3, "channel", 1.0), ("mini", 1, "tensor", 128.0)])
@pytest.mark.parametrize(("name", "shape"), [("tall", (12, 6)), ("wide", (6, 12)), ("square", (7, 7))])
def test_the_authors_package(name: str, shape: tuple[int, int], kind: str, rank: int, scaling: str, scale: float) -> None:
    """Where 20 steps of apollo-torch 1.0.3 moved the weights on this tape at rate 1 without decay, recorded with its random basis."""
    recorded = json.loads(Path(__file__).with_name("apollo_torch_1_0_3.json").read_text())[f"{name}_{kind}"]
    basis = torch.tensor(recorded["basis"])
    vectors = basis if shape[0] < shape[1] else basis.T
    method = Apollo(Given(vectors, rank, Refresh()), scaling, scale=scale)  # pyright: ignore[reportArgumentType]
    simulator = Simulator(method, shape)
    moved = torch.stack([simulator.step(gradient).double() for gradient in tape(shape)]).sum(dim=0)
    assert relative(moved, torch.tensor(recorded["moved"])) <= 2e-6  # its weights are summed in float32


@pytest.mark.parametrize(
    "method",
    [
        Apollo(GaussianProjector(3, Refresh(3))),
        Apollo(SingularProjector(3, Refresh(3), how="exact"), growth=None),
        apollo_mini(),
        Apollo(GaussianProjector(3), "tensor", growth=None),
    ],
    ids=["channel", "singular", "mini", "unlimited"],
)
@over_all_shapes
def test_over_ranks(shape: tuple[int, int], method: Apollo) -> None:
    check_sharded(method, shape)


def test_the_update_has_the_rank_of_the_gradient() -> None:
    """It scales the whole gradient; a package that lifts the projected one instead gives rank 3."""
    gradient = tape((30, 20))[0]
    update = Simulator(Apollo(GaussianProjector(3)), (30, 20)).step(gradient)
    assert int(torch.linalg.matrix_rank(update)) == 20


def test_requests_and_state_bytes() -> None:
    cases = [
        (Apollo(GaussianProjector(4)), (40, 16), ["Sum"]),
        (Apollo(GaussianProjector(4)), (16, 40), ["SumRows", "GatherRows", "Sum"]),
        (apollo_mini(), (40, 16), ["Sum"]),
        (apollo_mini(), (16, 40), ["SumRows", "Sum"]),
    ]
    for method, shape, requests in cases:
        simulator = Simulator(method, shape, 4)
        simulator.step(tape(shape)[0])
        assert simulator.requests == requests
        rank = method.projector.rank
        assert simulator.local_bytes() == [4 * (2 * 10 * rank + 1)] * 4
