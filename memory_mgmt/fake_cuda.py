"""CUDA semantics for fake tensors on a machine without a GPU, whether torch was built with CUDA or not. For a process that only traces.

``preload`` must run before the first ``import torch`` of the process, ``install`` after it; neither does anything where there is a
GPU that torch can use. What torch gets wrong about cuda tensors without one, and the repair:

- no device guard, no accelerator, or ones that ask for a driver: autograd aborts or refuses. ``fake_cuda.cpp`` registers both, doing
  nothing.
- operators that have one fused CUDA kernel are decomposed into several when no kernel is registered, with temporaries that the
  GPU never makes. A kernel that is never called (fake tensors use shapes only) is registered for them.
- torch.cuda's streams, events and queries raise, and fake tensors initialise the GPU. Objects that do nothing take their place; they
  know which stream is current, because that decides whose pool memory comes from.

Imports torch inside ``install`` only.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from memory_mgmt import native

FUSED_ON_CUDA = ("silu_backward", "mish_backward", "_fused_rms_norm", "_fused_rms_norm_backward")
"""aten operators without a decomposition on CUDA, with one on a torch that has no CUDA kernels."""


_library: ctypes.CDLL | None = None


def usable_gpu() -> bool:
    """Whether torch, which is not imported for this, was built with CUDA and a driver here shows a GPU."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None or not any(Path(spec.origin).parent.glob("lib/libtorch_cuda*")):
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def preload() -> None:
    """Make autograd accept fake cuda tensors. Raises RuntimeError when torch is imported already, NoCompiler without a compiler."""
    global _library
    if usable_gpu():
        return
    if "torch" in sys.modules:
        raise RuntimeError("fake CUDA must be loaded before torch is imported: trace in a process of its own")
    _library = ctypes.CDLL(str(native.build("fake_cuda.cpp", with_torch=True)), mode=ctypes.RTLD_GLOBAL)
    if _library.install_fake_cuda() == 2:
        raise RuntimeError("torch does not see the pretended accelerator; this torch is not supported for planning GPUs without one")


def install(n_devices: int) -> None:
    """Give torch.cuda what a trace needs, as if ``n_devices`` GPUs were there. Does nothing where there are real ones."""
    import torch

    if _library is None:  # there are real ones
        return
    _library.restore_guard()
    _register_kernels(torch)
    replaced: dict[str, Any] = {
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda device=None: _now.stream,
        "default_stream": lambda device=None: _DEFAULT,
        "stream": _on,
        "set_stream": lambda stream: setattr(_now, "stream", stream or _now.stream),
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device_count": lambda: n_devices,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": lambda device=None: None,
        "is_current_stream_capturing": lambda: False,
        "_lazy_init": lambda: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "get_device_capability": lambda device=None: (9, 0),
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]
    from torch._subclasses import fake_tensor
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake_tensor.init_gpu_context = lambda device: None  # type: ignore[assignment]
    # It asks torch.cuda.is_available(), which must say yes for autocast, and would then use the device in torch.tensor().
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[method-assign, assignment]


def leave(code: int) -> NoReturn:
    """End this process at once. Autograd's device thread may still be freeing what a backward pass held; Python's own exit would take
    the interpreter away from it, and that aborts the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _register_kernels(torch: Any) -> None:
    library = torch.library.Library("aten", "IMPL")

    def never_called(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a pretended CUDA kernel was called: tensors must be fake")

    for name in FUSED_ON_CUDA:
        if hasattr(torch.ops.aten, name) and not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA"):
            library.impl(name, never_called, "CUDA")
    # The registration lasts as long as this object.
    torch.library._longstride_fake_cuda = library


class _Event:
    """A CUDA event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Any) -> float:
        return 0.0


class _Stream:
    """A CUDA stream that has nothing to do; while it is current, memory is allocated from its pool."""

    device_index = 0
    _numbers = itertools.count()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = next(self._numbers)
        """0 for the default one, as in CUDA."""
        self._entered: list[contextlib.AbstractContextManager[None]] = []

    def __enter__(self) -> _Stream:
        self._entered.append(_on(self))
        self._entered[-1].__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._entered.pop().__exit__(None, None, None)

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


_DEFAULT = _Stream()


class _Current(threading.local):
    """The current stream of a thread."""

    stream = _DEFAULT


_now = _Current()


@contextlib.contextmanager
def _on(stream: _Stream | None) -> Iterator[None]:
    before = _now.stream
    _now.stream = stream or before
    try:
        yield
    finally:
        _now.stream = before
