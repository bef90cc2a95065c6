"""The verb ``plan``: what a run needs, without running it. Imports no torch except to calibrate."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from memory_mgmt import plan_view
from memory_mgmt.plan import MemoryPlan
from models.errors import UserError
from trainer import config_file, plan_files, sweep, sweep_table
from trainer.commands.open_run import settle
from trainer.commands.places import HOME
from trainer.commands.terminal import progress, show
from trainer.config import RunConfig
from trainer.optimizer_plan import OptimizerPlan, optimizer_plan
from trainer.planning import calibration_path, plan_run, target_for, this_machine
from trainer.sweep_traces import trace_ahead


def show_plan(args: argparse.Namespace) -> int:
    """``longstride plan``."""
    path = config_file.find(args.config, HOME / "configs")
    if args.sweep:
        return _sweep(path, args)
    config = config_file.resolve(path, args.overrides)
    if args.calibrate:
        _calibrate(config, args.device)
    config = settle(config, args.device, None)
    if args.explain:
        return _explain(config, args.device)
    plan = plan_run(config, args.device)
    written = _write_timeline(config, plan, args) if args.timeline else ()
    optimizer = _optimizer_plan(config, args) if args.optimizer or args.optimizer_rows else None
    if args.json:
        print(plan.to_json() if optimizer is None else optimizer.to_json(plan), end="")
    else:
        show(plan_view.plain(plan) + "\n", lambda: plan_view.render(plan))
    if optimizer is not None and not args.json:
        print(f"\noptimizer of one rank: {config.optim.preset}\n{optimizer.by_parameter if args.optimizer_rows else optimizer.by_kind}")
    for file in written:
        print(f"written: {file}", file=sys.stderr)
    return 0


def _explain(config: RunConfig, device: str | None) -> int:
    from trainer.explain import explain_run  # imports torch

    print("\n".join(explain_run(config, device)))
    return 0


def _optimizer_plan(config: RunConfig, args: argparse.Namespace) -> OptimizerPlan:
    return optimizer_plan(config, target_for(config, args.device).vocab_size)


def _calibrate(config: RunConfig, device_name: str | None) -> None:
    """Measure the device that a run of ``config`` gets here, and keep the rates where plans look for them."""
    here = this_machine(config.train.device)
    if device_name is not None and device_name.lower() != here.name:
        raise UserError(f"--calibrate measures this machine's {here.name}; run it on a machine with {device_name}, or leave --device out")
    import torch

    from memory_mgmt.calibration import calibrate, describe, save

    print(f"measuring {here.name} ...", file=sys.stderr, flush=True)
    measured = calibrate(torch.device("cuda" if here.is_cuda else "cpu"))
    save(measured, calibration_path(here.name))
    print("\n".join([*describe(measured), f"written: {calibration_path(here.name)}"]), file=sys.stderr)


def _write_timeline(config: RunConfig, plan: MemoryPlan, args: argparse.Namespace) -> Sequence[Path]:
    return plan_files.write_plan_files(plan_files.planned_trace(config, plan, args.device), plan, args.timeline)


def _sweep(path: Path, args: argparse.Namespace) -> int:
    if args.timeline:
        raise UserError("--timeline: draws one plan, and --sweep makes many; give one of them")
    if args.calibrate:
        raise UserError("--calibrate: measures before one plan; give --sweep afterwards, the rates are kept")

    def plan(config: RunConfig, device: str | None) -> MemoryPlan:
        return plan_run(config, device, with_changes=False)

    axes = sweep.parse_axes(args.sweep)
    with progress("planning combinations") as shown:
        rows = sweep.sweep(path, args.overrides, axes, args.device, plan, prepare=trace_ahead, progress=shown)
    show(sweep.to_json(rows) if args.json else sweep_table.plain(rows) + "\n", None if args.json else lambda: sweep_table.render(rows))
    return 0
