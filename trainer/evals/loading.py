"""The model of a checkpoint on one process, whatever number of ranks trained it."""

from __future__ import annotations

from pathlib import Path

import torch

from models.errors import UserError
from models.int8_weight import stored
from models.transformer import Transformer
from trainer.build import build_model, model_vocab_size
from trainer.checkpoint import CheckpointManager
from trainer.config import RunConfig
from trainer.initial_weights import fill_from
from trainer.run_dir import RunDir


def load_model(
    run_dir: RunDir, config: RunConfig, vocab_size: int, device: torch.device, step: int | None = None
) -> tuple[Transformer, int]:
    """The model of the checkpoint of ``step`` (None: the newest good one) and its step. ``config``: the run's, on one rank; ``vocab_size``:
    of its data. Raises UserError for a missing or damaged checkpoint."""
    model = build_model(config, model_vocab_size(config, vocab_size), None, device)
    checkpoints = CheckpointManager(run_dir, config.checkpoint)
    source = checkpoints.latest_good() if step is None else _named(run_dir, step)
    if source is None:
        raise UserError(f"{run_dir.checkpoints} holds no checkpoint; train until one is saved (checkpoint.save_every_steps)")
    if run_dir.imported.exists():  # in the dtype that it came in
        path = source if isinstance(source, Path) else source.path
        fill_from(str(path), model, checkpoints)
        return model, int(path.name.removeprefix("step_"))
    state = {"model": {name: stored(parameter) for name, parameter in model.named_parameters()}}
    return model, checkpoints.load(source, state).step


def alone(config: RunConfig, data_path: str | None = None) -> RunConfig:
    """The same model and data on one rank; ``data_path`` replaces the run's held-out data by another of the same source kind."""
    values = config.model_dump()
    values["parallel"] |= {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1}
    if values["model"]["memory"]["kernel"] == "fla":  # where the run trained; here what is here
        values["model"]["memory"]["kernel"] = "auto"
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
