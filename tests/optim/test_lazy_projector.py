"""Lazy refresh: when it comes, and that all ranks agree."""

from __future__ import annotations

import pytest
import torch

from optim.lazy_projector import LazyProjector
from optim.low_rank import GaLore
from optim.projectors import Refresh, SingularProjector
from tests.optim.lockstep import Simulator
from tests.optim.tape import check_sharded, over_all_shapes, tape

EVERY_TWO = Refresh(2, stagger=False)


def renewals(gradients: list[torch.Tensor], shape: tuple[int, int]) -> list[int]:
    """Steps in which the basis changed."""
    simulator = Simulator(GaLore(LazyProjector(SingularProjector(2, EVERY_TWO, how="exact"), window=3)), shape, 2)
    changed, before = [], torch.zeros(())
    for step, gradient in enumerate(gradients, start=1):
        simulator.step(gradient)
        now = simulator.whole_states()["basis"].clone()
        if not torch.equal(now, before):
            changed.append(step)
        before = now
    return changed


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_a_settled_direction_is_renewed_ever_less(shape: tuple[int, int]) -> None:
    """Renewed at 1, 3, 5, 7: three similarities, so the gap doubles with each renewal from then on."""
    generator = torch.Generator().manual_seed(1)
    settled = tape(shape)[0]
    gradients = [settled + 0.01 * torch.randn(shape, generator=generator) for _ in range(40)]
    assert renewals(gradients, shape) == [1, 3, 5, 7, 11, 19, 35]


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_a_direction_that_turns_is_renewed_at_every_gap(shape: tuple[int, int]) -> None:
    """By orthogonal leading directions in turn."""
    gradients = []
    for step in range(20):
        gradient = 0.01 * tape(shape)[step]
        gradient[(step // 2) % 10, (step // 2) % 10] += 10
        gradients.append(gradient)
    assert renewals(gradients, shape) == list(range(1, 20, 2))


@pytest.mark.parametrize("how", ["exact", "subspace"])
@pytest.mark.parametrize("shard_basis", [False, True])
@over_all_shapes
def test_over_ranks(shape: tuple[int, int], how: str, shard_basis: bool) -> None:
    projector = SingularProjector(3, Refresh(1), how, shard_basis=shard_basis)  # pyright: ignore[reportArgumentType]
    check_sharded(GaLore(LazyProjector(projector, window=2)), shape)
