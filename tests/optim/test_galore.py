"""GaLore against the paper in float64, against the authors' package, and over ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optim.low_rank import GaLore
from optim.projectors import Refresh, SingularProjector
from optim.rules import Adam
from tests.optim.lockstep import Simulator, relative
from tests.optim.tape import bias, check_sharded, close, hf_adam, over_all_shapes, over_shapes, tape

TOGETHER = Refresh(gap=7, stagger=False)


class Basis:
    """The leading singular vectors of the shorter side in float64, signs as the previous basis has them."""

    def __init__(self, rank: int, signs_of: np.ndarray) -> None:
        self.rank, self.vectors = rank, signs_of

    def renew(self, gradient: np.ndarray) -> np.ndarray:
        u, _, vh = np.linalg.svd(gradient, full_matrices=False)
        new = vh[: self.rank].T if gradient.shape[0] >= gradient.shape[1] else u[:, : self.rank]
        self.vectors = new * np.where((new * self.vectors).sum(axis=0) < 0, -1.0, 1.0)
        return self.vectors


def galore(gradients: list[np.ndarray], basis: Basis, gap: int, scale: float) -> list[np.ndarray]:
    """Algorithm 2 of arXiv 2403.03507, in the orientation [long side, r]; moments are kept at a refresh."""
    moments = [np.zeros(()), np.zeros(())]
    updates = []
    for index, gradient in enumerate(gradients):
        vectors = basis.renew(gradient) if index % gap == 0 else basis.vectors
        tall = gradient.shape[0] >= gradient.shape[1]
        ratio = hf_adam(moments, gradient @ vectors if tall else gradient.T @ vectors)
        lifted = ratio @ vectors.T if tall else vectors @ ratio.T
        updates.append(scale * bias(index + 1) * lifted)
    return updates


@over_shapes
def test_the_paper_in_float64(shape: tuple[int, int]) -> None:
    gradients = tape(shape)
    simulator = Simulator(GaLore(SingularProjector(4, TOGETHER, how="exact")), shape)
    updates = [simulator.step(gradients[0])]
    basis = Basis(4, simulator.states[0]["basis"].double().numpy())
    updates += [simulator.step(gradient) for gradient in gradients[1:]]
    for actual, expected in zip(updates, galore([g.double().numpy() for g in gradients], basis, 7, 0.25), strict=True):
        close(actual, expected)


@over_shapes
def test_the_authors_package(shape: tuple[int, int]) -> None:
    """One basis: at a refresh LAPACK's signs are as arbitrary as ours."""
    package = pytest.importorskip("galore_torch")
    weight = torch.nn.Parameter(torch.zeros(shape))
    group = {"params": [weight], "rank": 4, "update_proj_gap": 50, "scale": 0.25, "proj_type": "std"}
    reference = package.GaLoreAdamW([group], lr=1.0, no_deprecation_warning=True)
    simulator = Simulator(GaLore(SingularProjector(4, Refresh(50, stagger=False), how="exact")), shape)
    for gradient in tape(shape):
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        reference.step()
        assert relative(simulator.step(gradient), before - weight.detach()) <= 1e-5  # its SVD is in float32


@pytest.mark.parametrize("how", ["exact", "subspace"])
@over_all_shapes
def test_over_ranks(shape: tuple[int, int], how: str) -> None:
    check_sharded(GaLore(SingularProjector(4, Refresh(gap=3), how=how)), shape)  # pyright: ignore[reportArgumentType]


@over_shapes
def test_at_full_rank_of_a_diagonal_basis_it_is_adam(shape: tuple[int, int]) -> None:
    """Of a gradient whose singular vectors are unit vectors, GaLore at full rank is elementwise Adam, in torch's form to the last term."""
    rows, columns = shape
    size = min(rows, columns)
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    reference = torch.optim.AdamW([weight], lr=1.0, betas=(0.9, 0.99), eps=1e-2, weight_decay=0.0)
    simulator = Simulator(GaLore(SingularProjector(64, how="exact"), Adam((0.9, 0.99), 1e-2, "torch"), scale=1.0), shape)
    for step in range(5):
        gradient = torch.zeros(shape)
        gradient[range(size), range(size)] = torch.arange(1.0, size + 1).roll(step)
        before = weight.detach().clone()
        weight.grad = gradient.double()
        reference.step()
        assert relative(simulator.step(gradient), before - weight.detach()) <= 1e-6


def test_requests_and_state_bytes() -> None:
    for shape, requests in (((40, 16), []), ((16, 40), ["SumRows", "GatherRows"])):
        alone, dealt = (
            Simulator(GaLore(SingularProjector(4, Refresh(50, stagger=False), shard_basis=True)), shape, ranks) for ranks in (1, 4)
        )
        for gradient in tape(shape)[:2]:
            alone.step(gradient)
            dealt.step(gradient)
        assert alone.local_bytes() == [4 * (2 * 40 * 4 + 16 * 4)]
        assert [4 * local for local in dealt.local_bytes()] == 4 * alone.local_bytes()
        assert dealt.requests == (["GatherRows"] if shape == (40, 16) else []) + requests
        kept = Simulator(GaLore(SingularProjector(4, Refresh(50, stagger=False))), shape, 4)
        for gradient in tape(shape)[:2]:
            kept.step(gradient)
        assert kept.requests == requests
