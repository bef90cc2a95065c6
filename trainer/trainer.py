"""The loop of a run: read, compute, update, record, save, stop. It creates nothing; ``trainer/build.py`` hands it everything."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from memory_mgmt.arena import Arena, arena_step
from memory_mgmt.monitor import MemoryMonitor
from memory_mgmt.plan import MemoryPlan, gib
from memory_mgmt.plan_check import PlanCheck, is_out_of_memory, tensor_bytes
from models.batch import Batch
from models.errors import RunFailed
from optim.schedule import learning_rate
from parallel.columns import usage_of
from parallel.log_lines import at_step, beside
from trainer import out_of_memory
from trainer.checkpoint import CheckpointManager
from trainer.checkpoint_ranks import DiskFull
from trainer.config import RunConfig
from trainer.console import RunConsole
from trainer.data.loader import Step
from trainer.data.prefetch import Prefetcher
from trainer.engine import Engine, LossSums
from trainer.guards import Trouble, trouble_of
from trainer.mending import Mender
from trainer.metrics import MetricsWriter
from trainer.preemption import StopSignal
from trainer.rank_watch import RankWatch
from trainer.run_dir import RunDir
from trainer.state import TrainState
from trainer.watchdog import Watchdog

DONE = 0
RESUMABLE = 75
"""Exit codes: all steps done; stopped early by a signal with everything saved."""


@dataclass
class Trainer:
    """Everything a run needs, made elsewhere. ``metrics`` and ``console`` do nothing on ranks other than 0."""

    config: RunConfig
    run_dir: RunDir
    engine: Engine
    state: TrainState
    train_steps: Callable[[dict[str, Any]], Prefetcher[Step]]
    """From a data cursor: the micro-batches of each step and the cursor after them."""
    valid_batches: Callable[[], Iterable[Batch]]
    """The held-out batches of one evaluation, the same number on every rank; empty when there are none."""
    valid_bytes_per_label: float | None
    """UTF-8 bytes of held-out text per predicted token; None without held-out data."""
    checkpoints: CheckpointManager
    metrics: MetricsWriter
    console: RunConsole
    monitor: MemoryMonitor
    stop: StopSignal
    mender: Mender
    ranks: RankWatch
    watchdog: Watchdog
    plan: MemoryPlan
    check: PlanCheck
    arena: Arena | None
    flops_per_token: float
    peak_flops: float
    """Of all devices of the run together, in FLOP/s."""
    last_train: LossSums | None = None
    """Result of the last step."""
    last_valid: LossSums | None = None
    """Result of the last evaluation."""
    peak_bytes: int = 0
    """Most memory measured in any training step on this rank."""
    stop_reason: str = ""
    _owed: bool = False
    """A checkpoint had no room and is to be saved as soon as there is some."""

    def run(self) -> int:
        """Train until ``train.steps``, a signal or an error; everything is saved when this returns.

        Returns the exit code. Raises RunFailed, on all ranks alike, when the loss is not finite or a save failed.
        """
        if self.mender.rolls_back and not self.state.step and not self.checkpoints.steps():
            self._save(block=True)  # where to go back to
        code = None
        while code is None:
            with contextlib.closing(self.train_steps(self.state.cursor)) as batches:
                code = self._train(batches)
        return code

    def _train(self, batches: Prefetcher[Step]) -> int | None:
        """The exit code, or None when training went back to a checkpoint and goes on with other data."""
        steps = self.config.train.steps
        while self.state.step < steps:
            started = time.perf_counter()
            self.watchdog.beat()
            self.ranks.before_step()
            self.monitor.reset()
            micro_batches, cursor = next(batches)
            if self.mender.passes_over(cursor):
                continue
            if trouble := self._one_step(micro_batches, cursor, started):
                if self._mended_by_rollback(trouble, self.state.step + 1, cursor):
                    return None
                continue
            self.watchdog.beat(step_seconds=time.perf_counter() - started, long=True)  # what follows may be an evaluation or a save
            self.ranks.after_step(self.state.step, time.perf_counter() - started)
            last = self.state.step == steps
            if self._due(self.config.train.eval_every_steps) or last:
                self.evaluate()
            stop = self.stop.agreed(failed=self.checkpoints.failure is not None)
            if stop.failed:
                self._background_save_failed(may_wait=not (last or stop.signal_number))
            ends = bool(last or stop.signal_number)
            if ends or self._owed or self._due(self.config.checkpoint.save_every_steps):
                if not self.engine.is_finite():  # its loss was: the update was what overflowed
                    self._overflowed(cursor)
                    return None
                self._save(block=ends)
            if stop.signal_number and not last:
                self.stop_reason = stop.reason
                return RESUMABLE
        return DONE

    def _mended_by_rollback(self, trouble: Trouble, step: int, cursor: dict[str, Any]) -> bool:
        """Do what the settings say about ``trouble``; whether training went back to a checkpoint."""
        facts = {"loss": self.last_train.loss if self.last_train else math.nan}
        if trouble.action(self.config.guards) == "skip_step":
            self.console.note(self.mender.skip(trouble, cursor, facts))
            return False
        self.watchdog.beat(long=True)
        note = self.mender.roll_back(trouble, step, cursor, facts)
        self.metrics.rewind(self.state.step)
        at_step(self.state.step)
        self.console.note(note)
        return True

    def _overflowed(self, cursor: dict[str, Any]) -> None:
        """Parameters that are not finite are never saved."""
        trouble = Trouble("not_finite", "its update made parameters or optimizer states that are not finite")
        if self.config.guards.on_not_finite != "rollback":
            raise self._stopped(trouble, self.state.step)
        self._mended_by_rollback(trouble, self.state.step, cursor)

    def _stopped(self, trouble: Trouble, step: int) -> RunFailed:
        return RunFailed(
            f"step {step}: {trouble.text}; stopped unsaved, the last checkpoint is intact. "
            f"Lower optim.lr, lengthen optim.schedule.warmup_steps or set guards.on_{trouble.kind}=rollback, "
            f"then: longstride resume {self.run_dir.path}"
        )

    def _one_step(self, micro_batches: list[Batch], cursor: dict[str, Any], started: float) -> Trouble | None:
        """Make one step and record it; None unless something has to be done about it, and then nothing but a fused update was done."""
        guards, step = self.config.guards, self.state.step + 1

        def trouble_at(norm: float) -> Trouble | None:
            # Loss and norm are sums over all ranks, so every rank takes the same branch.
            return trouble_of(sums.loss, sums.valid_tokens, norm, self.state.history, guards)

        def accept(norm: float) -> bool:
            found = trouble_at(norm)
            return found is None or found.action(guards) == "report"

        rate = learning_rate(self.state.step + 1, self.config.optim, self.config.train.steps)
        try:
            with arena_step(self.arena, "train", *(batch.tokens_BT.shape for batch in micro_batches)):
                sums = self.engine.forward_backward(micro_batches, rate)
                norm = self.engine.step(rate, accept)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory() from error
        self.last_train = sums
        if trouble := trouble_at(norm):
            if trouble.action(guards) == "stop":
                raise self._stopped(trouble, step)
            if trouble.action(guards) != "report":
                return trouble
            self.console.note(f"guard: step {step}: {trouble.text}")
        tokens = self.config.global_batch_sequences * self.config.data.seq_len
        self.state.step += 1
        self.state.tokens += tokens
        self.state.grad_norm = norm
        self.state.cursor = cursor
        self.state.history.add(sums.loss, norm, guards.spike_steps)
        at_step(self.state.step)
        seconds = time.perf_counter() - started
        speed = tokens / seconds
        mfu = speed * self.flops_per_token / self.peak_flops
        arena = self.arena.measurements() if self.arena is not None else {}
        measured = self.check.measurements() | arena | self._table_usage()
        self._record("train", sums, tokens_per_second=speed, mfu=mfu, lr=rate, grad_norm=norm, step_seconds=seconds, **measured)
        return None

    def _table_usage(self) -> dict[str, float]:
        """How evenly value tables were read in this step, the mean over tables; nothing without them."""
        usage = usage_of(self.engine.model)
        if not usage:
            return {}
        return {
            "table_touched_share": sum(one.touched for one in usage) / len(usage),
            "table_usage_kl": sum(one.kl for one in usage) / len(usage),
        }

    def _out_of_memory(self) -> RunFailed:
        """Print plan beside state, leave a note for the next plan, and say what to do."""
        measured, step = self.monitor.read().peak_bytes, self.state.step + 1
        gradients = {name: p.grad for name, p in self.engine.model.named_parameters() if p.grad is not None}
        now = {"gradients": tensor_bytes(gradients)} if self.engine.by_parameter else {}  # else flat tensors of the engine's own
        for line in self.check.state(measured, now):
            print(line, flush=True)
            beside(line)
        out_of_memory.record(self.run_dir, self.engine.rank, step, self.plan.measurable_peak_bytes, measured)
        remedy = "more is kept free when it is resumed" if self.config.memory.recompute == "auto" else "memory.recompute=auto plans again"
        return RunFailed(
            f"step {step}: out of memory at {gib(measured)} of this rank, planned {gib(self.plan.measurable_peak_bytes)}; "
            f"the last checkpoint is intact\n{remedy}: longstride resume {self.run_dir.path}"
        )

    def _record(self, split: str, sums: LossSums, **values: float) -> None:
        reading = self.monitor.read()
        peak_bytes = reading.peak_bytes
        self.peak_bytes = max(self.peak_bytes, peak_bytes)
        if split == "train":
            for warning in filter(None, (self.check.warning(peak_bytes), self.check.host_warning())):
                self.console.note(warning)
        record: dict[str, Any] = {
            "step": self.state.step,
            "split": split,
            "loss": sums.loss,
            "tokens": self.state.tokens,
            "valid_tokens": sums.valid_tokens,
            **values,
            "memory_peak_bytes": peak_bytes,
            "memory_planned_bytes": self.plan.measurable_peak_bytes,
            "memory_budget_bytes": self.plan.budget_bytes,
            "data_cursor": self.state.cursor,
        }
        if reading.reserved_bytes is not None:
            record["memory_reserved_bytes"] = reading.reserved_bytes
        if len(sums.bucket_nll) > 1:
            record["loss_by_position"] = sums.loss_by_position
        self.metrics.write(record)
        (self.console.step if split == "train" else self.console.valid)(record)

    def evaluate(self) -> None:
        """Loss on held-out data, recorded under the current step."""
        started = time.perf_counter()
        batches = list(self.valid_batches())
        if not batches:
            return
        with arena_step(self.arena, "valid", *(batch.tokens_BT.shape for batch in batches)):
            self.last_valid = self.engine.evaluate(batches)
        seconds = time.perf_counter() - started
        self._record("valid", self.last_valid, tokens_per_second=self.last_valid.valid_tokens / seconds, step_seconds=seconds)

    def _due(self, every: int) -> bool:
        return every > 0 and self.state.step % every == 0

    def _save(self, block: bool) -> None:
        """Save this step; ``block``: it must be there when this returns. A full disk makes it owed instead, where the settings say so."""
        try:
            run = {**self.engine.state_dict(), **self.engine.memory_states(), "train": self.state.to_json()}
            self.checkpoints.save(self.state.step, run, block=block)
        except DiskFull as error:
            self._owe(error, may_wait=not block)
            return
        if self._owed:
            self.console.note(f"guard: step {self.state.step}: there is room for a checkpoint again")
            self._owed = False

    def _background_save_failed(self, may_wait: bool) -> None:
        try:
            self.checkpoints.wait()  # raises the background save's error where it happened
        except DiskFull as error:
            self._owe(error, may_wait)
            return
        raise RunFailed(f"another rank could not save a checkpoint; see logs in {self.run_dir.logs}")

    def _owe(self, error: DiskFull, may_wait: bool) -> None:
        """Go on without a checkpoint that has no room, if that is wanted and the run goes on at all. All ranks have the same ``error``."""
        if not may_wait or self.config.guards.on_full_disk == "stop":
            raise DiskFull(
                f"{error}\nstopped at step {self.state.step}; make room, then: longstride resume {self.run_dir.path} "
                f"(guards.on_full_disk=continue trains on meanwhile)"
            )
        if not self._owed:
            self.console.note(f"guard: step {self.state.step}: {error}; training goes on, saving is tried again after every step")
        self._owed = True
