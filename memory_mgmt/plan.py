"""The memory plan of a run: what one rank holds, when it holds most, and whether that fits.

A plan is made once, before the run, saved as ``memory_plan.json`` and read by everything that shows or checks memory. How it
was made is in ``method``. Imports no torch.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from memory_mgmt.policy import Policy

GIB = 2**30
FORMAT_VERSION = 2

Kind = Literal[
    "parameters",  # this rank's shard, and what is gathered for computing
    "gradients",
    "optimizer",
    "activations",  # kept from forward to backward
    "transient",  # made and freed inside one layer's forward or backward, clipping or the optimizer step
    "loss",  # logits of one tile and what the loss keeps
    "communication",  # buffers of collectives, ring and halo exchange
    "batch",
    "overhead",  # known to exist, not derived from shapes
    "outside",  # taken by the process but not visible to the allocator's counters (interpreter, CUDA context, NCCL)
]


@dataclass(frozen=True)
class Term:
    """One owner of memory. ``bytes`` at the moment of the peak, ``max_bytes`` the most over the step, ``formula`` in words."""

    name: str
    kind: Kind
    bytes: int
    max_bytes: int
    formula: str = ""


@dataclass(frozen=True)
class Moment:
    """One point of the step and what is held then, all terms together."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Change:
    """Settings that lower the peak: ``settings`` as command-line overrides, the peak they give, and what they cost."""

    settings: str
    peak_bytes: int
    cost: str


@dataclass(frozen=True)
class Prediction:
    """Time and traffic of one optimizer step. Seconds and bytes; ``mfu`` None where the device's peak rate is not known."""

    step_seconds: float
    tokens_per_second: float
    """Of the whole run, all ranks together."""
    mfu: float | None
    compute_seconds: float
    recompute_seconds: float
    """Part of ``compute_seconds`` that repeats forward work."""
    exposed_communication_seconds: float
    exposed_copy_seconds: float
    """Waiting for copies to or from host memory that computation does not hide."""
    host_bytes_per_node: int
    copied_bytes: int
    """Moved by one rank to host memory in a step, and back."""
    source: str = ""
    """Where the rates come from: data sheet with assumed efficiencies, or a calibration."""
    tensor_bytes: int = 0
    """That one rank sends to the others of its tensor-parallel group in a step."""
    tensor_seconds: float = 0.0
    """Of those messages; computation waits for all of them."""


@dataclass(frozen=True)
class Addresses:
    """Outcome of planning the addresses of a step's tensors in one arena."""

    height_bytes: int
    lower_bound_bytes: int
    status: str
    """``optimal`` when the height equals a proven lower bound, else the gap in words."""
    method: str
    seconds: float


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one rank through a training step. Bytes everywhere; GiB only when shown."""

    method: str
    device: str
    ranks: int
    terms: tuple[Term, ...]
    moments: tuple[Moment, ...]
    budget_bytes: int | None
    """What ``memory.budget_gib`` allows; None: no limit was set."""
    device_bytes: int | None
    """What the device has; None: not known."""
    return_freed_blocks: bool = False
    """Whether a CPU rank must give freed blocks back to stay within the plan (``memory_mgmt/host_allocator.py``)."""
    spread_bytes: int = 0
    """How much less than the peak a run may hold by chance (holes of an ordinary heap on CPU)."""
    not_counted: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    host_bytes: int = 0
    """Host memory of one rank at most (offloaded activations, states and their buffers)."""
    host_budget_bytes: int | None = None
    """Host memory that one rank may take for offload; None: no limit was set."""
    disk_tier: bool = False
    """What is above ``host_budget_bytes`` goes to ``memory.offload_dir``."""
    offload_optimizer: Literal["none", "host"] = "none"
    """Where the optimizer's states live: what ``memory.offload_optimizer`` says, or what was chosen for auto."""
    offload_parameters: Literal["none", "host"] = "none"
    """Where the parameters live, likewise."""
    policy: Policy | None = None
    """What is kept, swapped or recomputed, layer by layer; None: what the configuration says."""
    prediction: Prediction | None = None
    addresses: Addresses | None = None
    binding: str = ""
    """The constraint that decides the step time, in words: device memory, host memory, copy bandwidth, or none."""
    worth: tuple[str, ...] = ()
    """What one more GiB of device or host memory would buy."""
    sequence: str = ""
    """Why ranks do not share a sequence, where the architecture does not let them."""
    compiled: str = ""
    """What the plan leaves out of blocks that are compiled, where there are any."""

    @property
    def peak_bytes(self) -> int:
        """The most this rank holds at one moment, everything included; what a budget is compared with."""
        return sum(term.bytes for term in self.terms)

    @property
    def measurable_peak_bytes(self) -> int:
        """The part of the peak that ``memory_mgmt.monitor`` can see: without what lies outside the allocator."""
        return sum(term.bytes for term in self.terms if term.kind != "outside")

    @property
    def peak_moment(self) -> str:
        """Name of the moment at which most is held."""
        return max(self.moments, key=lambda moment: moment.bytes).name if self.moments else ""

    @property
    def limit_bytes(self) -> int | None:
        """The smaller of budget and device memory, None when neither is known."""
        known = [limit for limit in (self.budget_bytes, self.device_bytes) if limit is not None]
        return min(known) if known else None

    @property
    def fits(self) -> bool:
        """True when the peak is within the limit (or there is none), and offload within its part of host memory."""
        return (self.limit_bytes is None or self.peak_bytes <= self.limit_bytes) and self.host_fits

    @property
    def host_fits(self) -> bool:
        """True when what is offloaded is within this rank's part of host memory, or a disk takes the rest."""
        return self.host_budget_bytes is None or self.disk_tier or self.host_bytes <= self.host_budget_bytes

    @property
    def smallest_budget_gib(self) -> float:
        """The smallest ``memory.budget_gib`` that this plan fits in, rounded up to two decimals."""
        return math.ceil(self.peak_bytes / GIB * 100) / 100

    def by_kind(self) -> dict[str, int]:
        """Bytes at the peak, summed by kind, in the order of ``Kind``; kinds that hold nothing are left out."""
        sums = {kind: sum(term.bytes for term in self.terms if term.kind == kind) for kind in get_args(Kind)}
        return {kind: total for kind, total in sums.items() if total}

    def to_json(self) -> str:
        """The plan as JSON, with the derived figures beside the stored ones for readers that are not this class."""
        derived = {
            "peak_bytes": self.peak_bytes,
            "measurable_peak_bytes": self.measurable_peak_bytes,
            "peak_moment": self.peak_moment,
            "fits": self.fits,
            "smallest_budget_gib": self.smallest_budget_gib,
        }
        return json.dumps({"format_version": FORMAT_VERSION, **self._fields(), "derived": derived}, indent=2) + "\n"

    def _fields(self) -> dict[str, Any]:
        return asdict(self) | {"policy": self.policy.to_dict() if self.policy is not None else None}

    @staticmethod
    def from_json(text: str) -> MemoryPlan:
        """Read what ``to_json`` wrote. Raises ValueError for another format version or a file that is no plan."""
        try:
            data: dict[str, Any] = json.loads(text)
            version = data.pop("format_version")
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"not a memory plan: {error}") from None
        if version != FORMAT_VERSION:
            raise ValueError(f"memory plan of format version {version}; this longstride reads version {FORMAT_VERSION}")
        data.pop("derived", None)
        parts = {"terms": Term, "moments": Moment, "changes": Change}
        try:
            lists = {key: tuple(part(**entry) for entry in data.pop(key)) for key, part in parts.items()}
            lists |= {key: tuple(data.pop(key)) for key in ("not_counted", "worth")}
            objects = {"policy": Policy.from_dict, "prediction": lambda d: Prediction(**d), "addresses": lambda d: Addresses(**d)}
            made = {key: make(entry) if (entry := data.pop(key)) is not None else None for key, make in objects.items()}
            return MemoryPlan(**lists, **made, **data)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a memory plan: {error}") from None


