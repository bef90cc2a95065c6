"""Suites: tasks that are scored together, on the model of a checkpoint. Try alone: ``longstride eval RUN --suite mqar --lengths 64,128``.

One process, whatever number of ranks trained the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from memory_mgmt.config import MemoryConfig
from memory_mgmt.monitor import MemoryMonitor
from models.errors import UserError
from trainer import config_file
from trainer.build import current_device
from trainer.config import RunConfig
from trainer.evals.loading import alone, load_model
from trainer.evals.registry import PREFIX, build_task, is_synthetic, tokenizer_of
from trainer.evals.sample import Task, guessing
from trainer.evals.scoring import Cell, score
from trainer.evals.settings import DEFAULTS, OF_IDS, SyntheticSection
from trainer.evals.streaming import StreamedModel
from trainer.run_dir import RunDir

SUITES: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in DEFAULTS},
    "needle": ("needle_single", "needle_multikey", "needle_haystack"),
    "babi": ("qa1", "qa2", "qa3", "qa4", "qa5"),
    "lists": ("copy", "reverse", "sort"),
}
"""By name: the tasks in it. Every task is a suite of its own."""
POSITION = "position"
"""The suite that measures loss by position (trainer/evals/positions.py)."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """What is to be measured."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 20
    """At each length, and at each depth for tasks that place their facts."""
    seed: int = 0
    overrides: tuple[str, ...] = ()
    """data.synthetic.KEY=VALUE; a task takes those that it reads."""


@dataclass
class TaskResult:
    """One task at all lengths."""

    task: str
    settings: dict[str, Any]
    chance: float
    token_chance: float
    places_facts: bool
    cells: list[Cell] = field(default_factory=list)
    seconds: dict[int, float] = field(default_factory=dict)
    """By length, making the samples included."""
    tokens_read: dict[int, int] = field(default_factory=dict)
    """By length."""
    peak_bytes: dict[int, int] = field(default_factory=dict)
    """By length: memory above that of the loaded model."""
    memory_source: str = ""


def tasks_of(suites: Sequence[str]) -> tuple[str, ...]:
    """The tasks of all ``suites``, each once. Raises UserError naming the suites there are."""
    known = [*SUITES, POSITION]
    for name in suites:
        if name not in known:
            raise UserError(f"--suite: {name!r} is none of: {', '.join(known)}")
    return tuple(dict.fromkeys(task for name in suites for task in SUITES.get(name, (name,))))


def settings_for(task: str, config: RunConfig, overrides: Sequence[str]) -> SyntheticSection:
    """What ``task`` is made with: the run's own settings (of the last stage of its curriculum) if it was trained on that task, else the
    defaults, changed by the ``overrides`` that the task reads. Raises UserError."""
    mine = [word for word in overrides if word.partition("=")[0].strip().removeprefix("data.synthetic.") in DEFAULTS[task]]
    given = config_file.resolve(None, [f"data.source={PREFIX}{task}", *mine]).data.synthetic
    trained = config.data.source == PREFIX + task
    base = config.data.synthetic.stages[-1] if trained else SyntheticSection()
    return base.model_copy(update={"length": None, **{name: getattr(given, name) for name in given.model_fields_set}})


def check_overrides(tasks: Sequence[str], overrides: Sequence[str]) -> None:
    """Raise UserError for a word that is not data.synthetic.KEY=VALUE, or a key that no task reads."""
    read = sorted({key for task in tasks for key in DEFAULTS.get(task, ())})
    for word in overrides:
        key = word.partition("=")[0].strip()
        if not key.startswith("data.synthetic.") or key.removeprefix("data.synthetic.") not in read:
            keys = f"these tasks read data.synthetic. {', '.join(read)}" if read else "these suites read no setting"
            raise UserError(f"{key}: {keys}; everything else is the run's own")


def build_tasks(request: Request, config: RunConfig) -> list[tuple[Task, SyntheticSection]]:
    """Every task of the request, checked against the run's vocabulary. Raises UserError."""
    check_overrides(request.tasks, request.overrides)
    tokenizer, ids = tokenizer_of(config.data), is_synthetic(config.data.source) and config.data.source.removeprefix(PREFIX) in OF_IDS
    found = []
    for name in request.tasks:
        if name == POSITION:
            continue
        settings = settings_for(name, config, request.overrides)
        if name not in OF_IDS and ids:
            raise UserError(f"--suite {name}: is in words, and the run's vocabulary is the ids of {config.data.source}; leave it out")
        task = build_task(name, settings, tokenizer)
        needed, there = getattr(task, "vocab_size", 0), config.model.vocab_size or tokenizer.vocab_size
        if needed > there:
            raise UserError(
                f"--suite {name}: needs {needed} ids, and the run's vocabulary has {there}; lower data.synthetic.keys or values"
            )
        found.append((task, settings))
    return found


def measure(
    reader: StreamedModel,
    task: Task,
    settings: SyntheticSection,
    request: Request,
    device: torch.device,
    progress: Callable[[str], Progress | None] = lambda _: None,
) -> TaskResult:
    """``task`` at every length of the request."""
    result = TaskResult(task.name, settings.of(task.name), *guessing(task), task.places_facts)
    monitor = MemoryMonitor(device)
    result.memory_source = monitor.source
    for length in request.lengths:
        if refused := reader.refused(length):
            raise UserError(refused)
    for length in request.lengths:
        monitor.reset()
        begun = time.perf_counter()
        report = progress(f"{task.name}, {length:,} tokens")
        result.cells += score(task, reader.predict, length, request.depths, request.samples, request.seed, report)
        result.seconds[length], result.peak_bytes[length] = time.perf_counter() - begun, monitor.peak_bytes()
        result.tokens_read[length] = length * request.samples * (len(request.depths) if task.places_facts else 1)
    return result


def open_model(run_dir: RunDir, config: RunConfig, step: int | None, kept_bytes: int | None) -> tuple[StreamedModel, int, torch.device]:
    """The model of a checkpoint, to be read in chunks, its step, and where it is. ``kept_bytes``: of keys and values of full attention
    (None: half of the memory that is free)."""
    config = alone(config).model_copy(update={"memory": MemoryConfig()})  # nothing is kept for a backward pass
    device = current_device(config)
    model, found_step = load_model(run_dir, config, tokenizer_of(config.data).vocab_size, device, step)
    kept = MemoryMonitor(device).available_bytes() // 2 if kept_bytes is None else kept_bytes
    return StreamedModel(model, device, config.train.precision, kept), found_step, device
