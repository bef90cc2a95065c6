"""What each rank is at, gathered now and then: who is slow, whose memory grows. Imports no torch.

``ranks.json`` in the run directory holds the last report for ``longstride monitor``. Nobody is ended for what is said here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from memory_mgmt.plan import gib
from trainer.config import GuardsSection
from trainer.run_dir import RunDir, write_atomic

PERSISTENT = 2
"""Reports in a row in which a rank is slow before it is named; then again after twice as many."""
GROWING = 5
"""Reports that a trend is read from."""
NOISE_BYTES = 64 * 2**20
"""Libraries and threads move a process's memory by tens of MiB."""


@dataclass(frozen=True)
class RankReport:
    """One rank since the report before."""

    own_seconds: float
    """Of its own work in a step, waiting for others left out."""
    resident_bytes: int
    """The process in host memory."""
    device_bytes: int
    """Tensors on a CUDA device; 0 on CPU."""
    available_bytes: int
    """What it could still take on the device, or on CPU in host memory."""

    def numbers(self) -> list[float]:
        """As they are exchanged."""
        return [float(value) for value in asdict(self).values()]

    @staticmethod
    def of(numbers: Sequence[float]) -> RankReport:
        """Inverse of ``numbers``."""
        own, *sizes = numbers
        return RankReport(own, *(int(size) for size in sizes))


class RankReports:
    """The reports of all ranks, seen by rank 0."""

    def __init__(self, settings: GuardsSection, run_dir: RunDir, hosts: Sequence[str]) -> None:
        self.settings, self.run_dir, self.hosts = settings, run_dir, hosts
        self._slow = [0] * len(hosts)
        self._seen: list[deque[tuple[int, RankReport]]] = [deque(maxlen=GROWING) for _ in hosts]
        self._least: dict[tuple[int, str], tuple[int, int]] = {}
        """By rank and kind of memory: step and bytes of the smallest report since the last alarm."""

    def take(self, step: int, reports: Sequence[RankReport]) -> list[str]:
        """Keep the reports of all ranks at ``step``; what people should know."""
        for seen, report in zip(self._seen, reports, strict=True):
            seen.append((step, report))
        told = [*self._stragglers(step, reports), *self._growth(step)]
        with contextlib.suppress(OSError):  # a full disk does not end a run for this
            write_atomic(self.run_dir.ranks, self._json(step, reports))
        return told

    def who(self, rank: int) -> str:
        """``rank 3 on node17``."""
        return f"rank {rank} on {self.hosts[rank]}"

    def _stragglers(self, step: int, reports: Sequence[RankReport]) -> list[str]:
        told = []
        slow = slow_ranks([report.own_seconds for report in reports], self.settings.straggler_times)
        self._slow = [count + 1 if rank in slow else 0 for rank, count in enumerate(self._slow)]
        for rank, times in slow.items():
            count = self._slow[rank]
            if count >= PERSISTENT and count & (count - 1) == 0:
                told.append(
                    f"guard: step {step}: straggler: {self.who(rank)} takes {reports[rank].own_seconds:.3g} s of its own work, "
                    f"{times:.1f} times the median of the others, in {count} reports in a row; all ranks wait for it"
                )
        return told

    def _growth(self, step: int) -> list[str]:
        told = []
        for rank, seen in enumerate(self._seen):
            for kind, words in (("resident_bytes", "in host memory"), ("device_bytes", "on the device")):
                sizes = [getattr(report, kind) for _, report in seen]
                first = self._least.setdefault((rank, kind), (step, sizes[-1]))
                if sizes[-1] < first[1]:
                    self._least[rank, kind] = first = (step, sizes[-1])
                if self.settings.memory_growth and grows(sizes, first[1], self.settings.memory_growth):
                    rate = (sizes[-1] - first[1]) / max(1, step - first[0])
                    left = seen[-1][1].available_bytes
                    told.append(
                        f"guard: step {step}: memory of {self.who(rank)} grows: {gib(sizes[-1])} {words}, {gib(first[1])} at step "
                        f"{first[0]}; {gib(left)} are left, for {left / rate:,.0f} steps at that rate"
                    )
                    self._least[rank, kind] = (step, sizes[-1])
        return told

    def _json(self, step: int, reports: Sequence[RankReport]) -> bytes:
        ranks: list[dict[str, Any]] = [
            {"rank": rank, "host": host, "slow_reports": slow, **asdict(report)}
            for rank, (host, slow, report) in enumerate(zip(self.hosts, self._slow, reports, strict=True))
        ]
        return (json.dumps({"step": step, "time": time.time(), "ranks": ranks}) + "\n").encode()


def slow_ranks(own_seconds: Sequence[float], times: float) -> dict[int, float]:
    """Ranks whose own work takes more than ``times`` the median of the others', and how many times; none with ``times`` 0."""
    found = {}
    for rank, seconds in enumerate(own_seconds):
        others = [other for i, other in enumerate(own_seconds) if i != rank]
        median = statistics.median(others) if others else 0.0
        if times and median > 0 and seconds > times * median:
            found[rank] = seconds / median
    return found


def grows(sizes: Sequence[int], least: int, share: float) -> bool:
    """Whether memory has a trend: it goes up in most of the last reports, and stands a ``share`` and more than noise above ``least``.
    A single step up, such as that of a first evaluation, is none."""
    ups = sum(after > before for before, after in itertools.pairwise(sizes))
    return len(sizes) == GROWING and ups >= GROWING - 2 and sizes[-1] == max(sizes) and sizes[-1] - least > max(NOISE_BYTES, share * least)
