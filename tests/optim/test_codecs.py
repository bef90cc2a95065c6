"""Stored optimizer states: layout, row independence, error bounds from the codes' own definitions, and what Adam makes of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from optim import pieces
from optim.codec_dynamic import dynamic_numbers
from optim.codec_int4 import pack_affine_int4, unpack_affine_int4
from optim.codecs import Codec, codec_for, codec_named

FORMS = [(name, signed) for name in ("fp32", "bf16", "int8", "int8_dynamic", "int4") for signed in (True, False)] + [("int4_affine", True)]
LOW_BIT = [form for form in FORMS if form[0].startswith("int")]


def new_parts(codec: Codec, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(part, dtype=dtype) for name, (part, dtype) in codec.parts(shape).items()}


def heavy_tailed(shape: tuple[int, ...], signed: bool, seed: int = 0) -> torch.Tensor:
    """Columns whose sizes differ by decades, cubes of normal numbers in each."""
    columns = torch.exp(torch.randn(shape[-1], generator=torch.Generator().manual_seed(99)))
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) ** 3 * columns * 1e-4
    return value if signed else value.square()


def round_trip(codec: Codec, value: torch.Tensor) -> torch.Tensor:
    parts = new_parts(codec, tuple(value.shape))
    codec.encode_(value, parts)
    return codec.decode(parts, tuple(value.shape))


@pytest.mark.parametrize(("name", "signed"), FORMS)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 700),
    first=st.integers(0, 8),
    count=st.integers(0, 9),
    piece=st.sampled_from([300, 1024, 1 << 18]),
)
@example(rows=8, columns=384, first=3, count=5, piece=1 << 18)
def test_rows_of_the_parts_are_the_parts_of_the_rows(
    name: str, signed: bool, rows: int, columns: int, first: int, count: int, piece: int
) -> None:
    codec, value = codec_named(name, signed), heavy_tailed((rows, columns), signed)
    whole = new_parts(codec, (rows, columns))
    codec.encode_(value, whole)
    some = value[first : first + count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_CPU_PIECE", piece)
        parts = new_parts(codec, tuple(some.shape))
        codec.encode_(some, parts)
        decoded = codec.decode(parts, tuple(some.shape))
    for part, tensor in parts.items():
        assert torch.equal(tensor, whole[part][first : first + count]), part
    assert torch.equal(decoded, codec.decode(whole, (rows, columns))[first : first + count])


@pytest.mark.parametrize(("name", "signed"), FORMS)
def test_parts_and_bytes_of_shapes_of_any_number_of_dims(name: str, signed: bool) -> None:
    codec = codec_named(name, signed)
    for shape in [(7,), (5, 130), (3, 4, 50), (0, 64), (2, 3, 3, 3)]:
        value = heavy_tailed(shape, signed)
        parts = new_parts(codec, shape)
        assert codec.bytes(shape) == sum(part.untyped_storage().nbytes() for part in parts.values())
        assert all(part.shape[0] == shape[0] for part in parts.values())
        assert not codec.decode(parts, shape).any()  # parts full of zeros are a tensor full of zeros
        before = value.clone()
        codec.encode_(value, parts)
        assert torch.equal(value, before)
        out = torch.full(shape, math.nan)
        assert codec.decode(parts, shape, out) is out
        assert torch.equal(out, round_trip(codec, value))


def test_bytes_of_a_matrix() -> None:
    elements = 4096 * 1024
    each = {
        name: codec_named(name).bytes((4096, 1024)) / elements for name in ("fp32", "bf16", "int8", "int8_dynamic", "int4", "int4_affine")
    }
    assert each == {
        "fp32": 4,
        "bf16": 2,
        "int8": 1 + 4 / 128,
        "int8_dynamic": 1 + 4 / 256,
        "int4": 0.5 + 4 / 128,
        "int4_affine": 0.5 + 8 / 256,
    }


def levels(name: str, signed: bool) -> torch.Tensor:
    """The numbers of a block whose largest is 1 that come back exactly, from the formulas of the modules' docstrings (float64)."""
    if name == "int8_dynamic":
        return dynamic_numbers(signed).double()[0 if signed else 1 :]
    if signed:
        steps = 127 if name == "int8" else 7
        codes = torch.arange(-steps, steps + 1, dtype=torch.float64) / steps
        return codes.sign() * codes.square()
    steps, power = (255, 4) if name == "int8" else (16, 2)
    return (torch.arange(1, steps + 1, dtype=torch.float64) / steps) ** power


