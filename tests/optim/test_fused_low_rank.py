"""The C++ kernel of Adam in a subspace: the eager path's numbers on every shape, its own bits whatever the rows and threads around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.transformer import Transformer
from optim import fused_low_rank
from optim.build import build_optimizer
from optim.config import OptimConfig
from optim.fused_low_rank import Known, missing, scratch_elements
from optim.low_rank import GaLore
from optim.plan import plan, planned
from optim.projectors import SingularProjector
from optim.rules import Adam
from tests.optim.fused_cases import optimizer_of, stepped

pytestmark = pytest.mark.skipif(bool(missing()), reason="no C++ compiler, or no AVX2")

SHAPES = ((64, 64), (130, 37), (37, 130), (300, 520), (520, 300), (3, 9))
"""Of whole tiles and panels, with remainders of both on either side, of two blocks of a sum, smaller than any."""
METHODS: dict[str, dict[str, Any]] = {
    "galore": {"preset": "galore", "rank": 20},
    "galore of one tile": {"preset": "galore", "rank": 32, "scale": 1.0},
    "galore of two blocks": {"preset": "galore", "rank": 290},
    "galore_8bit": {"preset": "galore_8bit", "rank": 20},
    "apollo": {"preset": "apollo", "rank": 20},
    "apollo_mini": {"preset": "apollo_mini"},
    "back from random": {"preset": "composed", "projector": "gaussian", "lift": "back", "rank": 7},
    "tensor without guard": {"preset": "composed", "projector": "gaussian", "lift": "tensor", "rank": 5},
}


def gradients(shape: tuple[int, int], steps: int) -> list[Tensor]:
    """Of low rank and noise, with a row and a column that are zero."""
    generator = torch.Generator().manual_seed(shape[0])
    low = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1], generator=generator)
    found = [low * (0.5 + step) + torch.randn(shape, generator=generator) for step in range(steps)]
    for gradient in found:
        gradient[2], gradient[:, 1] = 0, 0
    return found


def near(found: Tensor, expected: Tensor) -> bool:
    return float((found.double() - expected.double()).norm()) <= 1e-6 * float(expected.double().norm()) + 1e-12


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_has_the_numbers_of_the_eager_path(name: str, shape: tuple[int, int]) -> None:
    given = gradients(shape, 6)
    eager, fused = (optimizer_of(shape, kernel=kernel, **METHODS[name], update_gap=4) for kernel in ("eager", "auto"))
    assert [row.kernel for row in plan(fused)] == ["C++"] and [row.kernel for row in plan(eager)] == ["eager: as asked for"]
    start = next(iter(eager.lanes)).detach().clone()
    expected, found = stepped(eager, given), stepped(fused, given)
    assert expected.keys() == found.keys()
    if name == "galore_8bit":  # squares are rounded by a hash of their bits, so that the last one counts
        assert float((found["weight"] - expected["weight"]).norm()) <= 1e-2 * float((expected["weight"] - start).norm())
        return
    assert near(found["weight"] - start, expected["weight"] - start) or near(found["weight"], expected["weight"])
    assert all(near(found[state], tensor) for state, tensor in expected.items())


def stepped_alone(shape: tuple[int, int], gradient: Tensor, basis: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and moments after GaLore's first step from zero weights with a given basis."""
    method = fused_low_rank.known(GaLore(SingularProjector(rank), Adam(), 1.0))
    assert isinstance(method, Known)
    left = shape[0] < shape[1]
    weight, long = torch.zeros(shape), max(shape)
    moments = {name: torch.zeros(long, rank) for name in ("exp_avg", "exp_avg_sq")}
    scratch = torch.full((scratch_elements([weight], [basis], [left], method.lift),), torch.nan)
    fused_low_rank.step_(method, [weight], [gradient], [basis], [moments], [1], [left], scratch, 1.0, 0.0)
    return weight, moments["exp_avg"], moments["exp_avg_sq"]


