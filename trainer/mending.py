"""What a guard does about a step: pass over its data, with or without going back to the last good checkpoint. All ranks call together.

The data of the step are taken out of training (``trainer/passed_over.py``) and the step is made of those that follow, so a mended run
is the run that never had those data, bit for bit: the same number of steps and tokens, one record per step.
"""

from __future__ import annotations

from typing import Any

from models.errors import RunFailed
from trainer import passed_over
from trainer.checkpoint import CheckpointManager, GoodCheckpoint
from trainer.checkpoint_ranks import describe
from trainer.config import RunConfig
from trainer.engine import Engine
from trainer.guards import Trouble
from trainer.passed_over import PassedOver, PassedOverList
from trainer.run_dir import RunDir
from trainer.state import TrainState


def load_state(checkpoints: CheckpointManager, good: GoodCheckpoint, engine: Engine) -> TrainState:
    """Put a checkpoint's values into ``engine``; where the run stood when it was saved."""
    state = {**engine.state_dict(), **engine.memory_states(), "train": {}}
    checkpoints.load(good, state)
    engine.loaded()
    if engine.carried is not None:
        engine.carried.take_over(state["memory"])
    start = TrainState.from_json(state["train"])
    if engine.fused is not None:
        engine.fused.load_state_dict({"norm": start.grad_norm})
    return start


class Mender:
    """Knows what is passed over, and passes over more. ``state`` is the run's own; a rollback changes it in place."""

    def __init__(self, config: RunConfig, run_dir: RunDir, checkpoints: CheckpointManager, engine: Engine, state: TrainState) -> None:
        """Reads ``passed_over.jsonl`` on rank 0 for all (collective)."""
        self.settings, self.run_dir, self.checkpoints, self.engine, self.state = config.guards, run_dir, checkpoints, engine, state
        self.per_step = config.global_batch_sequences
        entries = checkpoints.ranks.first_does("read passed_over.jsonl", lambda: passed_over.read(run_dir.passed_over))
        self.list = PassedOverList(entries)

    @property
    def rolls_back(self) -> bool:
        """Whether the settings ever do; the run then needs a checkpoint from its beginning on."""
        return "rollback" in (self.settings.on_not_finite, self.settings.on_spike)

    def passes_over(self, cursor: dict[str, Any]) -> bool:
        """Whether the data of the step that ends at ``cursor`` are taken out."""
        return self.list.covers(self._first(cursor), cursor["sequences"])

    def skip(self, trouble: Trouble, cursor: dict[str, Any], facts: dict[str, float]) -> str:
        """Take out the data of the step that would be next; what to tell. Raises RunFailed after too many in a row."""
        first, step = self._first(cursor), self.state.step + 1
        times = self.list.skipped_before(first) + 1
        if times > self.settings.max_mends:
            raise RunFailed(
                f"step {step}: {trouble.text}; {self.settings.max_mends} sets of data in a row were passed over and did not help; "
                f"stopped unsaved, the last checkpoint is intact. Lower optim.lr, or go back further with "
                f"guards.on_{trouble.kind}=rollback: longstride resume {self.run_dir.path}"
            )
        self._take_out(PassedOver(first, cursor["sequences"], step, "skip_step", None, trouble.text), facts)
        limit = self.settings.max_mends
        return (
            f"guard: step {step}: {trouble.text}; sequences {first} to {cursor['sequences']} are passed over ({times} of {limit} in a row)"
        )

    def roll_back(self, trouble: Trouble, step: int, cursor: dict[str, Any], facts: dict[str, float]) -> str:
        """Go back to the newest good checkpoint, past the data of ``step`` that end at ``cursor``; what to tell. Raises RunFailed
        when there is none, or it was gone back to too often."""
        self.checkpoints.wait()
        good = self.checkpoints.latest_good(set_aside=True)
        if good is None:
            raise RunFailed(f"step {step}: {trouble.text}; there is no checkpoint to go back to; start the run again with a lower optim.lr")
        times = self.list.rollbacks_to(good.step) + 1
        if times > self.settings.max_mends:
            raise RunFailed(
                f"step {step}: {trouble.text}; went back to {good.path.name} {times - 1} times already without getting to another one; "
                f"stopped unsaved, that checkpoint is intact. Lower optim.lr or raise guards.rollback_steps: "
                f"longstride resume {self.run_dir.path}"
            )
        start = load_state(self.checkpoints, good, self.engine)
        first = max(cursor["sequences"] - self.per_step * self.settings.rollback_steps, start.cursor.get("sequences", 0))
        self._take_out(PassedOver(first, cursor["sequences"], step, "rollback", good.step, trouble.text), facts)
        self.state.become(start)
        told = [f"checkpoint {refused} is damaged and set aside" for refused in good.refused]
        told.append(
            f"guard: step {step}: {trouble.text}; back to {good.path.name}, sequences {first} to {cursor['sequences']} are passed over "
            f"({times} of {self.settings.max_mends})"
        )
        return "\n".join(told)

    def _first(self, cursor: dict[str, Any]) -> int:
        return cursor["sequences"] - self.per_step

    def _take_out(self, entry: PassedOver, facts: dict[str, float]) -> None:
        def record() -> None:
            try:
                passed_over.write(self.run_dir.passed_over, entry, **{name: str(value) for name, value in facts.items()})
            except OSError as error:
                raise RunFailed(
                    f"step {entry.step}: {entry.reason}; {self.run_dir.passed_over} cannot be written ({describe(error)}), and no data is "
                    "passed over unrecorded; the last checkpoint is intact"
                ) from None

        self.checkpoints.wait()  # a save in the background talks to the other ranks over the same group
        self.checkpoints.ranks.first_does("write passed_over.jsonl", record)
        self.list.add(entry)
