"""The verbs ``train`` and ``resume``: from settings to ranks that train, these or ones started here. Imports torch when it is needed."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from memory_mgmt.plan import MemoryPlan
from models.errors import RunFailed, UserError
from parallel.dims import ParallelDims
from parallel.distributed import (
    Env,
    check_launch,
    end_distributed,
    environment,
    init_distributed,
    on_one_rank,
    select_device,
    threads_for,
    use_threads,
)
from parallel.launcher import join_launcher, launch_local, own_log
from trainer import config_file, out_of_memory, resume_rules, trace_workers
from trainer.commands.guard import guarded
from trainer.commands.open_run import (
    check_engine,
    check_init_from,
    checked_plan,
    kept_plan,
    open_run,
    refuse_existing,
    refuse_imported,
    reload,
    settle,
    with_values,
)
from trainer.commands.places import HOME, find_run
from trainer.commands.terminal import progress, tell
from trainer.compile_rules import announced, check_compiler
from trainer.config import RunConfig
from trainer.memory_kernels import check_memory_kernel
from trainer.planning import this_machine
from trainer.run_dir import RunDir
from trainer.run_timeline import drawn
from trainer.settling import open_settings

REPLANS = 3
"""How often a run with memory.replan_on_oom is planned again before it fails."""
RANK = "_rank"
"""Hidden verb: one rank of a run that ``longstride train`` or ``resume`` started on this machine."""


def train(args: argparse.Namespace) -> int:
    """``longstride train``."""
    path = config_file.find(args.config, HOME / "configs")
    config = config_file.resolve(path, args.overrides)
    if args.explain:
        return _explain(config, args.nproc)
    return _start(config, None, path.stem, args.nproc)


def _explain(config: RunConfig, ranks: int | None) -> int:
    """``longstride train --explain``; of ranks that a launcher started the first one prints."""
    if environment().rank == 0:
        from trainer.explain import explain_run

        print("\n".join(explain_run(settle(config, None, ranks))))
    return 0


def resume(args: argparse.Namespace) -> int:
    """``longstride resume`` on this machine; ``slurm/submit.py`` has ``--submit``."""
    of_a_job = [
        name for name in ("device", "nodes", "time", "partition", "qos", "account", "dependency", "chain", "force") if getattr(args, name)
    ]
    if of_a_job:
        raise UserError(f"--{of_a_job[0]}: is of a Slurm job; add --submit, or leave it out to train on this machine")
    run_dir = find_run(args.name, args.root)
    refuse_imported(run_dir)
    old = config_file.resolve(run_dir.config)
    new = config_file.resolve(run_dir.config, args.overrides)
    resume_rules.check(old, new, args.allow, run_dir.newest_step())
    print("".join(f"{line}\n" for line in announced(old, new)), end="", file=sys.stderr)
    return _start(new, run_dir, run_dir.name, args.nproc)


def _start(config: RunConfig, run_dir: RunDir | None, name: str, nproc: int | None) -> int:
    """Train ``config`` on the ranks it asks for: these, if a launcher started them; else ones started here.

    ``run_dir`` None: a new run, named after ``name`` and the time unless run.name says otherwise; else the run to resume.
    """
    env = environment()
    started = env.world_size if env.is_rank else nproc
    if run_dir is None and config.run.name is not None and env.rank == 0:
        refuse_existing(Path(config.run.root) / config.run.name)
    if env.accelerate is not None and env.accelerate.use_cpu and config.train.device == "auto":  # cuda is refused below
        config = with_values(config, "train", device="cpu")
    check_engine(config)
    check_compiler(config)
    check_memory_kernel(config, this_machine(config.train.device), here=True)
    if run_dir is None and env.rank == 0:
        check_init_from(config)
    config = _settled_by_one(config, started, env)
    ranks = ParallelDims.from_config(config.parallel, started).world_size
    check_launch(env, config.train.precision, config.train.device, config.train.grad_accum, ranks)
    plan = None if run_dir is not None and kept_plan(config, run_dir) else checked_plan(config, run_dir)
    trace_workers.close()  # what they hold is needed now
    # A run that plans again after running out of memory needs a process of its own that may end.
    if env.is_rank or (ranks == 1 and not config.memory.replan_on_oom):
        return _train_here(config, run_dir, name, plan, env)
    return _train_on_local_ranks(config, run_dir, name, plan, ranks, env)


def _settled_by_one(config: RunConfig, ranks: int | None, env: Env) -> RunConfig:
    """``settle``; among ranks that a launcher started rank 0 chooses."""
    if not env.is_rank or not open_settings(config):
        return settle(config, None, ranks)
    join_ranks(config, env)
    return on_one_rank(env, lambda: settle(config, None, ranks))


def join_ranks(config: RunConfig, env: Env) -> None:
    """Become one of the ranks: device, threads, process group."""
    device = select_device(config.train.device, env)
    use_threads(config.train.threads_per_rank, env)
    init_distributed(env, device, config.parallel.timeout_seconds)


def _train_on_local_ranks(config: RunConfig, run_dir: RunDir | None, name: str, plan: MemoryPlan | None, ranks: int, env: Env) -> int:
    if env.accelerate is not None and env.accelerate.use_cpu:
        print(f"accelerate launch started one process without GPUs; longstride starts the {ranks} ranks", file=sys.stderr)
    prepare_data(config)
    resume = run_dir is not None
    run_dir = open_run(config, run_dir, name, plan)
    for attempt in range(1 + (REPLANS if config.memory.replan_on_oom else 0)):
        noted = len(out_of_memory.records(run_dir))
        try:
            return _launch(config, run_dir, ranks, resume)
        except RunFailed as error:
            state = run_dir.read_state()
            if state is None or state.status == "running":  # the ranks could not write why they ended
                run_dir.write_state("failed", step=state.step if state else 0, reason=str(error).splitlines()[0])
            if len(out_of_memory.records(run_dir)) == noted or attempt == REPLANS or not config.memory.replan_on_oom:
                raise
            print(f"out of memory; planning again with what was measured ({attempt + 1} of {REPLANS})", file=sys.stderr, flush=True)
        plan = checked_plan(config, run_dir, out_of_memory.correction(run_dir))
        trace_workers.close()
        run_dir, resume = open_run(config, run_dir, name, plan), True
    raise AssertionError("the last attempt returns or raises")


def _launch(config: RunConfig, run_dir: RunDir, ranks: int, resume: bool) -> int:
    command = [sys.executable, str(HOME / "longstride.py"), RANK, str(run_dir.path), str(os.getpid()), "resume" if resume else "new"]
    logs = [run_dir.log(rank) for rank in range(ranks)]
    tight = MemoryPlan.from_json(run_dir.memory_plan.read_text()).return_freed_blocks
    threads = threads_for(config.train.threads_per_rank, ranks)
    drain = config.parallel.timeout_seconds + 60.0
    with drawn(run_dir, tell):
        return launch_local(command, logs, threads, drain, tell, huge_pages=tight)


def _train_here(config: RunConfig, run_dir: RunDir | None, name: str, plan: MemoryPlan | None, env: Env) -> int:
    """This process is the only rank, or one of several that torchrun, srun, mpirun or accelerate started."""
    from trainer import build

    resume = run_dir is not None
    join_ranks(config, env)
    on_one_rank(env, lambda: prepare_data(config), per_machine=True)
    run_dir = on_one_rank(env, lambda: open_run(config, run_dir, name, plan))
    with own_log(run_dir.log(env.rank)), drawn(run_dir, tell) if env.rank == 0 else contextlib.nullcontext():
        code = build.train(reload(run_dir), run_dir.path, resume)
    end_distributed()
    return code


def run_rank(path: str, launcher_pid: str, how: str) -> int:
    """One rank that ``_train_on_local_ranks`` started. Its errors go to its log with their tracebacks; the launcher reads the
    last lines there."""
    env = environment()
    run_dir = RunDir(path)
    log = join_launcher(int(launcher_pid), env.rank, run_dir.log(env.rank), stamped=True)

    def train() -> int:
        from trainer import build

        config = reload(run_dir)
        join_ranks(config, env)
        code = build.train(config, run_dir.path, how == "resume")
        end_distributed()
        return code

    return guarded(train, log, debug=True)


def prepare_data(config: RunConfig) -> None:
    """Check and tokenise the data, with a progress bar on a terminal."""
    from trainer.data.build import prepare

    with progress("reading and tokenising documents") as shown:
        prepare(config, shown)
