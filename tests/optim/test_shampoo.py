"""4-bit Shampoo against the paper in float64, against Adam before its first root, and over ranks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from optim.build import build_optimizer
from optim.codec_eigen4 import EIGEN4
from optim.driver import ComposedOptimizer
from optim.projectors import Refresh
from optim.shampoo import Shampoo, blocks_of
from tests.optim.lockstep import Simulator, relative
from tests.optim.tape import check_sharded, close, over_all_shapes, over_shapes, tape

CODES = np.array([math.copysign((2 * j / 15 - 1) ** 2, j - 7.5) if j != 7 else 0.0 for j in range(16)])
"""Section 3.4 of the paper, "linear square", of 4 bits."""


def quantised(matrix: np.ndarray) -> np.ndarray:
    """D(Q(matrix)): blocks of 64 along a row, the nearest of ``CODES``."""
    out = np.zeros_like(matrix)
    for row in range(len(matrix)):
        for start in range(0, matrix.shape[1], 64):
            block = matrix[row, start : start + 64]
            scale = np.abs(block).max()
            if scale > 0:
                out[row, start : start + 64] = scale * CODES[np.abs(block[:, None] / scale - CODES).argmin(axis=1)]
    return out


class Side:
    """Statistics and the inverse root of one side of a block, in float64."""

    def __init__(self, order: int, coded: bool) -> None:
        self.store = quantised if coded else (lambda matrix: matrix)
        self.vectors, self.values, self.root = np.eye(order), np.full(order, 1e-6), np.eye(order)
        self.fresh = True

    @staticmethod
    def bjorck(vectors: np.ndarray, times: int) -> np.ndarray:
        for _ in range(times):
            vectors = 1.5 * vectors - 0.5 * vectors @ vectors.T @ vectors
        return vectors

    def statistics(self, gram: np.ndarray) -> None:
        vectors = self.vectors if self.fresh else self.bjorck(self.vectors, 1)
        statistic = 0.95 * vectors @ np.diag(self.values) @ vectors.T + 0.05 * gram
        new = np.linalg.qr(statistic @ vectors)[0]
        self.values = np.diag(new.T @ statistic @ new)
        self.vectors, self.fresh = self.store(new.T).T, False  # an eigenvector is a row where it is stored

    def renew_root(self) -> None:
        vectors = self.bjorck(self.vectors, 4)
        root = vectors @ np.diag((self.values + 1e-6 * self.values.max()) ** -0.25) @ vectors.T
        self.root = np.diag(np.diag(root)) + self.store(root - np.diag(np.diag(root)))


def shampoo(gradients: list[np.ndarray], order: int, gap: int, root_gap: int, coded: bool, late: int = 0) -> list[np.ndarray]:
    """Updates. ``late``: steps from statistics to their roots; the direction is the gradient until there are any."""
    m, n = gradients[0].shape
    places = [(slice(*a), slice(*b)) for a in blocks_of(m, order) for b in blocks_of(n, order)]
    sides = [[Side(len(range(m)[rows]), coded), Side(len(range(n)[columns]), coded)] for rows, columns in places]
    first, second, updates = np.zeros((m, n)), np.zeros((m, n)), []
    for step, gradient in enumerate(gradients, start=1):
        direction = np.zeros((m, n))
        for (rows, columns), (left, right) in zip(places, sides, strict=True):
            block = gradient[rows, columns]
            if step % gap == 0:
                left.statistics(block @ block.T)
                right.statistics(block.T @ block)
            if step > late and (step - late) % root_gap == 0:
                left.renew_root()
                right.renew_root()
            direction[rows, columns] = left.root @ block @ right.root
        direction *= np.linalg.norm(gradient) / np.linalg.norm(direction)
        first = 0.9 * first + 0.1 * direction
        second = 0.999 * second + 0.001 * direction**2
        updates.append(first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8))
    return updates


@pytest.mark.parametrize("coded", [True, False], ids=["four bits", "float32"])
@pytest.mark.parametrize("order", [1200, 17], ids=["one block", "blocks"])
@over_shapes
def test_the_paper_in_float64(shape: tuple[int, int], order: int, coded: bool) -> None:
    gradients = tape(shape, noise=2.0)
    simulator = Simulator(Shampoo(order, 2, 6, stagger=False, least=1 if coded else 1 << 30), shape)
    for gradient, expected in zip(gradients, shampoo([g.double().numpy() for g in gradients], order, 2, 6, coded), strict=True):
        close(simulator.step(gradient), expected)


def test_roots_may_be_made_some_steps_after_their_statistics() -> None:
    """What ``stagger`` does, of key 0: the paper's roots, each used a little later."""
    gradients, method = tape((40, 24), noise=2.0), Shampoo(17, 5, 5, least=1)
    simulator = Simulator(method, (40, 24), key=0)
    assert method.late == 3
    for gradient, expected in zip(gradients, shampoo([g.double().numpy() for g in gradients], 17, 5, 5, True, late=3), strict=True):
        close(simulator.step(gradient), expected)