def gib(n_bytes: int) -> str:
    """Bytes for people: GiB with two decimals, MiB below a tenth of a GiB."""
    return f"{n_bytes / GIB:.2f} GiB" if n_bytes >= GIB / 10 else f"{n_bytes / 2**20:.1f} MiB"


def verdict(plan: MemoryPlan) -> str:
    """One line: planned peak against the limits."""
    limits = []
    if plan.budget_bytes is not None:
        limits.append(f"memory.budget_gib {plan.budget_bytes / GIB:g}")
    if plan.device_bytes is not None:
        limits.append(f"{plan.device} with {gib(plan.device_bytes)}")
    against = " and ".join(limits) or "no limit"
    outcome = "fits" if plan.fits else "does not fit"
    if not plan.host_fits:
        limits.append(f"{gib(plan.host_budget_bytes or 0)} of host memory")
        against = " and ".join(limits)
    return f"planned peak {gib(plan.peak_bytes)} per rank at '{plan.peak_moment}'; {outcome} ({against})"


def refusal(plan: MemoryPlan) -> str:
    """Why a plan that does not fit is refused and what would fit: two lines for a UserError.

    Raises ValueError when the plan fits.
    """
    if plan.fits:
        raise ValueError("the plan fits: there is nothing to refuse")
    if plan.limit_bytes is None or plan.peak_bytes <= plan.limit_bytes:
        allowed = plan.host_budget_bytes or 0
        less = "memory.offload_parameters" if plan.offload_parameters == "host" else "memory.offload_optimizer"
        states = plan.offload_optimizer == "host"
        return (
            f"memory.host_gib: offload takes {gib(plan.host_bytes)} of host memory per rank, {gib(allowed)} is this rank's part\n"
            + (f"raise memory.host_gib, set {less}=none" if states else "raise memory.host_gib")
            + ", name a local disk in memory.offload_dir, offload less (memory.offload=inputs or none) or recompute more"
        )
    over_budget = plan.budget_bytes is not None and plan.peak_bytes > plan.budget_bytes
    limit = f"memory.budget_gib {plan.limit_bytes / GIB:g}" if over_budget else f"{gib(plan.limit_bytes)} on {plan.device}"
    first = (
        f"{limit}: one rank is estimated to need {gib(plan.peak_bytes)} (at '{plan.peak_moment}'); "
        f"the smallest budget that fits is memory.budget_gib={plan.smallest_budget_gib:.2f}"
    )
    fitting = [change for change in plan.changes if change.peak_bytes <= plan.limit_bytes]
    shown = fitting or sorted(plan.changes, key=lambda change: change.peak_bytes)[:3]
    if not shown:
        return first + "\nno memory setting lowers it: shorten data.seq_len, shrink the model or use more ranks"
    listed = "; ".join(f"{change.settings} -> {gib(change.peak_bytes)} ({change.cost})" for change in shown[:4])
    lead = "settings that fit, cheapest first: " if fitting else "no single setting fits; the nearest: "
    return f"{first}\n{lead}{listed}"
