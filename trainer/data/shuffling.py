"""Permutations as pure functions of a key, in arithmetic of our own: a new numpy version cannot change the order of a run."""

from __future__ import annotations

import hashlib

import numpy as np

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def make_key(*parts: int | str) -> int:
    """64-bit key from what a permutation depends on (purpose, seed, epoch)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permutation(n: int, key: int) -> np.ndarray:
    """All of 0..n-1 in an order drawn by ``key``: sorted by the SplitMix64 hash of (key, index)."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.argsort(z, kind="stable")


def permuted(index: int, n: int, key: int) -> int:
    """Where ``index`` in 0..n-1 goes under a permutation drawn by ``key``, in constant time and memory.

    A six-round Feistel network over the next even number of bits, walked until it lands below ``n`` (Black and Rogaway 2002,
    cycle walking; under four rounds on average).
    """
    if not 0 <= index < n:
        raise ValueError(f"index {index} is not in 0..{n - 1}")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(6):
            left, right = right, left ^ (_mix(key + turn * _GOLDEN ^ right) & mask)
        index = left << half | right
        if index < n:
            return index


def _mix(z: int) -> int:
    """SplitMix64's output function."""
    z = (z + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
