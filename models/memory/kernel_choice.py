"""Which kernel computes the recurrence of an affine memory (``model.memory.kernel``), and why the others are passed over.

``eager`` is this package's own: chunked forms in torch operations, on every device, in float32 or float64. ``fla`` is the triton kernels
of flash-linear-attention, where that package is installed: `models.memory.fla_kernels` calls them. ``auto`` takes the first that neither
refuses nor yields. Imports no torch: a plan and ``--explain`` ask it too.

Try alone: ``python -c "from models.memory.kernel_choice import *; print(explain(Recurrence('decayed_sum', 'cuda', 'bf16', 64, 64)))"``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal, NamedTuple

from models.config import ModelConfig
from models.errors import UserError

Rule = Literal["gated_delta_rule", "decayed_sum", "gated_slots"]

RULES: dict[str, Rule] = {
    "gated_deltanet": "gated_delta_rule",
    "mom": "gated_delta_rule",
    "mamba2": "decayed_sum",
    "gsa": "gated_slots",
}
"""``model.memory.kind`` -> its recurrence. Other kinds have no choice of kernels."""

KNOWN_FLA = (0, 6)
"""The release of flash-linear-attention whose functions are called: their arguments change from one to the next."""
SMALLEST, LARGEST_KEY = 16, 256
"""A matrix product of triton's has at least 16 rows; the kernels of the delta rule hold keys of at most 256."""


class Recurrence(NamedTuple):
    """What the choice depends on."""

    rule: Rule
    device: str
    """Type of the device: cpu, cuda."""
    precision: str
    """What products run in: bf16, fp16, fp32, fp64."""
    key_dim: int
    value_dim: int
    n_slots: int = 0
    """Of gated slots; 0: the rule has none."""
    capability: tuple[int, int] | None = None
    """Compute capability of a CUDA device; None: not known, or none."""
    deterministic: bool = False
    """Two runs must be bit-identical (``train.deterministic``)."""
    lanes: bool = False
    """Each memory works on its own tokens (``model.memory.mom.compute: routed``)."""


class Kernel(NamedTuple):
    """One way to compute a recurrence."""

    name: str
    refuses: Callable[[Recurrence], str | None]
    """Why it cannot, or None."""
    yields: Callable[[Recurrence], str | None]
    """Why it leaves to the next what it can compute, or None; not asked where it is chosen by name."""


def installed_fla() -> str | None:
    """The version of flash-linear-attention that is installed here."""
    return _installed() or None


@lru_cache
def _installed() -> str:
    if find_spec("fla") is None:
        return ""
    for name in ("fla-core", "flash-linear-attention"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def missing_fla() -> str | None:
    """Why the package cannot be called here; None if it can."""
    found = installed_fla()
    if found is None:
        return "the package flash-linear-attention is not installed"
    if not found.startswith("{}.{}.".format(*KNOWN_FLA)):
        return f"knows flash-linear-attention {KNOWN_FLA[0]}.{KNOWN_FLA[1]}, and {found} is installed"
    return None


def _interpreted() -> bool:
    """Whether triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def cannot_fla(case: Recurrence) -> str | None:
    """Why the kernels of fla cannot compute it anywhere, installed or not; None if they can."""
    if case.device != "cuda" and not _interpreted():
        return "runs on CUDA only"
    if case.capability is not None and case.capability < (8, 0):
        return f"needs compute capability 8.0, not {case.capability[0]}.{case.capability[1]}"
    if case.lanes:
        return "computes every memory for every token (model.memory.mom.compute)"
    if case.precision not in ("bf16", "fp16", "fp32"):
        return f"takes bf16, fp16 and fp32, not {case.precision}"
    sizes = {"keys": case.key_dim, "values": case.value_dim} | ({"slots": case.n_slots} if case.n_slots else {})
    for name, size in sizes.items():
        if size < SMALLEST:
            return f"takes {name} of at least {SMALLEST}, not {size}"
    if case.rule == "gated_delta_rule" and case.key_dim > LARGEST_KEY:
        return f"takes keys of at most {LARGEST_KEY}, not {case.key_dim}"
    if case.deterministic:
        return "chooses its block sizes by timing, so that two runs may differ in their last bits (train.deterministic)"
    return None


def _refuses_fla(case: Recurrence) -> str | None:
    return cannot_fla(case) or missing_fla()


def _yields_fla(case: Recurrence) -> str | None:
    return "runs the products of fp32 in TF32" if case.precision == "fp32" else None


def _never(case: Recurrence) -> str | None:
    return None


KERNELS = (Kernel("fla", _refuses_fla, _yields_fla), Kernel("eager", _never, _never))
"""Candidates, best first."""


def choose(case: Recurrence, kernel: str = "auto", here: bool = True) -> tuple[str, list[tuple[str, str]]]:
    """The kernel for a recurrence and (name, reason) of those passed over. Raises UserError for one named that cannot compute it.

    ``here`` False: the run is only planned, so that one which is named need not be installed.
    """
    if kernel != "auto":
        reason = cannot_fla(case) or (missing_fla() if here else None) if kernel == "fla" else None
        if reason is not None:
            raise UserError(refusal(case, kernel, reason))
        return kernel, []
    passed_over: list[tuple[str, str]] = []
    for one in KERNELS:
        reason = one.refuses(case) or one.yields(case)
        if reason is None:
            return one.name, passed_over
        passed_over.append((one.name, reason))
    raise AssertionError("the eager kernel refuses nothing")


def refusal(case: Recurrence, kernel: str, reason: str) -> str:
    """For people: why a kernel that was named is not used, and what helps."""
    why, remedy = reason, "use auto or eager"
    if reason.startswith("the package"):
        why, remedy = f"cannot be called: {reason}", f"pip install flash-linear-attention=={KNOWN_FLA[0]}.{KNOWN_FLA[1]}.*, or {remedy}"
    elif "train.deterministic" in reason:
        remedy = f"set train.deterministic=false, or {remedy}"
    elif "mom.compute" in reason:
        remedy = f"set model.memory.mom.compute=dense, or {remedy}"
    return f"model.memory.kernel: {kernel} cannot compute the {case.rule} here: it {why}; {remedy}"


def explain(case: Recurrence, kernel: str = "auto", here: bool = True) -> str:
    """One line: which kernel a recurrence uses, and why each earlier candidate was passed over."""
    chosen, passed_over = choose(case, kernel, here)
    return "; ".join([f"{case.rule}: {chosen}", *(f"not {name}: {why}" for name, why in passed_over)])


def recurrence_of(
    model: ModelConfig, device: str, precision: str, capability: tuple[int, int] | None, deterministic: bool
) -> Recurrence | None:
    """The recurrence of a model's memory layers; None where it has none with a choice."""
    rule = RULES.get(model.memory.kind)
    if rule is None or "memory" not in model.layer_kinds:
        return None
    slots = model.memory.gsa.n_slots if rule == "gated_slots" else 0
    lanes = model.memory.kind == "mom" and model.memory.mom.compute == "routed"
    return Recurrence(rule, device, precision, model.memory_key_dim, model.memory_value_dim, slots, capability, deterministic, lanes)
