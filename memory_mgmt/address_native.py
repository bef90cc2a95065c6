"""The C++ loops of address planning, called through ctypes; None where they cannot be compiled, and then the Python twins run."""

from __future__ import annotations

import ctypes
import functools
import warnings

import numpy as np

from memory_mgmt.address_problem import Int64s, Problem
from memory_mgmt.native import NoCompiler, build

_INT64S = np.ctypeslib.ndpointer(np.int64, flags="C_CONTIGUOUS")
_INT32S = np.ctypeslib.ndpointer(np.int32, flags="C_CONTIGUOUS")


@functools.cache
def search_library() -> ctypes.CDLL | None:
    """Greedy placement and local search, compiled on first use; None, with one warning, where there is no compiler."""
    library = _load("address_search.cpp")
    if library is not None:
        library.address_place.restype = ctypes.c_int64
        library.address_place.argtypes = [ctypes.c_int, _INT64S, _INT64S, _INT64S, _INT32S, ctypes.c_int, _INT64S]
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
