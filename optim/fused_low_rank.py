"""Adam in a subspace of the gradient and back, of many matrices, as one kernel: GaLore, APOLLO and the points of the grid like them, where
a rank has the whole matrix on CPU in float32 (``fused_low_rank.cpp``, compiled once, in about four seconds).

Elementwise arithmetic is that of the eager path, each operation rounded once. Products and norms are sums in an order of their own, which
no number of threads and no machine changes; to the eager path they are as near as that is on one machine to itself on another.

The kernel is one operator of torch's, so that a traced step (fake tensors) sees what it reads and writes.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path as FilePath
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from models import native
from optim.composed import Composed, Point
from optim.coordinate_rules import AdamRule
from optim.exchange import alone
from optim.fused import Path
from optim.lifts import Back, ScaledGradient
from optim.methods import Rows
from optim.projectors import Projector
from optim.rules import Adam, NormGrowth

_library = torch.library.Library("longstride", "FRAGMENT")
_library.define(
    "low_rank_step_(Tensor(a!)[] weights, Tensor[] gradients, Tensor[] bases, Tensor(b!)[] means, Tensor(c!)[] squares, "
    "Tensor(d!)[] norms, Tensor(e!) scratch, int[] lefts, float[] numbers, float[] settings, int lift) -> ()"
)
_LIFTS = {"back": 0, "channel": 1, "tensor": 2}


@dataclass(frozen=True)
class Known:
    """A method that the kernel can step, in the kernel's terms."""

    composed: Composed
    adam: Adam
    lift: int
    scale: float
    growth: NormGrowth | None

    def numbers(self, step: int) -> tuple[float, float]:
        """ε of the root, and by what the ratio is multiplied."""
        beta2 = self.adam.betas[1]
        eps = self.adam.eps if self.adam.form == "hf" else self.adam.eps * (1 - beta2**step) ** 0.5
        return eps, self.adam.correction(step) * (self.scale if self.lift == 0 else 1.0)

    def left(self, shape: tuple[int, ...]) -> bool:
        """Which side of a matrix is projected."""
        return self.composed.side((shape[0], shape[1])) == "left"

    def basis(self, gradient: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Tensor:
        """Of this step, renewed if due; of a matrix that this rank has whole."""
        projector = cast(Projector, self.composed.projector)
        if "basis" in states and not projector.refresh.due(step, key):
            return states["basis"]
        return alone(projector.basis(gradient, states, rows, step, key))

    def settings(self, lr: float, decay: float) -> list[float]:
        """As ``Settings`` of the kernel has them."""
        beta1, beta2 = self.adam.betas
        limit = self.growth.limit if self.growth is not None else 0.0
        return [beta2, 1 - beta1, 1 - beta2, self.scale**0.5, limit, 1 - lr * decay if decay else 1.0, lr]


def known(method: object) -> Known | None:
    """``method`` in the kernel's terms; None of one that is not of its kind."""
    composed = method.composed if isinstance(method, Point) else method
    if not isinstance(composed, Composed) or not isinstance(composed.rule, AdamRule) or not hasattr(composed.projector, "side"):
        return None
    adam, lift, guard = composed.rule.adam, composed.lift, composed.guard
    if isinstance(lift, Back) and guard is None:
        return Known(composed, adam, _LIFTS["back"], lift.scale, None)
    if isinstance(lift, ScaledGradient) and (guard is None or isinstance(guard, NormGrowth)):
        return Known(composed, adam, _LIFTS[lift.by], lift.scale, guard)
    return None


def path_for(device: torch.device) -> tuple[Path, str]:
    """What steps such a method there, and why it is the eager path (empty where it is not)."""
    if device.type == "meta":
        return "by device", ""
    if device.type != "cpu":
        return "eager", f"no kernel for {device.type}"
    return ("eager", missing()) if missing() else ("C++", "")


@cache
def missing() -> str:
    """Why there is no kernel; empty where there is one."""
    try:
        _native()
    except (native.NoCompiler, OSError) as error:
        return str(error)
    return ""


def scratch_elements(weights: Sequence[Tensor], bases: Sequence[Tensor], lefts: Sequence[bool | int], lift: int) -> int:
    """Floats of memory that a step of such matrices takes: that of the largest, as they are stepped one after the other."""
    threads = torch.get_num_threads()
    return max(
        _scratch(weight.shape, basis.shape[1], left, lift, threads) for weight, basis, left in zip(weights, bases, lefts, strict=True)
    )


@cache
def _scratch(shape: tuple[int, int], rank: int, left: int, lift: int, threads: int) -> int:
    return int(_native().low_rank_scratch(*shape, rank, left, lift, threads))


def step_(
    method: Known,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    bases: Sequence[Tensor],
    moments: Sequence[dict[str, Tensor]],
    steps: Sequence[int],
    lefts: Sequence[bool],
    scratch: Tensor,
    lr: float,
    decay: float,
) -> None:
    """One step of matrices that ``method`` updates: weights and the moments ``exp_avg``, ``exp_avg_sq`` and, with a guard, ``norm`` in
    place. All contiguous float32; ``bases`` as ``projectors.py`` has them, ``scratch`` of ``scratch_elements``."""
    norms = [] if method.growth is None else [one["norm"] for one in moments]
    numbers = [number for step in steps for number in method.numbers(step)]
    means, squares = ([one[name] for one in moments] for name in ("exp_avg", "exp_avg_sq"))
    torch.ops.longstride.low_rank_step_(
        weights,
        gradients,
        bases,
        means,
        squares,
        norms,
        scratch,
        [int(left) for left in lefts],
        numbers,
        method.settings(lr, decay),
        method.lift,
    )


@cache
def _native() -> Any:
    """One library for each width of vectors; compiled for the width that torch uses too."""
    widths = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in widths and capability == "DEFAULT" and torch.backends.mkl.is_available():
        raise native.NoCompiler("the processor has no AVX2")
    of_width = (f"-march={widths[capability]}", "-mprefer-vector-width=512") if capability in widths else ()
    flags = ("-pthread", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi", *of_width)
    library = ctypes.CDLL(str(native.build(FilePath(__file__).with_name("fused_low_rank.cpp"), with_torch=False, more=flags)))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.low_rank_scratch.argtypes = [integer, integer, integer, integer, ctypes.c_int32, integer]
    library.low_rank_scratch.restype = integer
    library.low_rank_step.argtypes = [ctypes.c_char_p, integer, ctypes.c_char_p, pointer, integer]
    library.low_rank_step.restype = None
    return library


_MATRIX = struct.Struct("=6Q4q2f")


def _on_cpu(
    weights: list[Tensor],
    gradients: list[Tensor],
    bases: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    norms: list[Tensor],
    scratch: Tensor,
    lefts: list[int],
    numbers: list[float],
    settings: list[float],
    lift: int,
) -> None:
    rows = []
    for i, (weight, gradient, basis, mean, square) in enumerate(zip(weights, gradients, bases, means, squares, strict=True)):
        _check(weight, gradient, basis, mean, square, lefts[i])
        rank = basis.shape[1]
        pointers = (weight.data_ptr(), gradient.data_ptr(), basis.data_ptr(), mean.data_ptr(), square.data_ptr())
        norm = norms[i].data_ptr() if norms else 0
        rows.append(_MATRIX.pack(*pointers, norm, *weight.shape, rank, lefts[i], numbers[2 * i], numbers[2 * i + 1]))
    threads, most = torch.get_num_threads(), scratch_elements(weights, bases, lefts, lift)
    if scratch.numel() < most:
        raise ValueError(f"low_rank_step_ takes {most} floats of scratch memory, not {scratch.numel()}")
    _native().low_rank_step(b"".join(rows), len(rows), struct.pack("=7fi", *settings, lift), scratch.data_ptr(), threads)


def _check(weight: Tensor, gradient: Tensor, basis: Tensor, mean: Tensor, square: Tensor, left: int) -> None:
    long = weight.shape[1] if left else weight.shape[0]
    lies = (basis.shape[0] == (weight.shape[0] if left else weight.shape[1])) and mean.shape == square.shape == (long, basis.shape[1])
    if gradient.shape != weight.shape or not lies:
        raise ValueError(f"low_rank_step_: {tuple(gradient.shape)}, {tuple(basis.shape)} and {tuple(mean.shape)} do not belong together")
    for tensor in (weight, gradient, basis, mean, square):
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError("low_rank_step_ takes contiguous float32 tensors")


def _flops(*shapes: Any, **_: Any) -> int:
    """Of the products, for torch's counter; its arguments are those of the operator, shapes for tensors."""
    weights, bases, lift = shapes[0], shapes[2], shapes[-1]
    return sum(2 * rows * columns * basis[1] * (2 if lift == 0 else 1) for (rows, columns), basis in zip(weights, bases, strict=True))


_library.impl("low_rank_step_", _on_cpu, "CPU")
_library.impl("low_rank_step_", lambda *_: None, "Meta")
register_flop_formula(torch.ops.longstride.low_rank_step_)(_flops)
