"""Hold measurements against the plan: a warning when they part, and plan beside state when memory runs out.

Try alone: ``pytest tests/memory_mgmt/test_plan_check.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from memory_mgmt.offload import HostStore
from memory_mgmt.plan import MemoryPlan, gib

TOLERANCE = 0.05
"""Share by which measured and planned peak may part without a word."""
CPU_NOISE_BYTES = 64 * 2**20
"""On CPU the peak is that of the resident set, which libraries and threads move by tens of MiB. Of host memory the plan also counts
batches, which are not the store's."""
_CPU_MESSAGES = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "Cannot allocate memory")


@dataclass
class PlanCheck:
    """Compares what is measured in each step with ``plan``. ``store``: where swapped activations go, None without offload."""

    plan: MemoryPlan
    store: HostStore | None = None
    resident: Mapping[str, int] = field(default_factory=dict)
    """Bytes of tensors that are there from step to step, by kind, counted one by one: parameters, optimizer."""
    _warned_at: float = 0.0
    _host_peak: int = 0
    _host_warned_at: float = 0.0

    def measurements(self) -> dict[str, float]:
        """What this step did to host memory, beside what was planned, and resets it: peak bytes of parked tensors, bytes copied, seconds
        waited."""
        if self.store is None:
            return {}
        found = self.store.statistics(reset=True)
        self._host_peak = found.peak_bytes
        predicted = self.plan.prediction
        return {
            "host_peak_bytes": found.peak_bytes,
            "host_planned_bytes": self.plan.host_bytes,
            "copied_bytes": found.copied.to_host + found.copied.to_device,
            "exposed_copy_seconds": found.waited_seconds,
            **({"exposed_copy_planned_seconds": predicted.exposed_copy_seconds} if predicted is not None else {}),
        }

    def host_warning(self) -> str | None:
        """The same as ``warning`` for the host memory of the step whose ``measurements`` were taken last; of too much only, because a plan
        also counts what is not in the store that is measured (batches, an optimizer of DeepSpeed's)."""
        planned, gap = self.plan.host_bytes, self._host_peak - self.plan.host_bytes
        share = gap / max(1, planned)
        if self.store is None or gap < CPU_NOISE_BYTES or share <= max(TOLERANCE, 2 * self._host_warned_at):
            return None
        self._host_warned_at = share
        return f"host memory: measured {gib(self._host_peak)}, planned {gib(planned)}: {share:.0%} more than planned"

    def warning(self, measured_bytes: int) -> str | None:
        """A line when the measured peak is further from the planned one than ``TOLERANCE`` and what chance explains.

        Again only when the gap has doubled.
        """
        planned = self.plan.measurable_peak_bytes
        gap = measured_bytes - planned
        if self.plan.device == "cpu" and -CPU_NOISE_BYTES - self.plan.spread_bytes < gap < CPU_NOISE_BYTES:
            return None
        share = abs(gap) / planned if planned else 0.0
        if share <= max(TOLERANCE, 2 * self._warned_at):
            return None
        self._warned_at = share
        side = "more" if gap > 0 else "less"
        return (
            f"memory: measured {gib(measured_bytes)}, planned {gib(planned)}: {share:.0%} {side} than planned; "
            f"the plan is in memory_plan.json, made by: {self.plan.method}"
        )

    def state(self, measured_bytes: int, now_bytes: Mapping[str, int] | None = None) -> list[str]:
        """Plan beside state, line by line, for a person whose run ran out of memory. ``now_bytes``: of tensors that come and go, counted
        at this moment, by kind."""
        plan, counted = self.plan, {**self.resident, **(now_bytes or {})}
        kinds = plan.by_kind()
        lines = [
            f"planned peak {gib(plan.measurable_peak_bytes)} at '{plan.peak_moment}', measured {gib(measured_bytes)} when memory ran out"
        ]
        for kind, size in kinds.items():
            now = counted.get(kind)
            lines.append(f"  {kind:<14} planned {gib(size):>10}" + (f"  now {gib(now):>10}" if now is not None else ""))
        if self.store is not None:
            lines.append(f"  {'host memory':<14} planned {gib(plan.host_bytes):>10}  now {gib(self.store.used_bytes):>10}")
        return lines


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that device or host memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _CPU_MESSAGES)


def tensor_bytes(tensors: Mapping[str, Any]) -> int:
    """Bytes that this rank holds of named tensors, sharded or not."""
    total = 0
    for tensor in tensors.values():
        local = getattr(tensor, "_local_tensor", tensor)
        total += local.numel() * local.element_size() if isinstance(local, torch.Tensor) else 0
    return total
