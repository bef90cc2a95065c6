"""20 steps beside other packages' optimizers, where they are installed (``benchmarks/optimizer_peers.txt``): the same update to 1e-6.

Each step takes the other package's own projection, so that signs of singular vectors and random numbers, which are free, are the same and
renewals are compared too. Its weights start each step at 0, so that what they become is the update and nothing of it is lost in a sum.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from optim.apollo import Apollo
from optim.low_rank import Fira, GaLore
from optim.methods import Method, Rows, StateSpec, Steps
from optim.projectors import Refresh, Side, short_side
from tests.optim.lockstep import Simulator, relative
from tests.optim.tape import over_shapes, tape

RANK, GAP = 4, 7


class Borrowed:
    """The basis of another package, as it stands."""

    refresh = Refresh(GAP, stagger=False)

    def __init__(self, rank: int) -> None:
        self.rank, self.vectors = rank, torch.empty(0)

    def side(self, shape: tuple[int, int]) -> Side:
        return short_side(shape)

    def states(self, shape: tuple[int, int]) -> dict[str, StateSpec]:
        return {}

    def basis(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        return self.vectors
        yield  # pyright: ignore[reportUnreachable]


def side_by_side(
    shape: tuple[int, int], method: Method, borrowed: Borrowed, optimizer: type, group: dict[str, Any], **settings: Any
) -> None:
    weight = torch.nn.Parameter(torch.zeros(shape))
    reference = optimizer([{"params": [weight], "update_proj_gap": GAP, **group}], lr=1.0, **settings)
    simulator, bases = Simulator(method, shape), list[Tensor]()
    for gradient in tape(shape):
        weight.grad = gradient.clone()
        with torch.no_grad():
            weight.zero_()
        reference.step()
        matrix = reference.state[weight]["projector"].ortho_matrix
        borrowed.vectors = (matrix.T if borrowed.side(shape) == "right" else matrix).contiguous()
        bases.append(borrowed.vectors)
        assert relative(simulator.step(gradient), -weight.detach()) <= 1e-6
    assert not torch.equal(bases[0], bases[-1]), "the other package never renewed its projection"


@over_shapes
def test_galore(shape: tuple[int, int]) -> None:
    package = pytest.importorskip("galore_torch")
    basis = Borrowed(RANK)
    group = {"rank": RANK, "scale": 0.25, "proj_type": "std"}
    side_by_side(shape, GaLore(basis), basis, package.GaLoreAdamW, group, no_deprecation_warning=True)


@pytest.mark.parametrize(("rank", "scaling", "scale"), [(RANK, "channel", 1.0), (1, "tensor", 128.0)])
@over_shapes
def test_apollo(shape: tuple[int, int], rank: int, scaling: Any, scale: float) -> None:
    package = pytest.importorskip("apollo_torch")
    basis = Borrowed(rank)
    group = {"rank": rank, "scale": scale, "scale_type": scaling, "proj": "random", "proj_type": "std"}
    side_by_side(shape, Apollo(basis, scaling, scale=scale), basis, package.APOLLOAdamW, group)


@over_shapes
def test_fira(shape: tuple[int, int]) -> None:
    """With the residual that it leaves: the gradient without ``scale`` times its projection."""
    package = pytest.importorskip("pytorch_optimizer")
    basis = Borrowed(RANK)
    group = {"rank": RANK, "scale": 0.25, "projection_type": "std"}
    side_by_side(shape, Fira(basis, scaled_residual=True), basis, package.Fira, group)


@over_shapes
def test_an_apollo_that_is_none(shape: tuple[int, int]) -> None:
    """pytorch_optimizer 4.1.0 lifts the projected gradient back instead of scaling the whole one. Fails when it is mended: then compare it
    like the others, and take its line out of docs/optimizers.md."""
    package = pytest.importorskip("pytorch_optimizer")
    weight = torch.nn.Parameter(torch.zeros(shape))
    group = {"params": [weight], "rank": RANK, "update_proj_gap": GAP, "scale": 1.0, "projection_type": "random"}
    weight.grad = tape(shape)[0]
    package.APOLLO([group], lr=1.0, scale_type="channel").step()
    assert int(torch.linalg.matrix_rank(weight.detach(), rtol=1e-4)) == RANK
