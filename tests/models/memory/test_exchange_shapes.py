"""The numbers that an exchange is planned with are those of the modules that make it."""

import pytest

from models.memory.by_heads import exchanged_numbers
from models.memory.exchange_shapes import exchange_shapes
from tests.models.memory.conformance_cases import BY_HEADS, CASES, config_of, make
from tests.models.memory.conformance_ranks import OneOfMany, OneOfManyByHeads, OwnHeads


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", sorted(BY_HEADS))
def test_shapes_are_those_of_the_module(name, ranks):
    config, module = config_of(name), make(name)
    shapes = exchange_shapes(config, ranks)
    assert shapes is not None and shapes.heads == module.traits.head_splittable and shapes.states == module.state_shape[0]
    module.carry = OneOfManyByHeads()
    module.carry.heads = OwnHeads()
    module.carry.heads.ranks = ranks
    assert exchanged_numbers(module) == shapes.to_heads + shapes.to_tokens
    assert module.cost(2, 48, 8).exchange_bytes == 2 * 48 * 8 * (shapes.to_heads + shapes.to_tokens)
    if shapes.per_chunk:
        return
    module.carry = OneOfMany()
    assert shapes.dense == (module.traits.transition == "affine_dense") and shapes.columns == module.state_shape[2]
    halo = module.cost(2, 48, 8).exchange_bytes - 2 * 8 * shapes.states * (shapes.transition + shapes.state)
    extra = 2 * 8 * shapes.heads if shapes.dense and module.traits.read_at == "segment_start" else 0  # z is kept or not
    assert halo == 2 * 8 * module.halo * 12 + extra


@pytest.mark.parametrize("name", sorted(CASES))
def test_families_whose_heads_meet_have_one_exchange(name):
    assert (exchange_shapes(config_of(name), 2) is None) == (make(name).traits.head_splittable == 1)
