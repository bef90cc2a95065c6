import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.shuffling import _mix, make_key, permutation, permuted


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
def test_both_forms_are_permutations(n: int, key: int) -> None:
    assert sorted(permutation(n, key).tolist()) == list(range(n))
    assert sorted(permuted(i, n, key) for i in range(n)) == list(range(n))


def test_order_depends_on_every_part_of_the_key_and_on_nothing_else() -> None:
    keys = [make_key("sequences", seed, epoch) for seed in (0, 1) for epoch in (0, 1)] + [make_key("documents", 0, 0)]
    for form in (lambda k: tuple(permutation(100, k).tolist()), lambda k: tuple(permuted(i, 100, k) for i in range(100))):
        assert len({form(key) for key in keys}) == len(keys)
        assert form(keys[0]) == form(make_key("sequences", 0, 0))


def test_order_is_frozen_for_ever() -> None:
    """A saved cursor means these very numbers: changing them breaks the resume of every run."""
    assert _mix(0) == 0xE220A8397B1DCDAF  # first output of the published SplitMix64 for seed 0
    assert make_key("sequences", 7, 3) == 9091705516670369520
    assert permutation(8, 5).tolist() == [3, 4, 2, 5, 0, 7, 1, 6]
    assert [permuted(i, 8, 5) for i in range(8)] == [1, 0, 2, 3, 5, 4, 6, 7]


def test_permuted_spreads_neighbours() -> None:
    n, key = 10_000, make_key("sequences", 0, 0)
    places = np.array([permuted(i, n, key) for i in range(n)])
    assert abs(np.corrcoef(np.arange(n), places)[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(places)) <= 10) < 0.01
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05


def test_index_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="not in 0..4"):
        permuted(5, 5, 0)
