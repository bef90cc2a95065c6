"""Chance for generated samples: a pure function of what it is drawn for, in arithmetic of our own. Imports no torch.

A new version of numpy cannot change a sample, and no state is kept: sample n is the same on every rank and after every restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from trainer.data.shuffling import make_key, permutation, permuted

T = TypeVar("T")

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


BLOCK = 65_536


class Draws:
    """Numbers drawn one after the other for ``purpose`` (task, seed, number of the sample ...)."""

    def __init__(self, *purpose: int | str) -> None:
        self._key = make_key(*purpose)
        self._drawn = 0

    def uniform(self, n: int) -> np.ndarray:
        """``n`` float64 in [0, 1), multiples of 2^-53: SplitMix64 of (key, how many were drawn before)."""
        with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
            z = np.arange(self._drawn + 1, self._drawn + n + 1, dtype=np.uint64) * _GOLDEN + np.uint64(self._key)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z ^= z >> np.uint64(31)
        self._drawn += n
        return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def below(self, limit: int, n: int) -> np.ndarray:
        """``n`` whole numbers in 0..limit-1, int64, any of them more than once."""
        found = np.empty(n, dtype=np.int64)
        for start in range(0, n, BLOCK):  # a million tokens are drawn without much beside them
            found[start : start + BLOCK] = self.uniform(min(BLOCK, n - start)) * limit
        return found

    def one(self, limit: int) -> int:
        """A whole number in 0..limit-1."""
        return int(self.below(limit, 1)[0])

    def different(self, limit: int, n: int) -> np.ndarray:
        """``n`` different numbers of 0..limit-1 in random order, int64."""
        if n > limit:
            raise ValueError(f"there are no {n} different numbers below {limit}")
        self._drawn += 1
        key = make_key("different", self._key, self._drawn)
        if n * 64 < limit:
            return np.array([permuted(i, limit, key) for i in range(n)], dtype=np.int64)
        return permutation(limit, key)[:n].astype(np.int64)

    def weighted(self, weights: np.ndarray, n: int) -> np.ndarray:
        """``n`` indices of ``weights``, ascending, drawn without putting back (exponential keys; Efraimidis and Spirakis 2006)."""
        if n > len(weights):
            raise ValueError(f"there are no {n} different indices of {len(weights)}")
        keys = -np.log1p(-self.uniform(len(weights))) / weights
        return np.sort(np.argpartition(keys, n - 1)[:n])

    def choice(self, items: Sequence[T]) -> T:
        """One of ``items``."""
        return items[self.one(len(items))]
