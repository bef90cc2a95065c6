"""Initial decays of the recurrent mixers: as published over many heads, and with a head that keeps for long in every layer."""

import math

import pytest
import torch
from torch.nn import functional as F

from models.memory.initial import initial_gate


def drawn(name, heads, seed):
    value = initial_gate(name, torch.Size([heads]), torch.Generator().manual_seed(seed))
    assert value is not None
    return value.double().exp() if name == "A_log" else F.softplus(value.double())


@pytest.mark.parametrize("heads", [2, 4, 32])
def test_every_layer_has_a_head_that_keeps_for_long_and_one_that_does_not(heads):
    for seed in range(50):
        # The generator of each parameter is its own, as in init_weights.
        decay = drawn("A_log", heads, seed) * drawn("dt_bias", heads, 1000 + seed)
        assert decay.min() < 0.1  # half life above 7 tokens, for the worst draw of two heads; independent draws reach 1.6
        assert decay.max() > 0.08
        assert decay.min() < decay.max()


@pytest.mark.parametrize("name, low, high, scale", [("A_log", 1, 16, lambda x: x), ("dt_bias", 1e-3, 0.1, math.log)])
def test_values_are_distributed_as_published(name, low, high, scale):
    together = torch.cat([drawn(name, 8, seed) for seed in range(500)])
    assert low * 0.999 <= together.min() and together.max() <= high * 1.001
    places = torch.tensor([(scale(x) - scale(low)) / (scale(high) - scale(low)) for x in together.tolist()]).sort().values
    expected = (torch.arange(len(places)) + 0.5) / len(places)
    assert (places - expected).abs().max() < 0.02  # Kolmogorov's distance to uniform


def test_one_head_is_a_draw_from_the_whole_range():
    decays = torch.cat([drawn("dt_bias", 1, seed) for seed in range(200)])
    assert decays.min() < 1.2e-3 and decays.max() > 0.08
