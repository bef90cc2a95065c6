"""The arena on CUDA: ``arena_cuda.cpp`` through ctypes, in front of torch's CUDA caching allocator (``arena_cuda_torch.cpp``)."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import torch

from memory_mgmt.arena_native import COMMON, Signatures, declared
from memory_mgmt.arena_recording import ALIGNMENT, SMALLEST_BYTES, StepPlan, StepRecord, step_record
from memory_mgmt.native import build

_I64, _PTR = ctypes.c_int64, ctypes.c_void_p
_CUDA: Signatures = {
    "lsa_malloc": (_PTR, [_I64, ctypes.c_int, _I64]),
    "lsa_free": (None, [_PTR, _I64, ctypes.c_int, _I64]),
    "lsa_record_stream": (None, [_PTR, _I64]),
    "lsa_mode": (_PTR, []),
    "lsa_stand_on": (None, [_PTR, _PTR, _PTR]),
    "lsa_runtime": (ctypes.c_int, [ctypes.c_char_p]),
    "lsa_region_new": (_PTR, [_I64, ctypes.c_int]),
    "lsa_plan_new": (_PTR, [_I64, _PTR, _PTR, _PTR, _PTR]),
}
SUPPORTED = ("2.11", "2.12", "2.13")
"""Releases of torch whose CUDA allocator has no function that ``arena_cuda_torch.cpp`` does not hand through."""


class CudaBackend:
    """What ``Arena`` needs of a CUDA device; the index is the current device's."""

    alignment = ALIGNMENT["cuda"]
    smallest_bytes = SMALLEST_BYTES["cuda"]

    def __init__(self, lib: ctypes.CDLL | None = None, device: int | None = None, empty_cache: Callable[[], None] | None = None) -> None:
        """``lib``, ``device`` and ``empty_cache``: for a test without torch's CUDA allocator.

        Raises NoCompiler or RuntimeError where the allocator cannot be built or installed.
        """
        self.lib = installed_library() if lib is None else lib
        self._device = torch.cuda.current_device() if device is None else device
        self.trim: Callable[[], None] = torch.cuda.empty_cache if empty_cache is None else empty_cache
        """What is free goes back to the device, so that it can become part of the region."""

    @contextlib.contextmanager
    def recording(self) -> Iterator[Callable[[int], StepRecord]]:
        """Log the requests inside; what is yielded gives the record, of requests of at least so many bytes, afterwards."""
        lib, rows_E4 = self.lib, np.empty((0, 4), dtype=np.int64)
        lib.lsa_log_start()
        try:
            yield lambda smallest: step_record(rows_E4, lib.lsa_thread(), smallest)
            rows_E4 = np.empty((lib.lsa_log_size(), 4), dtype=np.int64)
            lib.lsa_log_read(0, len(rows_E4), rows_E4.ctypes.data)
        finally:
            lib.lsa_log_stop()

    def new_plan(self, plan: StepPlan) -> int:
        """Handle of a native plan."""
        table = [np.asarray(column, dtype=np.int64) for column in (plan.sizes, plan.offsets, plan.streams)]
        marked_N = np.zeros(len(plan.sizes), dtype=np.uint8)
        marked_N[list(plan.marked)] = 1
        return self.lib.lsa_plan_new(len(plan.sizes), *(column_N.ctypes.data for column_N in table), marked_N.ctypes.data)

    def new_region(self, size: int) -> int | None:
        """Handle of a region; None where there is not so much memory."""
        return self.lib.lsa_region_new(size, self._device)

    def around(self) -> contextlib.AbstractContextManager[object]:
        """Around a step: the backward pass runs on the thread that owns the arena, not on autograd's own thread for the device."""
        return torch.autograd.set_multithreading_enabled(False)


def use_expandable_segments() -> None:
    """Let torch's CUDA caching allocator grow its segments instead of splitting fixed ones, as plans for CUDA assume; call it before the
    first tensor. What the environment says of segments, or of another allocator, stays."""
    said = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    if "expandable_segments" not in said and "backend" not in said:
        # Whatever is not named goes back to its default, so the environment's settings are said again.
        torch._C._accelerator_setAllocatorSettings(",".join([*([said] if said else []), "expandable_segments:True"]))


@cache
def library() -> ctypes.CDLL:
    """The compiled library, on top of cudaMalloc as long as nothing else is below it. Never unloaded. Raises NoCompiler."""
    return declared(ctypes.CDLL(str(build("arena_cuda.cpp", with_torch=False))), {**COMMON, **_CUDA})


@cache
def installed_library() -> ctypes.CDLL:
    """``library()`` in front of torch's caching allocator, for all CUDA tensors made from now on; switched off it hands them through.

    Raises NoCompiler or RuntimeError where that cannot be.
    """
    if torch.version.cuda is None:
        raise RuntimeError(f"torch {torch.__version__} is built without CUDA")
    if torch.__version__.rsplit(".", 1)[0] not in SUPPORTED:
        raise RuntimeError(f"it knows the CUDA allocator of torch {SUPPORTED[0]} to {SUPPORTED[-1]}, this is torch {torch.__version__}")
    glue = ctypes.CDLL(str(build("arena_cuda_torch.cpp", with_torch=True, with_cuda=True)))
    lib = library()
    if not lib.lsa_runtime(None) and not lib.lsa_runtime(_runtime_name()):
        raise RuntimeError("this process has no CUDA runtime")
    malloc, free, record_stream, stand_on = (
        ctypes.cast(f, _PTR) for f in (lib.lsa_malloc, lib.lsa_free, lib.lsa_record_stream, lib.lsa_stand_on)
    )
    if not glue.lsa_install(malloc, free, record_stream, _PTR(lib.lsa_mode()), stand_on):
        raise RuntimeError("it needs torch's own CUDA caching allocator; another one is in place (PYTORCH_ALLOC_CONF)")
    return lib


def _runtime_name() -> bytes:
    return f"libcudart.so.{(torch.version.cuda or '0').partition('.')[0]}".encode()