def chained(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, as the kernel says: blocks of 256 terms in order, in each a chain of fused multiply-adds."""
    total: Tensor | None = None
    for first in range(0, a.shape[1], 256):
        block = torch.zeros(a.shape[0], b.shape[1])
        for k in range(first, min(first + 256, a.shape[1])):
            block = (block.double() + a[:, k : k + 1].double() * b[k : k + 1].double()).float()
        total = block if total is None else total + block
    assert total is not None
    return total


@pytest.mark.parametrize("shape", [(41, 300), (300, 41)])
def test_products_are_summed_in_the_order_that_is_said(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient, basis = torch.randn(shape, generator=generator), torch.randn(41, 5, generator=generator)
    wide = shape[0] < shape[1]
    _, mean, square = stepped_alone(shape, gradient, basis, 5)
    coordinates = chained(gradient.T if wide else gradient, basis)
    assert torch.equal(mean, coordinates * torch.tensor(1 - 0.9))
    assert torch.equal(square, coordinates * torch.tensor(1 - 0.999) * coordinates)


def test_rows_have_their_bits_whatever_rows_are_beside_them() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient, basis = torch.randn(530, 300, generator=generator), torch.randn(300, 33, generator=generator)
    whole = stepped_alone((530, 300), gradient, basis, 33)
    part = stepped_alone((337, 300), gradient[:337].contiguous(), basis, 33)
    assert all(torch.equal(few, all_[:337]) for few, all_ in zip(part, whole, strict=True))


@pytest.mark.parametrize("preset", ["galore", "apollo"])
@pytest.mark.parametrize("shape", [(700, 300), (300, 700)])
def test_threads_share_the_long_side_and_nothing_else(preset: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    given = gradients(shape, 2)
    settings: dict[str, Any] = (
        {"preset": preset, "rank": 256, "kernel": "auto", "svd": "exact"} if preset == "galore" else {"preset": preset, "kernel": "auto"}
    )
    alone = {name: tensor.clone() for name, tensor in stepped(optimizer_of(shape, **settings), given).items()}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = stepped(optimizer_of(shape, **settings), given)
    assert all(torch.equal(tensor, together[name]) for name, tensor in alone.items())


@pytest.mark.parametrize("preset", ["galore", "apollo", "apollo_mini"])
def test_not_a_number_is_not_lost(preset: str) -> None:
    given = gradients((40, 24), 2)
    given[1][7, 3] = torch.nan
    settings: dict[str, Any] = {"rank": 4} if preset != "apollo_mini" else {}
    found = stepped(optimizer_of((40, 24), preset, "auto", update_gap=9, **settings), given)
    assert found["weight"][7].isnan().all() and found["exp_avg"][7].isnan().all()


def test_the_plan_says_where_the_kernel_is_not_used() -> None:
    config = OptimConfig(preset="galore", rank=4)
    model = Transformer(ModelConfig(d_model=32, d_ff=64, n_layers=1, n_heads=2, layers=("full",)), 64)
    kernels = {row.kernel for row in planned(model, config) if row.kind == "GaLore"}
    shared = {row.kernel for row in planned(model, config, shards=2) if row.kind == "GaLore"}
    assert kernels == {"C++"} and shared == {"eager: ranks share the matrix"}
    of_bf16 = optimizer_of((64, 128), "galore", "auto", dtype=torch.bfloat16, rank=4, weights="bf16_stochastic")
    assert [row.kernel for row in plan(of_bf16)] == ["eager: weights are not float32"]


def test_the_operator_refuses_what_does_not_belong_together() -> None:
    weight, gradient, basis, moment = torch.zeros(8, 6), torch.zeros(8, 6), torch.zeros(6, 2), torch.zeros(8, 2)
    step, scratch = torch.ops.longstride.low_rank_step_, torch.zeros(100_000)
    rest = (scratch, [0], [1e-6, 1.0], [0.999, 0.1, 0.001, 1.0, 0.0, 1.0, 0.1], 0)
    step([weight], [gradient], [basis], [moment], [moment.clone()], [], *rest)
    with pytest.raises(ValueError, match="do not belong together"):
        step([weight], [gradient], [basis.T.contiguous()], [moment], [moment.clone()], [], *rest)
    with pytest.raises(ValueError, match="contiguous float32"):
        step([weight], [gradient.double()], [basis], [moment], [moment.clone()], [], *rest)
    with pytest.raises(ValueError, match="floats of scratch memory"):
        step([weight], [gradient], [basis], [moment], [moment.clone()], [], scratch[:3], *rest[1:])


def test_weights_that_lie_otherwise_are_stepped_all_the_same() -> None:
    given = gradients((40, 24), 3)
    expected, found = optimizer_of((40, 24), "galore", "auto", rank=4), optimizer_of((40, 24), "galore", "auto", rank=4)
    (weight,) = found.lanes
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous() and near(stepped(found, given)["weight"], stepped(expected, given)["weight"])


def test_a_layer_of_several_matrices_is_stepped_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(24, 40, bias=False) if i % 2 == 0 else nn.Linear(40, 24, bias=False) for i in range(4)))
    optimizer = build_optimizer(model, preset="apollo", rank=4, lr=1e-2)
    calls = list[int]()
    real = fused_low_rank.step_
    monkeypatch.setattr(fused_low_rank, "step_", lambda method, weights, *rest: (calls.append(len(weights)), real(method, weights, *rest)))
    model(torch.randn(5, 24)).square().sum().backward()
    optimizer.step()
    assert calls == [4]
