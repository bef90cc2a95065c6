"""Rotations against complex arithmetic in float64, and frequencies against transformers where the definitions agree."""

from __future__ import annotations

import cmath
import math

import pytest
import torch

from models.config import RopeConfig
from models.rope import Rope, attention_temperature, frequencies

CONFIGS = {
    "none": RopeConfig(),
    "linear": RopeConfig(scaling="linear", factor=4.0),
    "ntk": RopeConfig(scaling="ntk", factor=4.0),
    "yarn": RopeConfig(scaling="yarn", factor=8.0, original_max_positions=4096, theta=500_000.0),
    "yarn_with_bands": RopeConfig(
        scaling="yarn", factor=8.0, original_max_positions=4096, beta_fast=20.0, beta_slow=2.0, attention_factor=1.1
    ),
    "llama3": RopeConfig(scaling="llama3", factor=8.0, theta=500_000.0, low_freq_factor=1.0, high_freq_factor=4.0),
    "llama3_with_bands": RopeConfig(scaling="llama3", factor=32.0, original_max_positions=1024, low_freq_factor=2.0, high_freq_factor=8.0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_rotation_is_complex_multiplication(name: str) -> None:
    config = CONFIGS[name]
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 7, 1_000_003], [5, 4, 3, 2]])
    y = Rope(config, 8)(x, positions)
    for b, h, t, i in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 4, 4))).tolist():
        turn = cmath.exp(1j * int(positions[b, t]) * frequencies(config, 8)[i]) * attention_temperature(config)
        expected = complex(x[b, h, t, i], x[b, h, t, i + 4]) * turn
        assert abs(complex(y[b, h, t, i], y[b, h, t, i + 4]) - expected) < 1e-12


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_frequencies_agree_with_transformers(name: str, head_dim: int) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = CONFIGS[name]
    original = config.original_max_positions
    # "dynamic" is NTK with a factor that depends on the current length; at this length it is ours.
    kind = {"none": "default", "ntk": "dynamic"}.get(config.scaling, config.scaling)
    bands = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ("beta_fast", "beta_slow", "attention_factor")
    settings = {} if kind not in ("llama3", "yarn") else {key: getattr(config, key) for key in bands}
    seq_len = round((config.factor + config.factor - 1) * original / config.factor)
    theirs = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=original,
        rope_parameters={
            "rope_type": kind, "rope_theta": config.theta, "factor": config.factor, "original_max_position_embeddings": original,
            **settings,
        },
    )  # fmt: skip
    if kind == "default":
        inverse, temperature = config.theta ** -(torch.arange(0, head_dim, 2).double() / head_dim), 1.0
    else:
        inverse, temperature = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu", seq_len)
    assert torch.allclose(torch.tensor(frequencies(config, head_dim)), inverse.float(), rtol=2e-6, atol=0)
    assert temperature == pytest.approx(attention_temperature(config), rel=1e-12)


def test_rotation_agrees_with_transformers_llama() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=2048)
    positions = torch.arange(100, 164)[None]
    q, k = torch.randn(1, 4, 64, 16), torch.randn(1, 2, 64, 16)
    theirs = llama.apply_rotary_pos_emb(q, k, *llama.LlamaRotaryEmbedding(config)(q, positions))
    rope = Rope(RopeConfig(), 16)
    assert torch.allclose(rope(q, positions), theirs[0], atol=2e-5) and torch.allclose(rope(k, positions), theirs[1], atol=2e-5)


def test_scalings_stretch_what_they_should() -> None:
    plain = frequencies(RopeConfig(), 64)
    ntk = frequencies(CONFIGS["ntk"], 64)
    assert ntk[0] == plain[0] and ntk[-1] == pytest.approx(plain[-1] / 4)
    yarn_config = CONFIGS["yarn"]
    yarn, unscaled = frequencies(yarn_config, 128), frequencies(RopeConfig(theta=500_000.0), 128)
    turns = [f * yarn_config.original_max_positions / (2 * math.pi) for f in unscaled]
    assert all(y == u for y, u, t in zip(yarn, unscaled, turns, strict=True) if t > 40)
    assert all(y == pytest.approx(u / 8) for y, u, t in zip(yarn, unscaled, turns, strict=True) if t < 0.8)


def test_float32_and_bf16_stay_exact_at_a_million() -> None:
    x = torch.randn(1, 2, 3, 64, dtype=torch.float64)
    positions = torch.tensor([[1_000_000, 999_999, 1_048_575]])
    rope = Rope(RopeConfig(), 64)
    exact = rope(x, positions)
    assert (rope(x.float(), positions) - exact).abs().max() < 1e-6
    low = rope(x.bfloat16(), positions)
    assert low.dtype == torch.bfloat16 and (low - rope(x.bfloat16().double(), positions)).abs().max() < 2e-2


def test_gradient_and_long_tables(monkeypatch) -> None:
    monkeypatch.setattr("models.rope._TOKENS_PER_PASS", 2)
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 5, 6, 7]])
    rope = Rope(CONFIGS["yarn"], 6)
    assert torch.autograd.gradcheck(lambda x: rope(x, positions), (x,))
