"""A run's directory as verbs see it: make one, go on in one, and the memory plan it goes by. Imports no torch."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
import time
from pathlib import Path
from typing import Any

from memory_mgmt.plan import MemoryPlan, refusal
from models.errors import UserError
from trainer import config_file, out_of_memory
from trainer.commands.places import HOME
from trainer.config import RunConfig
from trainer.evals.registry import tokenizer_of
from trainer.planning import calibration_path, model_vocab_size, plan_run, same_step
from trainer.run_dir import RunDir, write_atomic
from trainer.settling import open_settings, settled

DEEPSPEED = "0.19.8"
"""The release that ``trainer/deepspeed_engine.py`` was written for, and the oldest; pyproject.toml says the same."""


def refuse_existing(path: Path) -> None:
    """Raise UserError when a new run cannot be made at ``path``."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        RunDir(path).create()  # says what is in the way


def new_run(config: RunConfig, name: str) -> tuple[RunDir, RunConfig]:
    """Where a new run will be, and ``config`` with its name: run.name, or else ``name`` and the time. Makes nothing."""
    name = config.run.name or f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = with_values(config, "run", name=name)
    return RunDir(Path(config.run.root) / name), config


def open_run(config: RunConfig, run_dir: RunDir | None, name: str, plan: MemoryPlan | None) -> RunDir:
    """Make the directory of a new run, or note in an old one with which settings and ``plan`` (None: its own) it goes on."""

    if run_dir is None:
        run_dir, config = new_run(config, name)
        run_dir.create(config.run.private)
    text = config_file.dump(config)
    with run_dir.lock():
        if run_dir.config.exists() and run_dir.config.read_text() != text:
            if config_file.resolve(run_dir.config).run.private != config.run.private:
                run_dir.set_private(config.run.private)
            earlier = len(list(run_dir.path.glob("config.before_resume_*.yaml"))) + 1
            run_dir.config.replace(run_dir.path / f"config.before_resume_{earlier}.yaml")
        write_atomic(run_dir.config, text.encode())
        if plan is not None:
            write_atomic(run_dir.memory_plan, plan.to_json().encode())
            measured = calibration_path(plan.device)
            if measured.exists():  # the rates that the plan was made with stay with the run
                write_atomic(run_dir.path / "calibration.json", measured.read_bytes())
        run_dir.snapshot_code(HOME)
    return run_dir


def check_init_from(config: RunConfig) -> None:
    """Refuse weights to begin with that are none or of another model, before anything is planned or made."""
    if config.train.init_from is not None:
        vocab_size = model_vocab_size(config, tokenizer_of(config.data).vocab_size)
        # By name, as verbs are: whoever has no such weights does not wait for torch.
        importlib.import_module("trainer.initial_weights").check_init_from(config, vocab_size)


def check_engine(config: RunConfig) -> None:
    """Refuse an engine whose package is not installed, or not in a release whose inside is known, before anything is planned or made."""
    if config.engine == "native":
        return
    remedy = f"{sys.executable} -m pip install 'deepspeed>={DEEPSPEED},<0.20', or set engine native"
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"engine: deepspeed is not installed; {remedy}") from None
    if not found.startswith("0.19.") or tuple(map(int, re.findall(r"\d+", found)[:3])) < tuple(map(int, DEEPSPEED.split("."))):
        raise UserError(f"engine: deepspeed {found} is installed, and ZeRO's partitions are known as {DEEPSPEED} has them; {remedy}")


def refuse_imported(run_dir: RunDir) -> None:
    """What ``longstride import`` made is no run that could go on."""
    if run_dir.imported.exists():
        raise UserError(
            f"{run_dir.path} is an imported model, not a run; begin one from it: longstride train {run_dir.config} run.name=NAME"
        )


def settle(config: RunConfig, device: str | None, ranks: int | None) -> RunConfig:
    """``config`` with its ``auto`` settings chosen, and what was chosen told."""
    if not open_settings(config):
        return config
    found = settled(config, device, ranks)
    print("\n".join(found.lines()), file=sys.stderr, flush=True)
    return found.config


def checked_plan(config: RunConfig, run_dir: RunDir | None, correction: float = 1.0) -> MemoryPlan:
    """The plan to run by. Raises UserError when the step does not fit, expected to take ``correction`` times its plan; where the run
    ran out of memory before, the plan counts what was measured then."""
    plan = plan_run(config, correction=correction)
    if not plan.fits:
        raise UserError(refusal(plan))
    measured = out_of_memory.correction(run_dir) if run_dir is not None else 1.0
    return plan if measured == correction else plan_run(config, correction=measured)


def kept_plan(config: RunConfig, run_dir: RunDir) -> bool:
    """Whether the run's plan holds on: nothing that it depends on has changed and memory has not run out since. A resumed run then
    repeats the arithmetic of the first one, whatever rates a new plan would go by."""
    if not (run_dir.config.exists() and run_dir.memory_plan.exists()):
        return False
    try:
        MemoryPlan.from_json(run_dir.memory_plan.read_text())
    except ValueError:
        return False
    made = run_dir.memory_plan.stat().st_mtime
    ran_out = any(note.stat().st_mtime > made for note in (run_dir.path / "oom").glob("*.json"))
    return not ran_out and same_step(config_file.resolve(run_dir.config), config)


def reload(run_dir: RunDir) -> RunConfig:
    """The settings that the run goes by."""
    return config_file.resolve(run_dir.config)


def with_values(config: RunConfig, section: str, **values: Any) -> RunConfig:
    """``config`` with some values of one section replaced."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