def test_dear_renewals_get_more_steps() -> None:
    """Of three small matrices and three large ones none of the large ones shares its step with another."""
    model = torch.nn.ModuleList(torch.nn.Linear(64, size, bias=False) for size in (64, 64, 64, 640, 640, 640))
    optimizer = build_optimizer(model, preset="shampoo_4bit", statistics_gap=9, root_gap=9)
    assert isinstance(optimizer, ComposedOptimizer)
    turns = [Refresh(9).shift(lane.key) for lane in optimizer.lanes.values()]
    assert len({*turns[3:]}) == 3 and min(b - a for a, b in itertools.pairwise(turns[3:])) >= 2, turns


def test_the_code_is_the_paper_s() -> None:
    """Every number decodes to the nearest of the 16 (a tie to either); the largest magnitude of a block comes back as it is."""
    generator = torch.Generator().manual_seed(0)
    value = torch.cat([torch.randn(200, 150, generator=generator) ** 3, torch.linspace(-1, 1, 30 * 150).view(30, 150)])
    value[5], value[6, :64] = 0, 0
    parts = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in EIGEN4.parts((230, 150)).items()}
    EIGEN4.encode_(value, parts)
    found, expected = EIGEN4.decode(parts, (230, 150)), torch.from_numpy(quantised(value.double().numpy()))
    assert float(((found - value).abs() - (expected - value).abs()).max()) < 1e-6 * float(value.abs().max())
    assert (found - expected).abs().gt(1e-5).sum() <= 2
    assert not found[5].any() and not found[6, :64].any()
    assert len(torch.unique((found[:, :64] / found[:, :64].abs().amax(1, keepdim=True))[10].round(decimals=4))) <= 16


@over_shapes
def test_before_the_first_root_it_is_torch_adam(shape: tuple[int, int]) -> None:
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    reference = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0)
    simulator = Simulator(Shampoo(), shape)
    for gradient in tape(shape)[:5]:
        before = weight.detach().clone()
        weight.grad = gradient.double()
        reference.step()
        close(simulator.step(gradient), (before - weight.detach()).numpy())
        assert simulator.requests == []


@over_shapes
def test_statistics_that_stand_still_are_found_by_the_power_iteration(shape: tuple[int, int]) -> None:
    """The same gradient again and again: statistics become G Gᵀ and its root as a decomposition gives it."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q for size in shape)
    gradient = torch.zeros(shape, dtype=torch.float64)
    size = min(shape)
    gradient[range(size), range(size)] = torch.logspace(0, 1.5, size, dtype=torch.float64)
    gradient = (left @ gradient @ right).float()
    method = Shampoo(1200, 1, 400, stagger=False, least=1 << 30, decay=0.9)
    simulator = Simulator(method, shape)
    for _ in range(400):
        simulator.step(gradient)
    u, sigma, vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    direction = (u * (sigma**2 + 1e-3) ** -0.25 * sigma * (sigma**2 + 1e-3) ** -0.25) @ vh
    roots = [
        simulator.states[0][f"{side}_roots.value"][:, 0] + simulator.states[0][f"{side}_diagonal"][:, 0].diag()
        for side in ("left", "right")
    ]
    assert relative(roots[0] @ gradient @ roots[1], direction) < 1e-3


@pytest.mark.parametrize("order", [1200, 10])
@over_all_shapes
def test_over_ranks(shape: tuple[int, int], order: int) -> None:
    check_sharded(Shampoo(order, 1, 2, stagger=False, least=64), shape)


def test_requests_and_state_bytes() -> None:
    for shape in ((192, 128), (128, 192)):
        simulator = Simulator(Shampoo(128, 1, 2, stagger=False), shape, 4)
        requests = []
        for gradient in tape(shape)[:4]:
            simulator.step(gradient)
            requests.append(simulator.requests)
        assert requests == [["OnOwner"], *[["OnOwner", "Sum"]] * 3]
        # Two blocks of 96 x 128: codes of half a byte and a scale for every 64 of each matrix's row, values and diagonal; moments.
        matrices = 2 * (96 * (48 + 4 * 2) + 128 * (64 + 4 * 2)) * 2 + 2 * 2 * (96 + 128) * 4
        assert sum(simulator.local_bytes()) == matrices + 2 * 192 * 128 * 4
        assert max(simulator.local_bytes()) == sum(simulator.local_bytes()) // 4


def test_renewals_are_apart() -> None:
    method = Shampoo(statistics_gap=10, root_gap=20)
    requests = {}
    for key in range(0, 2**32, 2**30):
        simulator = Simulator(method, (6, 4), key=key)
        seen = []
        for gradient in (tape((6, 4)) * 2)[:19]:
            simulator.step(gradient)
            seen.append(bool(simulator.requests))
        requests[key] = seen.index(True) + 1
        assert requests[key] == 10 + Refresh(10).shift(key)


@pytest.mark.parametrize("settings", [{"order": 0}, {"statistics_gap": 0}, {"statistics_gap": 3, "root_gap": 10}])
def test_what_cannot_be_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Shampoo(**settings)  # pyright: ignore[reportArgumentType]
