"""Loss of a checkpoint on held-out documents, in all and by position in the sequence.

One process, whatever number of ranks trained the run. Try alone: ``longstride eval runs/<name>``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.errors import UserError
from models.int8_weight import stored
from trainer import config_file
from trainer.build import build_model, current_device, describe_loss, model_vocab_size
from trainer.checkpoint import CheckpointManager
from trainer.config import RunConfig
from trainer.data.build import build_data
from trainer.engine import LossSums, evaluate
from trainer.initial_weights import fill_from
from trainer.run_dir import RunDir


@dataclass(frozen=True)
class Perplexity:
    """Result of one evaluation."""

    step: int
    sums: LossSums
    bytes_per_label: float | None

    def lines(self) -> list[str]:
        """The result for people; one line per position bucket when sequences are longer than a bucket."""
        text = describe_loss(self.sums.loss, self.bytes_per_label)
        return [f"step {self.step}: {text} ({self.sums.valid_tokens:,} tokens)", *self.sums.position_lines()]


def perplexity(run_dir: RunDir, step: int | None = None, data_path: str | None = None, sequences: int | None = None) -> Perplexity:
    """Evaluate the checkpoint of ``step`` (None: the newest good one) on ``sequences`` held-out sequences (None: as configured).

    ``data_path`` replaces the run's held-out data by another of the same source kind. Raises UserError for a missing or damaged
    checkpoint and for a run without held-out data.
    """
    config = _alone(config_file.resolve(run_dir.config), data_path)
    data = build_data(config)
    device = current_device(config)
    model = build_model(config, model_vocab_size(config, data.vocab_size), None, device)
    checkpoints = CheckpointManager(run_dir, config.checkpoint)
    source = checkpoints.latest_good() if step is None else _named(run_dir, step)
    if source is None:
        raise UserError(f"{run_dir.checkpoints} holds no checkpoint; train until one is saved (checkpoint.save_every_steps)")
    if run_dir.imported.exists():  # in the dtype that it came in
        path = source if isinstance(source, Path) else source.path
        fill_from(str(path), model, checkpoints)
        found_step = int(path.name.removeprefix("step_"))
    else:
        state = {"model": {name: stored(parameter) for name, parameter in model.named_parameters()}}
        found_step = checkpoints.load(source, state).step
    count = config.train.eval_sequences if sequences is None else sequences
    batches = list(data.valid(count))
    if not batches:
        raise UserError(f"{run_dir.config}: the run has no held-out data; give --data PATH, or set data.valid_path or data.valid_fraction")
    return Perplexity(found_step, evaluate(model, batches, device, config.train.precision), data.valid_bytes_per_label)


def _alone(config: RunConfig, data_path: str | None) -> RunConfig:
    """The same model and data on one rank."""
    values = config.model_dump()
    values["parallel"] |= {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1}
    values["train"] |= {"eval_sequences": max(1, config.train.eval_sequences)}
    if data_path is not None:
        values["data"] |= {"valid_path": data_path}
    return RunConfig.model_validate(values)


def _named(run_dir: RunDir, step: int) -> Path:
    path = run_dir.checkpoint(step)
    if not path.is_dir():
        known = ", ".join(map(str, run_dir.checkpoint_steps())) or "none"
        raise UserError(f"{path} does not exist; checkpoints of this run: {known}")
    return path
