"""The C++ kernel of Adam in few bits: the bits of the eager path, on every shape, and said where it is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import native
from optim import fused
from optim.build import build_optimizer
from optim.fused import missing_native
from optim.plan import plan, table_by_kind
from tests.optim.fused_cases import SHAPES, gradients, kept, optimizer_of, stepped

needs_compiler = pytest.mark.skipif(bool(missing_native()), reason="no C++ compiler")
vector_bits = pytest.mark.skipif(
    "AVX" not in torch.backends.cpu.get_cpu_capability(), reason="torch's own kernels have no fused multiply-add here"
)


@needs_compiler
@vector_bits
@pytest.mark.parametrize("preset", ["adamw_8bit", "adamw_4bit"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_has_the_bits_of_the_eager_path(preset: str, shape: tuple[int, int]) -> None:
    given = gradients(shape, 12)
    eager, one = (optimizer_of(shape, preset, kernel) for kernel in ("eager", "fused"))
    expected, found = stepped(eager, given), stepped(one, given)
    # torch rounds the last elements of a tensor, less than a vector's, apart: with two roundings where the others have one.
    whole = shape[0] - -(-16 // shape[1])
    for name, tensor in expected.items():
        if tensor.ndim:
            assert torch.equal(tensor[:whole], found[name][:whole]), name
    torch.testing.assert_close(found["weight"], expected["weight"], rtol=1e-6, atol=1e-8)


@needs_compiler
@vector_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_in_float32_have_a_kernel_too(dtype: torch.dtype) -> None:
    """All in one call where weights are float32, and one by one where they are rounded; a tensor that misses a step counts by itself."""
    settings: dict[str, Any] = {} if dtype == torch.float32 else {"weights": "bf16_stochastic"}

    def trained(kernel: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 64), nn.LayerNorm(64), nn.Linear(64, 16)).to(dtype)
        optimizer = build_optimizer(
            model, preset="composed", rule="adam", lr=1e-2, weight_decay=0.1, rest="adamw", kernel=kernel, **settings
        )
        assert {row.kernel for row in plan(optimizer)} == {"C++" if kernel == "auto" else "eager"}
        for step in range(5):
            for i, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(10 * step + i)
                parameter.grad = None if (step, i) == (1, 2) else torch.randn(parameter.shape, generator=generator).to(dtype)
            optimizer.step()
        states = {f"{name}.{key}": value for name, p in model.named_parameters() for key, value in optimizer.state[p].items()}
        return {name: p.detach() for name, p in model.named_parameters()} | states

    eager, fused = trained("eager"), trained("auto")
    assert eager.keys() == fused.keys() and all(torch.equal(tensor, fused[name]) for name, tensor in eager.items())


@needs_compiler
@vector_bits
@pytest.mark.parametrize("weights", ["bf16_stochastic", "bf16_24bit"])
def test_weights_of_few_bits_take_the_same_update(weights: str) -> None:
    shape = (64, 192)
    given = gradients(shape, 6)
    settings = {"dtype": torch.bfloat16, "weights": weights}
    eager, one = (optimizer_of(shape, "adamw_8bit", kernel, **settings) for kernel in ("eager", "fused"))
    expected, found = stepped(eager, given), stepped(one, given)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


@needs_compiler
@pytest.mark.parametrize("preset", ["adamw_8bit", "adamw_4bit"])
def test_threads_share_the_rows_and_nothing_else(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (129, 77)
    given = gradients(shape, 3)
    alone = stepped(optimizer_of(shape, preset, "fused"), given)
    monkeypatch.setattr(fused, "THREAD_ELEMENTS", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    together = stepped(optimizer_of(shape, preset, "fused"), given)
    assert all(torch.equal(tensor, together[name]) for name, tensor in alone.items())


@needs_compiler
@pytest.mark.parametrize("preset", ["adamw_8bit", "adamw_4bit"])
def test_not_a_number_is_not_lost(preset: str) -> None:
    optimizer = optimizer_of((64, 128), preset, "fused")
    given = gradients((64, 128), 1)
    given[0][7, 100] = torch.nan
    found = stepped(optimizer, given)
    assert found["weight"].isnan().nonzero().tolist() == [[7, 100]]
    assert found["exp_avg.scales"].isnan().sum() == found["exp_avg_sq.scales"].isnan().sum() == 1
    again = stepped(optimizer, gradients((64, 128), 1))
    assert again["weight"][7].isnan().all() and not again["weight"][8:].isnan().any()


def test_the_plan_says_by_what_a_parameter_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = optimizer_of((64, 128), "adamw_8bit", "eager")
    assert [row.kernel for row in plan(eager)] == ["eager: as asked for"]
    matrix = optimizer_of((64, 128), "muon", "auto", state="int8")
    assert [row.kernel for row in plan(matrix)] == ["eager: no kernel for Muon"]

    def missing(*_: object, **__: object) -> None:
        raise native.NoCompiler("there is none")

    fused._native.cache_clear()
    fused.missing_native.cache_clear()
    monkeypatch.setattr(native, "build", missing)
    try:
        without = optimizer_of((64, 128), "adamw_8bit", "auto")
        assert [row.kernel for row in plan(without)] == ["eager: there is none"]
        assert "eager: there is none" in table_by_kind(plan(without))
        with pytest.raises(ValueError, match="optim.kernel is fused, but none can be used: there is none; set optim.kernel auto"):
            optimizer_of((64, 128), "adamw_8bit", "fused")
    finally:
        fused._native.cache_clear()
        fused.missing_native.cache_clear()
    with pytest.raises(ValueError, match="no kernel for Sgd"):
        optimizer_of((64, 128), "sgd", "fused")


@needs_compiler
def test_the_plan_names_the_kernel_and_its_operator_refuses_what_it_cannot_read() -> None:
    optimizer = optimizer_of((64, 128), "adamw_4bit", "auto")
    assert [row.kernel for row in plan(optimizer)] == ["C++"]
    state = kept(optimizer)
    parts = [state[f"{name}.{part}"] for name in ("exp_avg", "exp_avg_sq") for part in ("codes", "scales")]
    with pytest.raises(ValueError, match="contiguous"):
        torch.ops.longstride.fused_adam_(state["weight"].T, torch.zeros(128, 64), *parts, 4, [0.0] * 7, True)
    with pytest.raises(ValueError, match="float32 of equal shapes"):
        torch.ops.longstride.fused_adam_(state["weight"], torch.zeros(64, 128).double(), *parts, 4, [0.0] * 7, True)