@pytest.mark.parametrize(("name", "signed"), [form for form in LOW_BIT if form[0] != "int4_affine"])
def test_a_number_comes_back_as_one_of_the_two_levels_around_it(name: str, signed: bool) -> None:
    block = 256 if name == "int8_dynamic" else 128
    value = torch.rand(400, block, generator=torch.Generator().manual_seed(1)) ** 6  # from about 1e-14 of the largest
    value[:, 5] = 1.0
    if signed:
        value[:, ::2] *= -1
    decoded, table = round_trip(codec_named(name, signed), value).double(), levels(name, signed)
    nearest = (decoded.unsqueeze(-1) - table).abs().amin(-1)
    assert (nearest <= 1e-6 * decoded.abs().clamp_min(1e-12)).all()
    above = torch.searchsorted(table, value.double(), right=True)
    low, high = table[(above - 1).clamp(min=0)], table[above.clamp(max=len(table) - 1)]
    slack = 1e-6 * high.abs().maximum(low.abs())
    assert ((decoded >= low - slack) & (decoded <= high + slack)).all()
    if signed:  # nearest, but in the root's scale for int8
        error, best = (decoded - value).abs(), (value.double().unsqueeze(-1) - table).abs().amin(-1)
        assert (error <= (2.0 if name == "int8" else 1.0) * best + 1e-6 * error.max()).double().mean() > (
            0.95 if name == "int8" else 0.9999
        )


@pytest.mark.parametrize("name", ["bf16", "int8", "int8_dynamic", "int4"])
def test_a_second_moment_above_zero_comes_back_above_zero(name: str) -> None:
    value = torch.logspace(-27, 2, 300).repeat(300, 1)  # each row's block holds a large number and very small ones
    value = torch.stack([value[i].roll(i) for i in range(300)])
    decoded = round_trip(codec_named(name, signed=False), value)
    assert (decoded > 0).all()
    smallest = {"int8": 255.0**-4, "int4": 16.0**-2, "int8_dynamic": 3e-7, "bf16": 1.0}[name]
    if name != "bf16":  # what is below the least code grows to it, never shrinks
        below = value < smallest * 1e-3 * value.amin(1, keepdim=True).clamp_min(1e-27)
        assert (decoded[below] >= value[below]).all()
    assert (round_trip(codec_named(name, signed=False), torch.full((2, 200), 1e-27)) > 0).all()


