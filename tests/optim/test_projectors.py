"""Bases: the directions an SVD finds, the same on every mesh, refreshed when due, and random ones that no mesh changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from optim.counter_random import gaussian_rows
from optim.methods import Rows, Steps
from optim.projectors import GaussianProjector, Refresh, SingularProjector, lift, project
from tests.optim.lockstep import Simulator, relative
from tests.optim.tape import check_sharded, over_all_shapes, over_shapes, tape

CPU = torch.device("cpu")
EVERY = Refresh(gap=1)


@dataclass(frozen=True)
class Captured:
    """The gradient's part in the subspace, as a method."""

    projector: Any

    def states(self, shape: tuple[int, int]) -> Any:
        return self.projector.states(shape)

    def step(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        side = self.projector.side((rows.total, gradient_in.shape[1]))
        basis = yield from self.projector.basis(gradient_in, states, rows, step, key)
        coordinates = yield from project(gradient_in, basis, side)
        return (yield from lift(coordinates, basis, side, gradient_in.shape[1]))


def leading(gradient: Tensor, rank: int) -> Tensor:
    """The best approximation of ``rank``, in float64."""
    u, s, vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@over_shapes
def test_exact_is_the_svd(shape: tuple[int, int]) -> None:
    simulator = Simulator(Captured(SingularProjector(4, EVERY, how="exact")), shape)
    for gradient in tape(shape)[:5]:
        assert relative(simulator.step(gradient), leading(gradient, 4)) <= 1e-6


@over_shapes
def test_subspace_iteration_captures_what_the_svd_captures(shape: tuple[int, int]) -> None:
    simulator = Simulator(Captured(SingularProjector(4, EVERY)), shape)
    for gradient in tape(shape):
        energy = simulator.step(gradient).square().sum() / leading(gradient, 4).square().sum()
        assert 0.999 <= energy <= 1.000001
        basis = simulator.states[0]["basis"].double()
        torch.testing.assert_close(basis.T @ basis, torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("how", ["exact", "subspace"])
@over_all_shapes
def test_bases_of_shards(shape: tuple[int, int], how: Any) -> None:
    check_sharded(Captured(SingularProjector(4, Refresh(gap=5), how=how)), shape)


@over_shapes
def test_a_gradient_of_lower_rank_is_captured_by_an_orthonormal_basis(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(shape[0], 2, generator=generator) @ torch.randn(2, shape[1], generator=generator)
    for ranks in (1, 3):
        simulator = Simulator(Captured(SingularProjector(5, EVERY)), shape, ranks)
        for _ in range(3):
            assert relative(simulator.step(gradient), gradient) <= 1e-5
        basis = simulator.whole_states()["basis"]
        torch.testing.assert_close(basis.T @ basis, torch.eye(5), atol=1e-5, rtol=0)


@over_shapes
def test_a_gradient_of_zero_keeps_the_basis(shape: tuple[int, int]) -> None:
    simulator = Simulator(Captured(SingularProjector(5, EVERY)), shape, 3)
    simulator.step(tape(shape)[0])
    before = simulator.whole_states()["basis"].clone()
    assert not simulator.step(torch.zeros(shape)).any()
    assert relative(simulator.whole_states()["basis"], before) <= 1e-6


def test_signs_follow_the_previous_basis() -> None:
    """Moments in the coordinates of a flipped basis would be of the wrong sign."""
    gradient = tape((24, 12))[0]
    simulator = Simulator(Captured(SingularProjector(3, EVERY, how="exact")), (24, 12))
    simulator.step(gradient)
    first = simulator.states[0]["basis"].clone()
    simulator.step(-gradient)
    assert relative(simulator.states[0]["basis"], first) <= 1e-6


def test_full_rank_captures_everything() -> None:
    for shape in ((9, 4), (4, 9), (6, 6), (1, 5)):
        for how in ("exact", "subspace"):
            gradient = torch.randn(shape)
            assert relative(Simulator(Captured(SingularProjector(64, EVERY, how=how)), shape).step(gradient), gradient) <= 1e-5  # type: ignore[arg-type]


def test_precise_iteration_is_the_same_on_all_meshes_for_steep_spectra() -> None:
    """Singular values from 1 down to 1e-3 within the basis: in float32 the last vectors differ by more than 1e-6."""
    generator = torch.Generator().manual_seed(3)
    tape = [
        (torch.randn(30, 8, generator=generator) * torch.logspace(0, -3, 8)) @ torch.randn(8, 24, generator=generator) for _ in range(3)
    ]
    errors = []
    for precise in (True, False):
        method = Captured(SingularProjector(8, EVERY, precise=precise))
        alone, dealt = Simulator(method, (30, 24)), Simulator(method, (30, 24), 3)
        for gradient in tape:
            alone.step(gradient)
            dealt.step(gradient)
        errors.append(relative(dealt.whole_states()["basis"], alone.whole_states()["basis"]))
    assert errors[0] <= 1e-6 < errors[1]


def test_requests_of_a_step_and_of_a_refresh() -> None:
    def requests(shape: tuple[int, int], **options: Any) -> tuple[list[str], list[str]]:
        simulator = Simulator(Captured(SingularProjector(3, Refresh(2, stagger=False), **options)), shape, 2)
        seen = []
        for gradient in tape(shape)[:3]:
            simulator.step(gradient)
            seen.append(simulator.requests)
        return seen[2], seen[1]

    assert requests((20, 8)) == (["Sum"] * 2, [])
    assert requests((8, 20)) == (["Sum"] * 3 + ["SumRows", "GatherRows"], ["SumRows", "GatherRows"])
    assert requests((20, 8), how="exact") == (["Sum"], [])
    assert requests((8, 20), how="exact") == (["GatherRows", "Sum", "SumRows", "GatherRows"], ["SumRows", "GatherRows"])
    assert requests((8, 20), always_right=True) == (["Sum"] * 2, [])
    assert requests((20, 8), shard_basis=True) == (["GatherRows", "Sum", "Sum"], ["GatherRows"])


@pytest.mark.parametrize(
    "options", [{"precise": True}, {"shard_basis": True}, {"always_right": True}, {"always_right": True, "shard_basis": True}]
)
@pytest.mark.parametrize("shape", [(20, 7), (7, 20), (5, 12)])
def test_where_the_basis_lies_changes_nothing(shape: tuple[int, int], options: dict[str, bool]) -> None:
    check_sharded(Captured(SingularProjector(3, Refresh(5), **options)), shape)


def test_a_dealt_basis_is_dealt() -> None:
    simulator = Simulator(Captured(SingularProjector(3, shard_basis=True)), (20, 8), 4)
    simulator.step(tape((20, 8))[0])
    assert simulator.local_bytes() == [2 * 3 * 4] * 4


def test_refreshes_come_every_gap_and_not_all_at_once() -> None:
    together = Refresh(gap=10, stagger=False)
    assert [step for step in range(1, 32) if together.due(step, 3)] == [1, 11, 21, 31]
    apart = Refresh(gap=10)
    due = {key: [step for step in range(1, 32) if apart.due(step, key)] for key in range(10)}
    assert due[3] == [1, 8, 18, 28]
    assert all(sum(step in steps for steps in due.values()) == 1 for step in range(2, 32))
    assert [apart.epoch(step, 3) for step in (1, 7, 8, 17, 18)] == [0, 0, 1, 1, 2]
    assert [apart.since(step, 3) for step in (1, 7, 8, 17, 18)] == [1, 7, 1, 10, 1]


@pytest.mark.parametrize(
    "build", [lambda: Refresh(gap=0), lambda: SingularProjector(0).states((3, 4)), lambda: GaussianProjector(0).states((3, 4))]
)
def test_what_cannot_be_is_refused(build: Any) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        build()


def test_random_rows_are_the_same_however_they_are_dealt() -> None:
    whole = gaussian_rows(5, 2, 0, 33, 7, CPU)
    for ranks in (2, 3, 5):
        parts = [Rows.chunk(33, rank, ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat([gaussian_rows(5, 2, part.first, part.count, 7, CPU) for part in parts]), whole)


def test_random_numbers_are_normal_and_independent() -> None:
    sample = gaussian_rows(1, 0, 0, 2000, 101, CPU).double()
    count = sample.numel()
    moments = [float((sample**power).mean()) for power in (1, 2, 3, 4)]
    for moment, (expected, variance) in zip(moments, [(0, 1), (1, 2), (0, 15), (3, 96)], strict=True):
        assert abs(moment - expected) < 5 * (variance / count) ** 0.5
    for other in (gaussian_rows(2, 0, 0, 2000, 101, CPU), gaussian_rows(1, 1, 0, 2000, 101, CPU), sample.roll(1, 0), sample.roll(1, 1)):
        assert abs(float((sample * other).mean())) < 5 / count**0.5
    # The exact law, by the largest distance of the distribution functions (Kolmogorov-Smirnov, 99.9 percent).
    law = torch.special.ndtr(sample.flatten().sort().values)
    assert float((law - (torch.arange(count) + 0.5) / count).abs().max()) < 1.95 / count**0.5


def test_random_bits_do_not_change_between_versions() -> None:
    """A seed-only basis lives in checkpoints as nothing but this function."""
    expected = torch.tensor([[-0.42044890, 1.60280395, -0.67721158], [-0.85131377, 0.74569851, 1.09523404]])
    torch.testing.assert_close(gaussian_rows(123456789, 3, 2, 2, 3, CPU), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(20, 15), (15, 20)])
def test_random_projection_keeps_lengths_on_average(shape: tuple[int, int]) -> None:
    """E[P Pᵀ] = 1: the mean over many bases of what is projected and lifted is the gradient."""
    gradient = tape(shape)[0]
    simulator = Simulator(Captured(GaussianProjector(8, EVERY)), shape, 2)
    mean = torch.stack([simulator.step(gradient) for _ in range(300)]).mean(dim=0)
    assert relative(mean, gradient) < 0.2
    assert simulator.local_bytes() == [0, 0]


@over_all_shapes
def test_random_bases_of_shards(shape: tuple[int, int]) -> None:
    check_sharded(Captured(GaussianProjector(4, Refresh(gap=5))), shape)
