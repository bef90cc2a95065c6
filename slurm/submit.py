"""``longstride submit`` and ``resume --submit``: plan first, then the run directory with script and code, then sbatch. Imports no torch."""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from memory_mgmt.plan import MemoryPlan, gib, refusal
from models.errors import UserError
from parallel.dims import ParallelDims
from slurm import client
from slurm.script import Job, render
from slurm.site import Site, read_site
from slurm.submission import Submission, has_submission, job_of, read_submission, write_submission
from slurm.times import check_limit
from trainer import config_file, resume_rules
from trainer.commands.open_run import (
    check_engine,
    check_init_from,
    kept_plan,
    new_run,
    open_run,
    refuse_existing,
    refuse_imported,
    settle,
    with_values,
)
from trainer.commands.places import HOME, find_run
from trainer.compile_rules import announced
from trainer.config import RunConfig
from trainer.memory_kernels import check_memory_kernel
from trainer.planning import plan_run, target_for
from trainer.run_dir import RunDir, write_atomic

MOST_LINKS = 100
REPEATED = ("nodes", "time", "partition", "qos", "account", "device")
"""Options that a resubmission repeats; a dependency belongs to one submission."""


def submit(args: argparse.Namespace) -> int:
    """``longstride submit``."""
    path = config_file.find(args.config, HOME / "configs")
    config = config_file.resolve(path, args.overrides)
    if config.run.name is not None:
        refuse_existing(Path(config.run.root) / config.run.name)
    check_engine(config)
    check_init_from(config)
    site = read_site()
    options = options_of(args, {})
    links = _links(args)
    check_limit(options.get("time") or site.time, site)
    if not args.dry_run:
        client.need_slurm()
    if args.sweep:
        from slurm.array import submit_sweep

        return submit_sweep(path, args, options, site)
    if args.at_once is not None:
        raise UserError("--at-once: is of a sweep; add --sweep key=value,value,...")
    config, plan = planned(config, options, site, args.force)
    run_dir, config = new_run(config, path.stem)
    script = render(job_for(config, options, site, run_dir, "dry-run"), site)  # refuses what cannot be, before anything is written
    if args.dry_run:
        print(script, end="")
        return 0
    open_run(config, None, path.stem, plan)
    return _give_to_slurm(run_dir, config, options, site, links)


def resubmit(args: argparse.Namespace) -> int:
    """``longstride resume RUN --submit``: the same run in a new job, with the options of its last one unless others are given."""
    run_dir = find_run(args.name, args.root)
    refuse_imported(run_dir)
    if args.nproc is not None:
        raise UserError("--nproc starts ranks on this machine; with --submit say --nodes")
    links = _links(args)
    old = config_file.resolve(run_dir.config)
    new = config_file.resolve(run_dir.config, args.overrides)
    resume_rules.check(old, new, args.allow, run_dir.newest_step())
    print("".join(f"{line}\n" for line in announced(old, new)), end="", file=sys.stderr)
    check_engine(new)
    site = read_site()
    before = read_submission(run_dir) if has_submission(run_dir) else None
    options = options_of(args, before.options if before else {})
    check_limit(options.get("time") or site.time, site)
    client.need_slurm()
    if before and (job := _live_job(before)):
        raise UserError(f"run {run_dir.name} has a job: {job.id} is {job.state}; end it first with longstride cancel {run_dir.name}")
    config, plan = planned(new, options, site, args.force, run_dir)
    render(job_for(config, options, site, run_dir, before.token if before else ""), site)
    open_run(config, run_dir, run_dir.name, plan)
    return _give_to_slurm(run_dir, config, options, site, links)


def _links(args: argparse.Namespace) -> int:
    """How many jobs are queued, one behind the other."""
    if args.chain is not None and getattr(args, "sweep", None):
        raise UserError("--chain: the jobs of a sweep are tasks of one array; submit the runs apart to chain them")
    if args.chain is not None and not 1 <= args.chain <= MOST_LINKS:
        raise UserError(f"--chain {args.chain}: a chain has 1 to {MOST_LINKS} jobs")
    return args.chain or 1


def options_of(args: argparse.Namespace, before: dict[str, Any]) -> dict[str, Any]:
    given = {name: getattr(args, name) for name in (*REPEATED, "dependency")}
    kept = {name: before.get(name) for name in REPEATED}
    return {**kept, **{name: value for name, value in given.items() if value is not None}}