@pytest.mark.parametrize(("name", "signed"), FORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(name: str, signed: bool, bad: float) -> None:
    value = heavy_tailed((4, 300), signed)
    value[2, 77] = bad
    decoded = round_trip(codec_named(name, signed), value)
    assert not decoded[2].isfinite().all()
    assert decoded[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
def test_an_average_that_moves_less_than_half_a_code_follows_its_expectation(name: str) -> None:
    """beta2 0.999: from gradients of 1 to gradients of 1/4 in size, 1500 steps; rounding to nearest would stay where it was."""
    generator = torch.Generator().manual_seed(0)
    codec, shape = codec_named(name, signed=False), (8, 1024)
    sizes = torch.linspace(0.3, 1.0, 1024)
    parts, exact = new_parts(codec, shape), sizes.square().repeat(8, 1)
    codec.encode_(exact, parts)
    for _ in range(1500):
        square = (0.25 * sizes * torch.randn(shape, generator=generator)).square()
        exact.lerp_(square, 1e-3)
        codec.encode_(codec.decode(parts, shape).lerp_(square, 1e-3), parts)
    ratio = (codec.decode(parts, shape).mean() / exact.mean()).item()
    assert abs(ratio - 1) < (0.05 if name == "int4" else 0.02)
    if name != "int4":
        assert (codec.decode(parts, shape) / exact - 1).abs().mean() < 0.12


def update_error(name: str, beta2: float) -> float:
    """Relative error of Adam's update with both moments stored by ``name``, mean over the last of 60 steps of heavy-tailed gradients."""
    shape = (64, 512)
    m_codec, v_codec = codec_named(name), codec_named(name, signed=False)
    m_parts, v_parts = new_parts(m_codec, shape), new_parts(v_codec, shape)
    exact_m, exact_v, errors = torch.zeros(shape), torch.zeros(shape), []
    for step in range(1, 61):
        gradient = heavy_tailed(shape, True, seed=step) + 0.3 * heavy_tailed(shape, True)
        bias1, bias2 = 1 - 0.9**step, 1 - beta2**step
        updates = []
        for m, v in ((exact_m, exact_v), (m_codec.decode(m_parts, shape), v_codec.decode(v_parts, shape))):
            m.lerp_(gradient, 0.1)
            v.lerp_(gradient.square(), 1 - beta2)
            updates.append(m / bias1 / ((v / bias2).sqrt() + 1e-8))
        m_codec.encode_(m, m_parts)
        v_codec.encode_(v, v_parts)
        errors.append(((updates[1] - updates[0]).norm() / updates[0].norm()).item())
    return sum(errors[20:]) / len(errors[20:])


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_updates_are_closer_with_companded_codes_than_with_dynamic_exponents(beta2: float) -> None:
    companded = update_error("int8", beta2)
    assert companded < 0.09
    assert companded < 0.75 * update_error("int8_dynamic", beta2)
    assert update_error("bf16", beta2) < 0.01
    assert update_error("int4", beta2) < 0.9


def test_affine_groups_of_one_sign_and_of_one_number() -> None:
    value = torch.linspace(1, 2, 128).repeat(3, 1)
    parts = pack_affine_int4(value)
    assert parts["codes"].shape == (3, 64)
    assert (unpack_affine_int4(parts, (3, 128)) - value).abs().max() <= 0.5 / 15 + 1e-6
    assert torch.equal(unpack_affine_int4(pack_affine_int4(-value), (3, 128)).amax(1), torch.full((3,), -1.0))
    constant = torch.full((2, 77), 100.5)
    assert torch.equal(unpack_affine_int4(pack_affine_int4(constant, group=32), (2, 77), group=32), constant)
    with pytest.raises(ValueError, match="groups of 33 elements"):
        pack_affine_int4(value, group=33)


@settings(max_examples=30, deadline=None)
@given(columns=st.integers(1, 300), group=st.sampled_from([2, 64, 128, 256]), seed=st.integers(0, 100))
def test_affine_error_is_at_most_half_a_step_of_the_group(columns: int, group: int, seed: int) -> None:
    value = torch.randn(5, columns, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    decoded = unpack_affine_int4(pack_affine_int4(value, group), (5, columns), group)
    for first in range(0, columns, group):
        here, back = value[:, first : first + group].float(), decoded[:, first : first + group]
        step = (here.amax(1) - here.amin(1)) / 15
        assert ((back - here).abs().amax(1) <= 0.5 * step + 1e-5).all()


def test_which_tensors_are_stored_in_few_bits_depends_on_the_global_shape_alone() -> None:
    for name, signed in LOW_BIT:
        assert codec_for(name, (64, 64), signed).name == name
        assert codec_for(name, (63, 64), signed).name == "fp32"  # fewer than 4096 elements
        assert codec_for(name, (1 << 20,), signed).name == "fp32"
        assert codec_for(name, (1 << 20, 1), signed).name == "fp32"
        assert codec_for(name, (512, 8), signed).name == name
        assert codec_for(name, (1, 64, 64), signed).name == name
    with pytest.raises(ValueError, match="'int9' is unknown.*known: fp32, bf16, int8"):
        codec_named("int9")
    with pytest.raises(ValueError, match="'int4_affine' is unknown for second moments"):
        codec_named("int4_affine", signed=False)


def test_decoding_into_a_tensor_with_gaps_is_refused() -> None:
    codec = codec_named("int8")
    with pytest.raises(RuntimeError, match="view"):
        codec.decode(new_parts(codec, (4, 3, 64)), (4, 3, 64), torch.zeros(4, 64, 3).transpose(1, 2))
