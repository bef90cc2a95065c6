"""One step of Adam whose moments are kept in 8 or 4 bits, as one kernel: decode, update, encode and write without a temporary. On CPU of
moments in float32 too.

path       where                                        source
``C++``    CPU, with a compiler (g++ or clang++)         ``fused_adam.cpp``, compiled once, in about two seconds
``triton`` CUDA, with the package triton                 ``fused_triton.py``
``eager``  everywhere else                               the codecs and ``rules.py``, in torch's own operations

All three do the same operations in the same order, each rounded once: on CPUs with AVX2 or AVX-512 the C++ path has the bits of the eager
one (but for up to 15 elements at the end of a tensor, which torch's own kernels round apart). A run can go on with another path.

The kernels are one operator of torch's, so that a traced step (fake tensors) sees what it reads and writes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path as FilePath
from typing import Any, Literal

import torch
from torch import Tensor

from models import native
from optim.codec_blocks import BlockCodec
from optim.codecs import Codec
from optim.elementwise import ElementwiseAdam
from optim.rules import Adam

Kernel = Literal["auto", "eager", "fused"]
"""What is asked for: ``auto`` is fused wherever it can be."""
Path = Literal["eager", "C++", "triton", "by device"]
"""What there is; ``by device``: the parameter is on the meta device, and either."""
BITS = {"int8": 8, "int4": 4}
"""Codec -> of a code."""
WHOLE = 32
"""Of moments that are float32."""
BLOCK = 128
_CODES, _SCALES = ("exp_avg.codes", "exp_avg_sq.codes"), ("exp_avg.scales", "exp_avg_sq.scales")
THREAD_ELEMENTS = 1 << 18
"""That are worth a thread of their own."""

_library = torch.library.Library("longstride", "FRAGMENT")
_library.define(
    "fused_adam_(Tensor(a!) weight, Tensor gradient, Tensor(b!) mean_codes, Tensor(c!) mean_scales, Tensor(d!) square_codes, "
    "Tensor(e!) square_scales, int bits, float[] numbers, bool writes) -> ()"
)
_library.define("whole_adam_(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] means, Tensor(c!)[] squares, float[] numbers) -> ()")


def path_for(rule: object, codecs: Mapping[str, Codec], device: torch.device, dtype: torch.dtype) -> tuple[Path, str]:
    """Which path updates such a parameter, and why it is the eager one (empty where it is not). ``dtype``: in which the update is
    computed."""
    if not isinstance(rule, ElementwiseAdam):
        return "eager", f"no kernel for {type(rule).__name__}"
    if not codecs and dtype == torch.float32 and device.type in ("cpu", "meta"):
        return _native_or_not(device)
    if set(codecs) != {"exp_avg", "exp_avg_sq"}:
        return "eager", "moments are not in few bits"
    found = {codec.name for codec in codecs.values() if isinstance(codec, BlockCodec) and codec.block == BLOCK}
    if len(found) != 1 or not found <= set(BITS):
        return "eager", f"no kernel for {', '.join(sorted({codec.name for codec in codecs.values()}))}"
    if device.type in ("cpu", "meta"):
        return _native_or_not(device)
    if device.type == "cuda":
        return ("triton", "") if has_triton() else ("eager", "the package triton is not installed")
    return "eager", f"no kernel for {device.type}"


def whole_step_(
    weights: list[Tensor], gradients: list[Tensor], states: list[dict[str, Tensor]], adam: Adam, step: int, lr: float, decay: float
) -> None:
    """``fused_step_`` of many tensors whose moments are float32, in one call."""
    means, squares = ([one[name] for one in states] for name in ("exp_avg", "exp_avg_sq"))
    torch.ops.longstride.whole_adam_(weights, gradients, means, squares, _numbers(adam, step, lr, decay))


def _numbers(adam: Adam, step: int, lr: float, decay: float) -> list[float]:
    """As ``Settings`` of the kernel has them."""
    (beta1, beta2), eps = adam.betas, adam.eps
    if adam.form == "torch":
        eps *= (1 - beta2**step) ** 0.5
    return [beta2, 1 - beta1, 1 - beta2, eps, adam.correction(step), 1 - lr * decay if decay else 1.0, lr]


def _native_or_not(device: torch.device) -> tuple[Path, str]:
    if device.type == "meta":
        return "by device", ""
    return ("eager", missing_native()) if missing_native() else ("C++", "")


def fused_step_(
    weight: Tensor, gradient: Tensor, stored: Mapping[str, Tensor], adam: Adam, bits: int, step: int, lr: float, decay: float, writes: bool
) -> None:
    """weight <- weight (1 - lr decay) - lr update and the moments in ``stored``, in place; not ``writes``: weight <- update (which may be
    ``gradient``). All contiguous, float32, of the same rows."""
    if not weight.numel():
        return
    numbers = _numbers(adam, step, lr, decay)
    if bits == WHOLE:
        mean, square = ({"codes": stored[name], "scales": stored[name][:0]} for name in ("exp_avg", "exp_avg_sq"))
    else:
        mean, square = ({part: stored[f"{name}.{part}"] for part in ("codes", "scales")} for name in ("exp_avg", "exp_avg_sq"))
    torch.ops.longstride.fused_adam_(
        weight, gradient, mean["codes"], mean["scales"], square["codes"], square["scales"], bits, numbers, writes
    )


@cache
def has_triton() -> bool:
    """Whether its kernels can be made."""
    return importlib.util.find_spec("triton") is not None


@cache
def missing_native() -> str:
    """Why the C++ path is not there; empty where it is."""
    try:
        _native()
    except (native.NoCompiler, OSError) as error:
        return str(error)
    return ""


@cache
def _native() -> Any:
    flags = ("-pthread", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
    library = ctypes.CDLL(str(native.build(FilePath(__file__).with_name("fused_adam.cpp"), with_torch=False, more=flags)))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.fused_adam.argtypes = [ctypes.c_int, *[pointer] * 6, integer, integer, ctypes.c_char_p, ctypes.c_int]
    library.fused_adam.restype = None
    return library.fused_adam


def _on_cpu(
    weight: Tensor,
    gradient: Tensor,
    mean_codes: Tensor,
    mean_scales: Tensor,
    square_codes: Tensor,
    square_scales: Tensor,
    bits: int,
    numbers: list[float],
    writes: bool,
) -> None:
    tensors = (weight, gradient, mean_codes, mean_scales, square_codes, square_scales)
    _check(tensors)
    rows, size = weight.shape[0], weight.numel()
    threads = max(1, min(torch.get_num_threads(), size // THREAD_ELEMENTS, rows))
    settings = struct.pack("7fi", *numbers, writes)
    _native()(bits, *(tensor.data_ptr() for tensor in tensors), rows, size // rows, settings, threads)


def _whole_on_cpu(weights: list[Tensor], gradients: list[Tensor], means: list[Tensor], squares: list[Tensor], numbers: list[float]) -> None:
    settings, step = struct.pack("7fi", *numbers, True), _native()
    for tensors in zip(weights, gradients, means, squares, strict=True):
        _check(tensors)
        weight, gradient, mean, square = (tensor.data_ptr() for tensor in tensors)
        size = tensors[0].numel()
        threads = max(1, min(torch.get_num_threads(), size // THREAD_ELEMENTS))
        step(WHOLE, weight, gradient, mean, 0, square, 0, size, 1, settings, threads)


def _on_cuda(
    weight: Tensor,
    gradient: Tensor,
    mean_codes: Tensor,
    mean_scales: Tensor,
    square_codes: Tensor,
    square_scales: Tensor,
    bits: int,
    numbers: list[float],
    writes: bool,
) -> None:
    from optim.fused_triton import launch  # imports triton

    tensors = (weight, gradient, mean_codes, mean_scales, square_codes, square_scales)
    _check(tensors)
    launch(tensors, bits, numbers, writes)


def _check(tensors: Sequence[Tensor]) -> None:
    weight, gradient, *_ = tensors
    if gradient.shape != weight.shape or {weight.dtype, gradient.dtype} != {torch.float32}:
        raise ValueError(f"fused_adam_ takes float32 of equal shapes, not {weight.dtype} {weight.shape} and {gradient.dtype}")
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("fused_adam_ takes contiguous tensors")


_library.impl("fused_adam_", _on_cpu, "CPU")
_library.impl("fused_adam_", _on_cuda, "CUDA")
_library.impl("fused_adam_", lambda *_: None, "Meta")
_library.impl("whole_adam_", _whole_on_cpu, "CPU")
_library.impl("whole_adam_", lambda *_: None, "Meta")