def planned(
    config: RunConfig, options: dict[str, Any], site: Site, force: bool, run_dir: RunDir | None = None
) -> tuple[RunConfig, MemoryPlan | None]:
    """The settings with every ``auto`` chosen and the plan for the nodes' device; plan None: the run's own holds on.

    Raises UserError when the step does not fit there, unless ``force``.
    """
    device = options.get("device") or site.device or ("cpu" if config.train.device == "cpu" else None)
    if device is None:
        raise UserError("--device: say what the nodes compute on, such as h100 or cpu, here or as 'device' in site.yaml (docs/slurm.md)")
    config = with_values(config, "train", device="cpu" if device.lower() == "cpu" else "cuda")
    config = settle(config, device, None)
    check_memory_kernel(config, target_for(config, device).device, here=True)  # the job runs this very installation
    if run_dir is not None and kept_plan(config, run_dir):
        return config, None
    plan = plan_run(config, device)
    print(f"planned peak of a rank on {plan.device}: {gib(plan.measurable_peak_bytes)}", file=sys.stderr, flush=True)
    if not plan.fits:
        if not force:
            raise UserError(f"{refusal(plan)}\nnothing was queued; --force queues it all the same")
        print("warning: by its plan this run does not fit; queued all the same (--force)", file=sys.stderr)
    return config, plan


def job_for(config: RunConfig, options: dict[str, Any], site: Site, run_dir: RunDir, token: str) -> Job:
    ranks = ParallelDims.from_config(config.parallel).world_size
    nodes = options.get("nodes")
    nodes = -(-ranks // (site.ranks_per_node or ranks)) if nodes is None else nodes
    if nodes < 1 or ranks % nodes:
        raise UserError(f"--nodes: {ranks} ranks (the degrees under parallel) cannot be shared evenly by {nodes} nodes; choose a divisor")
    asked = {name: options.get(name) or getattr(site, name) for name in ("time", "partition", "qos", "account")}
    return Job(
        name=run_dir.name,
        token=token,
        run=run_dir.path.resolve(),
        longstride=run_dir.code.resolve() / "longstride.py",
        python=sys.executable,
        submit_dir=Path.cwd(),
        nodes=nodes,
        ranks_per_node=ranks // nodes,
        gpus=config.train.device == "cuda",
        dependency=options.get("dependency"),
        cpus_per_node=site.cpus_per_node,
        mem=site.mem,
        **asked,
    )


def _give_to_slurm(run_dir: RunDir, config: RunConfig, options: dict[str, Any], site: Site, links: int) -> int:
    """Write the script, queue it, remember the job. The record is written before: a crash in between leaves a token to find it by."""
    token = secrets.token_hex(8)
    script = run_dir.slurm / "job.sbatch"
    run_dir.slurm.mkdir(exist_ok=True)
    write_atomic(script, render(job_for(config, options, site, run_dir, token), site).encode())
    kept = {name: options[name] for name in REPEATED if options.get(name) is not None}
    submission = Submission(token, "", site.idle_attempts, kept, node_check=site.node_check, health=site.health)
    write_submission(run_dir, submission)
    state = run_dir.read_state()
    step, total = (state.step if state else 0), config.train.steps
    try:
        job_id = client.sbatch(script)
    except UserError as error:
        run_dir.write_state("failed", step=step, total_steps=total, reason=f"not queued: {error}")
        again = f"nothing was queued; when the cause is gone: longstride resume {shlex.quote(str(run_dir.path))} --submit"
        raise UserError(f"{error}\n{again}") from None
    write_submission(run_dir, replace(submission, job_id=job_id, chain=(chain := _queue_links(script, job_id, links))))
    run_dir.write_state("queued", step=step, total_steps=total, reason=f"job {job_id}")
    _tell(run_dir, job_id, chain)
    return 0


def _queue_links(script: Path, job_id: str, links: int) -> tuple[str, ...]:
    """The jobs behind ``job_id``. What Slurm refuses of them is told; the first one is queued."""
    chain = [job_id]
    try:
        while len(chain) < links:
            chain.append(client.sbatch(script, f"--dependency=afterany:{chain[-1]}"))
    except UserError as error:
        print(f"warning: {len(chain)} of {links} jobs are queued: {error}", file=sys.stderr)
    return tuple(chain[1:])


def _live_job(submission: Submission) -> client.QueuedJob | None:
    return job_of(submission, client.queue()) if client.has_slurm() else None


def _tell(run_dir: RunDir, job_id: str, chain: tuple[str, ...]) -> None:
    waiting = f"jobs {', '.join(chain)} wait" if len(chain) > 1 else f"job {''.join(chain)} waits"
    behind = f"{waiting} behind it, in case it ends before the run does\n" if chain else ""
    run = shlex.quote(os.path.relpath(run_dir.path))
    print(
        f"job {job_id} queued: run {run_dir.path}\n{behind}"
        "it is saved and requeued before its time limit and after preemption, and resumes by itself until all steps are done\n"
        f"next:\n  longstride runs{of_root(run_dir)}\n  longstride monitor {run}\n  tail -F {run}/slurm/job_{job_id}.log\n"
        f"  longstride cancel {run}"
    )


def of_root(run_dir: RunDir) -> str:
    """How ``longstride runs`` is told where ``run_dir`` is, if that has to be said."""
    root = os.path.relpath(run_dir.path.parent)
    return "" if root == "runs" else f" --root {shlex.quote(root)}"
