"""Measures this rank and gathers what all measured, every ``guards.report_every_steps`` steps, in one small collective."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from types import TracebackType

import torch
import torch.distributed as dist

from memory_mgmt.monitor import MemoryMonitor, resident_bytes
from parallel.waiting import WaitClock, product_seconds
from trainer.checkpoint_ranks import CheckpointRanks
from trainer.config import GuardsSection
from trainer.rank_reports import RankReport, RankReports
from trainer.run_dir import RunDir


class RankWatch:
    """Used as a context manager around training. All ranks make it together and call ``after_step`` alike."""

    def __init__(
        self, settings: GuardsSection, run_dir: RunDir, monitor: MemoryMonitor, ranks: CheckpointRanks, tell: Callable[[str], None]
    ) -> None:
        """``tell`` is called on rank 0 with what people should know."""
        self.every, self.monitor, self.tell = settings.report_every_steps, monitor, tell
        self.reports = RankReports(settings, run_dir, ranks.gather(socket.gethostname()))
        self.rank = ranks.rank
        self.clock = WaitClock()
        self._seconds: list[float] = []
        self._waited = 0.0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> RankWatch:
        if self.every and len(self.reports.hosts) > 1:
            self._stack.enter_context(self.clock.running())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def before_step(self) -> None:
        """What is waited for from now on belongs to the step."""
        self._waited = self.clock.seconds

    def after_step(self, step: int, seconds: float) -> None:
        """A step took ``seconds``; report when it is time."""
        if not self.every:
            return
        self._seconds.append(max(0.0, seconds - (self.clock.seconds - self._waited)))
        if step % self.every == 0:
            gathered = self._gather(self._report())
            if self.rank == 0:
                for line in self.reports.take(step, gathered):
                    self.tell(line)
            self._seconds.clear()

    def _report(self) -> RankReport:
        device = self.monitor.device
        cuda = device.type == "cuda"
        own = product_seconds(device) if cuda and len(self.reports.hosts) > 1 else sum(self._seconds) / len(self._seconds)
        allocated = torch.cuda.memory_allocated(device) if cuda else 0
        return RankReport(own, resident_bytes(), allocated, self.monitor.available_bytes())

    def _gather(self, report: RankReport) -> list[RankReport]:
        if len(self.reports.hosts) == 1:
            return [report]
        own = torch.tensor(report.numbers(), dtype=torch.float64, device=self.monitor.device)
        every = [torch.empty_like(own) for _ in self.reports.hosts]
        dist.all_gather(every, own)
        return [RankReport.of(numbers.tolist()) for numbers in every]
