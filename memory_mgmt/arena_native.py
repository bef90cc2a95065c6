"""The C functions of ``arena_cpu.cpp`` through ctypes, and its installation as torch's CPU allocator."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch

from memory_mgmt.native import build

Address = int | None
_I64, _PTR = ctypes.c_int64, ctypes.c_void_p
Signatures = Mapping[str, tuple[type | None, list[type]]]
COMMON: Signatures = {
    "lsa_thread": (_I64, []),
    "lsa_log_start": (None, []),
    "lsa_log_stop": (None, []),
    "lsa_log_size": (_I64, []),
    "lsa_log_read": (None, [_I64, _I64, _PTR]),
    "lsa_region_close": (None, [_PTR]),
    "lsa_region_give_back": (_I64, [_PTR]),
    "lsa_region_blocks": (_I64, [_PTR]),
    "lsa_plan_delete": (None, [_PTR]),
    "lsa_begin": (ctypes.c_int, [_PTR, _PTR, _I64]),
    "lsa_end": (None, [_PTR]),
}
"""What the libraries of both devices have."""
_CPU: Signatures = {
    "lsa_installed": (ctypes.c_int, []),
    "lsa_install": (ctypes.c_int, []),
    "lsa_uninstall": (ctypes.c_int, []),
    "lsa_region_new": (_PTR, [_I64]),
    "lsa_region_take": (_PTR, [_PTR, _I64, _I64]),
    "lsa_region_release": (None, [_PTR]),
    "lsa_plan_new": (_PTR, [_I64, _PTR, _PTR]),
}
_PAIRS = ("served", "served_bytes", "passed", "passed_bytes", "missed", "missed_bytes", "conflicts", "conflict_bytes")
STATS = (*_PAIRS, "resyncs", "waits", "position")
"""Names of ``Stat`` in ``arena_core.h``."""


@cache
def library() -> ctypes.CDLL:
    """The compiled library. Never unloaded: blocks that it served may be freed until the process ends.

    Raises NoCompiler when it has to be compiled and cannot be.
    """
    # torch is imported above, so its libraries, which this one needs, are loaded already.
    return declared(ctypes.CDLL(str(build("arena_cpu.cpp", with_torch=True))), {**COMMON, **_CPU})


def declared(lib: ctypes.CDLL, signatures: Signatures) -> ctypes.CDLL:
    """``lib`` with the types of its functions set."""
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def installed_library() -> ctypes.CDLL:
    """``library()``, with its allocator behind every CPU tensor made from now on (switched off: it hands requests through).

    Raises RuntimeError where another CPU allocator is in place that cannot be wrapped.
    """
    lib = library()
    if not lib.lsa_install():
        raise RuntimeError(f"torch {torch.__version__} has a CPU allocator in place that the arena cannot stand in front of")
    return lib


def uninstall() -> bool:
    """Put back the CPU allocator found at installation; False while blocks of an arena or of a log live (it then stays, switched off)."""
    return bool(library().lsa_uninstall())


def new_plan(lib: ctypes.CDLL, sizes: Sequence[int], offsets: Sequence[int]) -> int:
    """Handle of a native plan: the k-th request has ``sizes[k]`` bytes and the offset ``offsets[k]``, -1 for not planned."""
    sizes_N, offsets_N = np.asarray(sizes, dtype=np.int64), np.asarray(offsets, dtype=np.int64)
    return lib.lsa_plan_new(len(sizes_N), sizes_N.ctypes.data, offsets_N.ctypes.data)
