"""Loss of a checkpoint on held-out documents, in all and by position in the sequence.

One process, whatever number of ranks trained the run. Try alone: ``longstride eval runs/<name>``.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.errors import UserError
from trainer import config_file
from trainer.build import current_device, describe_loss
from trainer.data.build import build_data
from trainer.engine import LossSums, evaluate
from trainer.evals.loading import alone, load_model
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
    config = alone(config_file.resolve(run_dir.config), data_path)
    data = build_data(config)
    device = current_device(config)
    model, found_step = load_model(run_dir, config, data.vocab_size, device, step)
    count = config.train.eval_sequences if sequences is None else sequences
    batches = list(data.valid(count))
    if not batches:
        raise UserError(f"{run_dir.config}: the run has no held-out data; give --data PATH, or set data.valid_path or data.valid_fraction")
    return Perplexity(found_step, evaluate(model, batches, device, config.train.precision), data.valid_bytes_per_label)
