"""Rounding by hashed chance, and weights of 24 bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim import pieces
from optim.rounding import bf16_by_own_bits_, join_24bit, random_bits, split_24bit_, stochastic_bf16_

CPU = torch.device("cpu")
MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1


def stochastic(value: torch.Tensor, seed: int = 7, key: int = 3, step: int = 11, first: int = 0) -> torch.Tensor:
    out = torch.empty_like(value, dtype=torch.bfloat16)
    stochastic_bf16_(value, out, seed=seed, key=key, step=step, first=first)
    return out


def bits_of_one_element(index: int, seed: int, key: int, step: int) -> int:
    """``random_bits`` of one element, in Python's integers."""

    def mix64(number: int) -> int:
        number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & MASK64
        number = (number ^ number >> 27) * 0x94D049BB133111EB & MASK64
        return number ^ number >> 31

    stream = 0
    for number in (seed, key, step):
        stream = mix64((stream + number + 0x9E3779B97F4A7C15) & MASK64)
    keys = mix64((index // 4096 + stream) & MASK64)
    bits = (index % 4096 // 2 + keys) & MASK32
    bits = (bits ^ bits >> 16) * 0x7FEB352D & MASK32 ^ keys >> 32
    bits = (bits ^ bits >> 15) * 0x846CA68B & MASK32
    bits ^= bits >> 16
    return bits >> 16 * (index % 2) & 0xFFFF


@settings(max_examples=40, deadline=None)
@given(
    first=st.one_of(st.integers(0, 20_000), st.integers(2**31 - 5000, 2**33)),
    seed=st.integers(0, 2**40),
    key=st.integers(0, 10**6),
    step=st.integers(0, 10**7),
)
def test_bits_are_the_stated_function_of_seed_key_step_and_index(first: int, seed: int, key: int, step: int) -> None:
    got = random_bits(first, 5, seed=seed, key=key, step=step, device=CPU)
    assert [number & 0xFFFF for number in got.tolist()] == [bits_of_one_element(first + i, seed, key, step) for i in range(5)]


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 90), columns=st.integers(1, 333), piece=st.sampled_from([700, 5000, 1 << 18]))
def test_rows_round_alike_wherever_they_are_cut(cut: int, columns: int, piece: int) -> None:
    value = torch.randn(90, columns, generator=torch.Generator().manual_seed(columns))
    whole = stochastic(value, first=12345)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_CPU_PIECE", piece)
        below = stochastic(value[cut:], first=12345 + cut * columns)
    assert torch.equal(below, whole[cut:])


def test_rounding_is_to_a_neighbour_and_unbiased() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(200, generator=generator).mul_(10).repeat_interleave(20_000)
    rounded = stochastic(value).float()
    toward_zero = (value.view(torch.int32) & -65536).view(torch.float32)
    away = (toward_zero.view(torch.int32) + 65536).view(torch.float32)
    assert ((rounded == toward_zero) | (rounded == away)).all()
    # One number's mean over 20 000 draws is off by 0.002 / sqrt(20 000) at most, one deviation; the mean of all by much less.
    relative = rounded.view(200, -1).mean(1) / value.view(200, -1)[:, 0] - 1
    assert relative.abs().max() < 1e-4
    assert relative.mean().abs() < 1e-5


def test_exact_numbers_stay_and_special_numbers_survive() -> None:
    exact = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert torch.equal(stochastic(exact.float()), exact)
    patterns = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)  # NaN of all kinds
    special = torch.cat([torch.tensor([math.inf, -math.inf, 0.0, -0.0]), patterns])
    own, high, low = special.to(torch.bfloat16), torch.empty(8, dtype=torch.bfloat16), torch.empty(8, dtype=torch.int8)
    bf16_by_own_bits_(special, own)
    split_24bit_(special, high, low)
    for kept in (stochastic(special), own, high, join_24bit(high, low)):
        assert torch.equal(kept[:4].float(), special[:4])
        assert kept[4:].isnan().all()


def test_steps_parameters_seeds_and_tiles_draw_bits_of_their_own() -> None:
    draws = [random_bits(0, 8192, seed=s, key=k, step=t, device=CPU) for s, k, t in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 2, 1)]]
    tiles = [tile for draw in draws for tile in draw.double().view(2, 4096)]
    for tile in tiles:
        assert abs(tile.mean()) < 5 * 65536 / 12**0.5 / 64  # five deviations
    correlations = torch.corrcoef(torch.stack(tiles)) - torch.eye(len(tiles))
    assert correlations.abs().max() < 5 / 64
    even, odd = draws[0].double()[::2], draws[0].double()[1::2]  # halves of the same hashes
    assert torch.corrcoef(torch.stack([even, odd]))[0, 1].abs() < 5 / 64


def test_chance_of_own_bits_is_unbiased_over_many_numbers() -> None:
    value = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)) + 1
    out = torch.empty_like(value, dtype=torch.bfloat16)
    bf16_by_own_bits_(value, out)
    assert abs((out.double() - value.double()).mean().item()) < 1e-5
    # And at each place between two neighbours, not only on the whole.
    part = (value.view(torch.int32) & 0xFFFF) // 4096
    for sixteenth in range(16):
        here = part == sixteenth
        assert abs((out[here].double() - value[here].double()).mean().item()) < 1e-4


def test_24_bits_hold_a_weight_to_2_to_the_minus_16_and_come_back_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(100, 1000, generator=generator) * torch.exp(3 * torch.randn(100, 1000, generator=generator))
    value[0, :4] = torch.tensor([1e-40, -3e-45, 1e38, -2.5])
    high, low = torch.empty_like(value, dtype=torch.bfloat16), torch.empty_like(value, dtype=torch.int8)
    split_24bit_(value, high, low)
    joined = join_24bit(high, low)
    normal = value.abs() > 1e-37
    assert ((joined - value).abs() <= value.abs() * 2.0**-16)[normal].all()
    assert ((joined - value).abs() > value.abs() * 2.0**-17)[normal].any()  # the bound is the right one
    assert ((joined - value).abs() <= 2e-43)[~normal].all()
    # High alone is bfloat16's nearest, up to the bits that 24 bits drop.
    assert ((high.float() - value).abs() <= (value.to(torch.bfloat16).float() - value).abs() * (1 + 2.0**-6)).all()
    again = torch.empty_like(high), torch.empty_like(low)
    split_24bit_(joined, *again)
    assert torch.equal(again[0], high)
    assert torch.equal(again[1], low)
    assert torch.equal(join_24bit(high[30:40], low[30:40]), joined[30:40])


def test_small_updates_add_up_in_24_bits_where_bf16_alone_would_lose_them() -> None:
    weight = torch.ones(64)
    high, low, alone = torch.ones(64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.int8), torch.ones(64, dtype=torch.bfloat16)
    for _ in range(100):
        weight += 1e-3
        alone += 1e-3
        split_24bit_(join_24bit(high, low) + 1e-3, high, low)
    assert torch.equal(alone, torch.ones(64, dtype=torch.bfloat16))
    assert (join_24bit(high, low) - weight).abs().max() < 100 * 2.0**-16
