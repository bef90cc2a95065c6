"""``longstride submit --sweep``: one run per combination of settings, all planned before any is queued, as the tasks of one job array.

Run i is called NAME-i; ``NAME.sweep/sweep.json`` beside them says what each of them is. Imports no torch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import secrets
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memory_mgmt.plan import MemoryPlan
from models.errors import UserError
from slurm import client
from slurm.script import Job, render
from slurm.site import Site
from slurm.submission import Submission, write_submission
from slurm.submit import REPEATED, job_for, of_root, planned
from trainer import config_file, sweep
from trainer.commands.open_run import new_run, open_run, refuse_existing, with_values
from trainer.config import RunConfig
from trainer.run_dir import RunDir, write_atomic

NOT_SWEPT = ("device", "gpus", "run.name", "run.root")
MOST_TASKS = 200


@dataclass(frozen=True)
class _Task:
    values: dict[str, str]
    """The swept settings as typed."""
    config: RunConfig
    run_dir: RunDir
    plan: MemoryPlan | None


def submit_sweep(path: Path, args: argparse.Namespace, options: dict[str, Any], site: Site) -> int:
    """Queue all combinations of ``args.sweep``. Raises UserError naming the combination that cannot run, before anything is written."""
    if args.at_once is not None and args.at_once < 1:
        raise UserError("--at-once: give a number of tasks, at least 1")
    combinations = _combinations(args.sweep)
    base = config_file.resolve(path, args.overrides)
    home, named = new_run(base, path.stem)
    refuse_existing(_folder(home))
    tasks = [_task(i, values, path, args, options, site, named) for i, values in enumerate(combinations)]
    job = _one_job(tasks, options, site, home, args.at_once)
    script = render(job, site)
    if args.dry_run:
        print(script, end="")
        return 0
    return _queue(tasks, job, script, options, site, home)


def _combinations(words: list[str]) -> list[dict[str, str]]:
    if numbered := next((word for word in words if re.fullmatch(r"[\d,:%-]+", word)), None):
        raise UserError(
            f"--array {numbered}: tasks are not numbered by hand; each is a run with settings of its own, such as "
            "--array train.seed=0,1,2,3 (Slurm's %N is --at-once N)"
        )
    axes = sweep.parse_axes(words)
    for axis in axes:
        if axis.key in NOT_SWEPT:
            raise UserError(f"--sweep: {axis.key} cannot be swept in a job array; give one value for all")
    values = itertools.product(*([sweep.expanded(value) for value in axis.values] for axis in axes))
    found = [dict(zip((axis.key for axis in axes), each, strict=True)) for each in values]
    if len(found) > MOST_TASKS:
        raise UserError(f"--sweep: {len(found)} combinations, at most {MOST_TASKS} are submitted at once; split it")
    return found


def _task(
    i: int, values: dict[str, str], path: Path, args: argparse.Namespace, options: dict[str, Any], site: Site, named: RunConfig
) -> _Task:
    words = [f"{key}={value}" for key, value in values.items()]
    try:
        config = config_file.resolve(path, [*args.overrides, *words])
        config, plan = planned(config, options, site, args.force)
    except UserError as error:
        raise UserError(f"{' '.join(words)}: {error}") from None
    config = with_values(config, "run", name=f"{named.run.name}-{i}")
    run_dir = RunDir(Path(config.run.root) / str(config.run.name))
    refuse_existing(run_dir.path)
    return _Task(values, config, run_dir, plan)


def _one_job(tasks: list[_Task], options: dict[str, Any], site: Site, home: RunDir, at_once: int | None) -> Job:
    """What all tasks ask of Slurm. Raises UserError when they differ: an array has one shape."""
    jobs = [job_for(task.config, options, site, home, "dry-run") for task in tasks]
    shapes = {(job.nodes, job.ranks_per_node, job.gpus): task.values for job, task in zip(jobs, tasks, strict=True)}
    if len(shapes) > 1:
        told = "; ".join(f"{nodes} nodes of {ranks} ranks for {values}" for (nodes, ranks, _), values in shapes.items())
        raise UserError(f"--sweep: the tasks of a job array take equally many nodes and ranks, and these do not: {told}; submit them apart")
    return replace(jobs[0], tasks=len(tasks), at_once=at_once)


def _queue(tasks: list[_Task], job: Job, script: str, options: dict[str, Any], site: Site, home: RunDir) -> int:
    """Make every run, then queue the array. The token is on disk before: a crash in between leaves it to find the jobs by."""
    token = secrets.token_hex(8)
    script = render(replace(job, token=token), site)
    kept = {name: options[name] for name in REPEATED if options.get(name) is not None}
    for i, task in enumerate(tasks):
        open_run(task.config, None, task.run_dir.name, task.plan)
        task.run_dir.slurm.mkdir(exist_ok=True)
        write_atomic(task.run_dir.slurm / "job.sbatch", script.encode())
        write_submission(task.run_dir, _submission(token, "", i, kept, site))
    folder = _folder(home)
    folder.mkdir(parents=True, mode=0o700 if tasks[0].config.run.private else 0o777)
    write_atomic(folder / "job.sbatch", script.encode())
    runs = [{"run": task.run_dir.name, "settings": task.values} for task in tasks]
    write_atomic(folder / "sweep.json", (json.dumps({"token": token, "runs": runs}, indent=1) + "\n").encode())
    try:
        number = client.sbatch(folder / "job.sbatch")
    except UserError as error:
        for task in tasks:
            task.run_dir.write_state("failed", step=0, total_steps=task.config.train.steps, reason=f"not queued: {error}")
        alone = f"longstride resume {tasks[0].run_dir.path} --submit"
        raise UserError(f"{error}\nnothing was queued; each run can be submitted alone: {alone}") from None
    for i, task in enumerate(tasks):
        write_submission(task.run_dir, _submission(token, f"{number}_{i}", i, kept, site))
        task.run_dir.write_state("queued", step=0, total_steps=task.config.train.steps, reason=f"job {number}_{i}")
    print(f"job array {number} queued: {len(tasks)} runs")
    for i, task in enumerate(tasks):
        print(f"  {number}_{i}  {task.run_dir.path}  {' '.join(f'{key}={value}' for key, value in task.values.items())}")
    print(f"next:\n  longstride runs{of_root(home)}\n  longstride monitor RUN\n  longstride cancel RUN, or scancel {number} for all")
    sys.stdout.flush()
    return 0


def _submission(token: str, job_id: str, i: int, kept: dict[str, Any], site: Site) -> Submission:
    return Submission(token, job_id, site.idle_attempts, kept, task=str(i), node_check=site.node_check, health=site.health)


def _folder(home: RunDir) -> Path:
    return home.path.with_name(f"{home.name}.sweep")
