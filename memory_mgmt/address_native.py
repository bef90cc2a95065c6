"""The C++ loops of address planning, called through ctypes; None where they cannot be compiled, and then the Python twins run."""

from __future__ import annotations

import ctypes
import functools
import warnings

import numpy as np
from numpy.typing import NDArray

from memory_mgmt.address_problem import Int64s, Problem
from memory_mgmt.native import NoCompiler, build

_INT64S = np.ctypeslib.ndpointer(np.int64, flags="C_CONTIGUOUS")
_FLOATS = np.ctypeslib.ndpointer(np.float64, flags="C_CONTIGUOUS")
_INT32S = np.ctypeslib.ndpointer(np.int32, flags="C_CONTIGUOUS")

_TABLE_BITS = 20  # 8 MiB of failed states


@functools.cache
def search_library() -> ctypes.CDLL | None:
    """Greedy placement and local search, compiled on first use; None, with one warning, where there is no compiler."""
    library = _load("address_search.cpp")
    if library is not None:
        library.address_place.restype = ctypes.c_int64
        library.address_place.argtypes = [ctypes.c_int, _INT64S, _INT64S, _INT64S, _INT32S, ctypes.c_int, _INT64S]
        library.address_squeaky.restype = ctypes.c_int64
        library.address_squeaky.argtypes = [
            *(ctypes.c_int, _INT64S, _INT64S, _INT64S, _INT32S, ctypes.c_int64, ctypes.c_double),
            *(_INT32S, ctypes.c_uint64, _INT64S),
        ]
    return library


@functools.cache
def exact_library() -> ctypes.CDLL | None:
    """Exact search, compiled on first use; None, with one warning, where there is no compiler."""
    library = _load("address_exact.cpp")
    if library is not None:
        i64 = ctypes.c_int64
        library.address_exact.restype = ctypes.c_int
        library.address_exact.argtypes = [
            *(ctypes.c_int, _INT64S, _INT64S, _INT64S, i64, i64, _INT64S, _FLOATS, ctypes.c_uint64, ctypes.c_int, i64, ctypes.c_double),
            *(_INT32S, _INT64S, ctypes.POINTER(i64)),
        ]
    return library


def _load(source: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(build(source, with_torch=False)))
    except NoCompiler as error:
        warnings.warn(f"address planning runs in Python, which is slower: {error}", RuntimeWarning, stacklevel=3)
        return None


def native_place(library: ctypes.CDLL, problem: Problem, order: Int64s, best: bool) -> Int64s:
    """The offsets of address_greedy.place, from C++."""
    offsets = np.zeros(len(problem), dtype=np.int64)
    library.address_place(len(problem), problem.lower, problem.upper, problem.size, order.astype(np.int32), int(best), offsets)
    return offsets


def native_squeaky(
    library: ctypes.CDLL, problem: Problem, order: Int64s, target: int, seconds: float, stop: NDArray[np.int32], seed: int
) -> Int64s:
    """The lowest plan of a squeaky-wheel search that starts with placing in ``order``; releases the GIL."""
    offsets = np.zeros(len(problem), dtype=np.int64)
    lives = (problem.lower, problem.upper, problem.size)
    library.address_squeaky(len(problem), *lives, order.astype(np.int32), target, min(seconds, 1e9), stop, seed, offsets)
    return offsets


def native_exact(
    library: ctypes.CDLL,
    problem: Problem,
    capacity: int,
    fixed: Int64s,
    features: NDArray[np.float64],
    nodes_of_attempt: int,
    seconds: float,
    stop: NDArray[np.int32],
    seed: int,
) -> tuple[int, Int64s]:
    """1 with the offsets of a plan no higher than ``capacity``, 0 where there is none, -1 when stopped; releases the GIL."""
    offsets, nodes = np.zeros(len(problem), dtype=np.int64), ctypes.c_int64(0)
    # Time is read every 64 nodes: 30 years are as good as for ever and fit the clock.
    arguments = (problem.unit, capacity, fixed, features, seed, _TABLE_BITS, nodes_of_attempt, min(seconds, 1e9), stop, offsets, nodes)
    code = library.address_exact(len(problem), problem.lower, problem.upper, problem.size, *arguments)
    if code == -2:
        raise RuntimeError("no thread could be started for the exact search: too little memory or too many threads")
    return code, offsets
