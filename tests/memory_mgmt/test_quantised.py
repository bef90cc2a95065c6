"""Eight bits: the stated error, the stated bytes, the same bits every time, and what it moves."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from memory_mgmt import quantised_costs
from memory_mgmt.cost_rates import Curve, cpu_rates
from memory_mgmt.op_costs import op_bytes
from memory_mgmt.quantised import quantised
from memory_mgmt.quantised_costs import CHUNK, GROUP, dequantise_seconds, packed_bytes, quantise_seconds

ROUNDING = {torch.float64: 2**-52, torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-10}
"""Of the result in its own dtype, and of what int8 multiplies."""


def largest(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of every element's group."""
    whole = x.double().abs()
    groups = [part.amax(-1, keepdim=True).expand_as(part) for part in whole.split(GROUP, -1)]
    return torch.cat(groups, -1)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    width=st.sampled_from([1, 5, 64, 128, 129, 256, 300, 1000]),
    dtype=st.sampled_from(list(ROUNDING)),
    spread=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_error_is_within_the_bound(rows, width, dtype, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, rows, width, generator=generator) * torch.logspace(-spread / 2, spread / 2, width)
    x = (x * (torch.rand(x.shape, generator=generator) > 0.1)).to(dtype)
    packed = quantised(x)
    error = (packed.restored().double() - x.double()).abs()
    assert (error <= largest(x) * (1 / 254 + 1.01 * ROUNDING[dtype])).all()
    assert packed.restored().dtype == dtype and packed.values.dtype == torch.int8
    assert packed.values.nbytes + packed.scales.nbytes == packed_bytes(2 * rows, width, 4 if dtype == torch.float16 else dtype.itemsize)


def test_what_is_not_a_number_stays_within_its_group():
    x = torch.ones(3, 300)
    x[0, 5], x[1, 200], x[2, 299] = math.inf, -math.inf, math.nan
    back = quantised(x).restored()
    lost = ~back.isfinite()
    assert lost[0, :GROUP].all() and lost[1, GROUP : 2 * GROUP].all() and lost[2, 2 * GROUP :].all()
    assert lost.sum() == 2 * GROUP + 44 and (back[~lost] == 1).all()


def test_zeros_tiny_and_huge_values():
    for value in (0.0, 1e-42, 1e-30, 3e38):
        back = quantised(torch.full((2, 200), value)).restored()
        assert (back - value).abs().max() <= max(1e-35, value / 254) and back.isfinite().all()
    assert quantised(torch.ones(0, 4)).restored().shape == (0, 4)
    assert quantised(torch.tensor(3.0)).restored() == 3.0


def test_neither_chunks_nor_strides_nor_neighbours_change_the_bits(monkeypatch):
    x = torch.randn(40, 300)
    want = quantised(x)
    monkeypatch.setitem(CHUNK, "cpu", 1000)
    for got in (quantised(x), quantised(x.t().contiguous().t())):
        assert torch.equal(got.values, want.values) and torch.equal(got.scales, want.scales)
        assert torch.equal(got.restored(), want.restored())
    some = quantised(x[7:9])
    assert torch.equal(some.values, want.values[7:9]) and torch.equal(some.scales, want.scales[7:9])


def test_error_of_a_bell_curve_is_well_below_one_percent():
    x = torch.randn(512, 1024)
    error = quantised(x).restored() - x
    assert 0.004 < error.norm() / x.norm() < 0.008
    assert abs((error * x).sum() / (x * x).sum()) < 1e-4  # unbiased: nothing shrinks


class Moved(TorchDispatchMode):
    """Bytes that operations read and write."""

    def __init__(self):
        super().__init__()
        self.bytes = self.ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # What is copied over is not read.
        tensors = [x for x in args if isinstance(x, torch.Tensor) and not (func is torch.ops.aten.copy_.default and x is args[0])]
        moved = op_bytes(func, tensors, [out] if isinstance(out, torch.Tensor) else [])
        self.bytes += moved
        self.ops += moved > 0
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_planners_time_counts_what_is_moved(dtype, monkeypatch):
    """With a rate of 1 byte per second and nothing for a launch, seconds are bytes."""
    monkeypatch.setitem(quantised_costs.CHUNK, "cpu", 1 << 14)
    rates = replace(cpu_rates(1), elementwise=Curve.level(1.0), launch_seconds=0.0)
    n, size = 64 * 1024, dtype.itemsize
    x = torch.randn(64, 1024).to(dtype)
    with Moved() as forth:
        packed = quantised(x)
    with Moved() as back:
        packed.restored()
    assert quantise_seconds(n, size, rates, cuda=False) == pytest.approx(forth.bytes, rel=0.05)
    assert dequantise_seconds(n, size, rates, cuda=False) == pytest.approx(back.bytes, rel=0.05)
    launches = replace(rates, elementwise=Curve.level(1e30), launch_seconds=1.0)
    assert dequantise_seconds(n, size, launches, cuda=False) == back.ops == 2 * 4
    assert quantise_seconds(n, size, launches, cuda=False) == pytest.approx(forth.ops, rel=0.25)


def test_whole_numbers_are_refused():
    with pytest.raises(ValueError, match="eight bits"):
        quantised(torch.ones(3, dtype=torch.int64))
