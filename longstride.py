"""The front door: one subcommand per verb, heavy imports only inside the verb that needs them.

``longstride train``, ``python -m longstride train`` and ``python longstride.py train`` are the same command. Exit codes: 0 done,
1 failed, 2 bad usage or configuration (nothing was started), 75 stopped early and resumable, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from memory_mgmt.plan import MemoryPlan
    from parallel.distributed import Env
    from trainer.config import RunConfig
    from trainer.run_dir import RunDir

HOME = Path(__file__).resolve().parent
ROOMS = ("trainer", "parallel", "memory_mgmt", "optim", "models", "slurm")
REPLANS = 3
"""How often a run with memory.replan_on_oom is planned again before it fails."""
RANK = "_rank"
"""Hidden verb: one rank of a run that ``longstride train`` or ``resume`` started on this machine."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    foreign = _foreign_rooms()
    if foreign:
        print("\n".join(f"error: {line}" for line in foreign), file=sys.stderr)
        return 2
    code = _run_rank(*arguments[1:]) if arguments[:1] == [RANK] else _guarded(lambda: _dispatch(arguments), sys.stderr, debug)
    _leave_if_failed(code)
    return code


def _dispatch(arguments: list[str]) -> int:
    args, rest = _parser().parse_known_args(arguments)
    if rest:  # argparse does not put key=value that follow an option with those before it
        options = [word for word in rest if word.startswith("-")]
        if options or not hasattr(args, "overrides"):
            _parser().error(f"unrecognized arguments: {' '.join(options or rest)}")
        args.overrides += rest
    return args.run(args)


def _guarded(run: Any, stream: TextIO, debug: bool) -> int:
    """Call ``run`` and turn what it raises into one or two lines on ``stream`` and an exit code."""
    import traceback

    from models.errors import UserError

    try:
        return run()
    except UserError as error:
        if debug:
            traceback.print_exc(file=stream)
        print(f"error: {error}", file=stream, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; a run that was going on resumes from its last checkpoint", file=stream, flush=True)
        return 130
    except BrokenPipeError:  # longstride runs | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc(file=stream)
        detail = " ".join(str(error).split())[:300]
        print(f"error: {type(error).__name__}: {detail} (not an expected error; --debug shows where)", file=stream, flush=True)
        return 1


def _leave_if_failed(code: int) -> None:
    """End a rank that failed at once: the threads of a process group whose peers are gone would abort or hang Python's own exit."""
    distributed = sys.modules.get("torch.distributed")
    if code not in (0, 75) and distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --- rooms


def _foreign_rooms() -> list[str]:
    """One line for each room that would be, or was, imported from another place than beside this file."""
    lines = []
    for room in ROOMS:
        loaded = sys.modules.get(room)
        spec = loaded.__spec__ if loaded is not None else importlib.util.find_spec(room)
        places = [Path(place).resolve() for place in (spec.submodule_search_locations or [])] if spec is not None else []
        if places != [HOME / room]:
            found = str(places[0]) if places else str(spec.origin) if spec is not None else "nowhere"
            lines.append(
                f"'import {room}' finds {found}, not {HOME / room}; remove the other one from PYTHONPATH or this environment, "
                f"or run: {sys.executable} {HOME / 'longstride.py'}"
            )
    return lines


# --- train and resume


def _train(args: argparse.Namespace) -> int:
    from trainer import config_file

    path = config_file.find(args.config, HOME / "configs")
    config = config_file.resolve(path, args.overrides)
    return _start(config, None, path.stem, args.nproc)


def _resume(args: argparse.Namespace) -> int:
    from trainer import config_file, resume_rules

    run_dir = _find_run(args.name, args.root)
    old = config_file.resolve(run_dir.config)
    new = config_file.resolve(run_dir.config, args.overrides)
    resume_rules.check(old, new)
    return _start(new, run_dir, run_dir.name, args.nproc)


def _start(config: RunConfig, run_dir: RunDir | None, name: str, nproc: int | None) -> int:
    """Train ``config`` on the ranks it asks for: these, if a launcher started them; else ones started here.

    ``run_dir`` None: a new run, named after ``name`` and the time unless run.name says otherwise; else the run to resume.
    """
    from parallel.dims import ParallelDims
    from parallel.distributed import check_launch, environment
    from trainer import trace_workers

    env = environment()
    started = env.world_size if env.is_rank else nproc
    if run_dir is None and config.run.name is not None and env.rank == 0:
        _refuse_existing(Path(config.run.root) / config.run.name)
    if env.accelerate is not None and env.accelerate.use_cpu and config.train.device == "auto":  # cuda is refused below
        config = _with(config, "train", device="cpu")
    config = _settled(config, None, started, env)
    ranks = ParallelDims.from_config(config.parallel, started).world_size
    check_launch(env, config.train.precision, config.train.device, config.train.grad_accum, ranks)
    plan = None if run_dir is not None and _kept_plan(config, run_dir) else _checked_plan(config, run_dir)
    trace_workers.close()  # what they hold is needed now
    # A run that plans again after running out of memory needs a process of its own that may end.
    if env.is_rank or (ranks == 1 and not config.memory.replan_on_oom):
        return _train_here(config, run_dir, name, plan, env)
    return _train_on_local_ranks(config, run_dir, name, plan, ranks, env)


def _settled(config: RunConfig, device: str | None, ranks: int | None, env: Env | None = None) -> RunConfig:
    """``config`` with its ``auto`` settings chosen, and what was chosen told; among ranks that a launcher started rank 0 chooses."""
    from parallel.distributed import on_one_rank
    from trainer.settling import open_settings, settled

    if not open_settings(config):
        return config

    def choose() -> RunConfig:
        found = settled(config, device, ranks)
        print("\n".join(found.lines()), file=sys.stderr, flush=True)
        return found.config

    if env is None or not env.is_rank:
        return choose()
    _join(config, env)
    return on_one_rank(env, choose)


def _join(config: RunConfig, env: Env) -> None:
    """Become one of the ranks: device, threads, process group."""
    from parallel.distributed import init_distributed, select_device, use_threads

    device = select_device(config.train.device, env)
    use_threads(config.train.threads_per_rank, env)
    init_distributed(env, device, config.parallel.timeout_seconds)


def _train_on_local_ranks(config: RunConfig, run_dir: RunDir | None, name: str, plan: MemoryPlan | None, ranks: int, env: Env) -> int:
    from models.errors import RunFailed
    from trainer import out_of_memory, trace_workers

    if env.accelerate is not None and env.accelerate.use_cpu:
        print(f"accelerate launch started one process without GPUs; longstride starts the {ranks} ranks", file=sys.stderr)
    _prepare(config)
    resume = run_dir is not None
    run_dir = _open_run(config, run_dir, name, plan)
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
        plan = _checked_plan(config, run_dir, out_of_memory.correction(run_dir))
        trace_workers.close()
        run_dir, resume = _open_run(config, run_dir, name, plan), True
    raise AssertionError("the last attempt returns or raises")


def _launch(config: RunConfig, run_dir: RunDir, ranks: int, resume: bool) -> int:
    from memory_mgmt.plan import MemoryPlan
    from parallel.distributed import threads_for
    from parallel.launcher import launch_local
    from trainer.run_timeline import drawn

    command = [sys.executable, str(HOME / "longstride.py"), RANK, str(run_dir.path), str(os.getpid()), "resume" if resume else "new"]
    logs = [run_dir.log(rank) for rank in range(ranks)]
    tight = MemoryPlan.from_json(run_dir.memory_plan.read_text()).return_freed_blocks
    threads = threads_for(config.train.threads_per_rank, ranks)
    drain = config.parallel.timeout_seconds + 60.0
    with drawn(run_dir, _tell):
        return launch_local(command, logs, threads, drain, _tell, huge_pages=tight)


def _tell(line: str) -> None:
    with contextlib.suppress(OSError):  # a closed terminal or pipe must not end a run
        print(line, file=sys.stderr, flush=True)


def _train_here(config: RunConfig, run_dir: RunDir | None, name: str, plan: MemoryPlan | None, env: Env) -> int:
    """This process is the only rank, or one of several that torchrun, srun, mpirun or accelerate started."""
    from parallel.distributed import end_distributed, on_one_rank
    from trainer import build
    from trainer.run_timeline import drawn

    resume = run_dir is not None
    _join(config, env)
    on_one_rank(env, lambda: _prepare(config), per_machine=True)
    run_dir = on_one_rank(env, lambda: _open_run(config, run_dir, name, plan))
    with drawn(run_dir, _tell) if env.rank == 0 else contextlib.nullcontext():
        code = build.train(_reload(run_dir), run_dir.path, resume)
    end_distributed()
    return code


def _run_rank(path: str, launcher_pid: str, how: str) -> int:
    """One rank that ``_train_on_local_ranks`` started. Its errors go to its log with their tracebacks; the launcher reads the
    last lines there."""
    from parallel.distributed import environment
    from parallel.launcher import join_launcher
    from trainer.run_dir import RunDir

    env = environment()
    run_dir = RunDir(path)
    log = join_launcher(int(launcher_pid), env.rank, run_dir.log(env.rank))

    def train() -> int:
        from parallel.distributed import end_distributed
        from trainer import build

        config = _reload(run_dir)
        _join(config, env)
        code = build.train(config, run_dir.path, how == "resume")
        end_distributed()
        return code

    return _guarded(train, log, debug=True)


def _checked_plan(config: RunConfig, run_dir: RunDir | None, correction: float = 1.0) -> MemoryPlan:
    """The plan to run by. Raises UserError when the step does not fit, expected to take ``correction`` times its plan; where the run
    ran out of memory before, the plan counts what was measured then."""
    from memory_mgmt.plan import refusal
    from models.errors import UserError
    from trainer import out_of_memory
    from trainer.planning import plan_run

    plan = plan_run(config, correction=correction)
    if not plan.fits:
        raise UserError(refusal(plan))
    measured = out_of_memory.correction(run_dir) if run_dir is not None else 1.0
    return plan if measured == correction else plan_run(config, correction=measured)


def _prepare(config: RunConfig) -> None:
    """Check and tokenise the data, with a progress bar on a terminal."""
    from trainer.data.build import prepare

    with _progress("reading and tokenising documents") as progress:
        prepare(config, progress)


def _refuse_existing(path: Path) -> None:
    from trainer.run_dir import RunDir

    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        RunDir(path).create()  # says what is in the way


def _open_run(config: RunConfig, run_dir: RunDir | None, name: str, plan: MemoryPlan | None) -> RunDir:
    """Make the directory of a new run, or note in an old one with which settings and ``plan`` (None: its own) it goes on."""
    import time

    from trainer import config_file
    from trainer.planning import calibration_path
    from trainer.run_dir import RunDir, write_atomic

    if run_dir is None:
        name = config.run.name or f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        config = _with(config, "run", name=name)
        run_dir = RunDir(Path(config.run.root) / name)
        run_dir.create()
    text = config_file.dump(config)
    with run_dir.lock():
        if run_dir.config.exists() and run_dir.config.read_text() != text:
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


def _kept_plan(config: RunConfig, run_dir: RunDir) -> bool:
    """Whether the run's plan holds on: nothing that it depends on has changed and memory has not run out since. A resumed run then
    repeats the arithmetic of the first one, whatever rates a new plan would go by."""
    from memory_mgmt.plan import MemoryPlan
    from trainer import config_file
    from trainer.planning import same_step

    if not (run_dir.config.exists() and run_dir.memory_plan.exists()):
        return False
    try:
        MemoryPlan.from_json(run_dir.memory_plan.read_text())
    except ValueError:
        return False
    made = run_dir.memory_plan.stat().st_mtime
    ran_out = any(note.stat().st_mtime > made for note in (run_dir.path / "oom").glob("*.json"))
    return not ran_out and same_step(config_file.resolve(run_dir.config), config)


def _reload(run_dir: RunDir) -> RunConfig:
    from trainer import config_file

    return config_file.resolve(run_dir.config)


def _with(config: RunConfig, section: str, **values: Any) -> RunConfig:
    """``config`` with some values of one section replaced."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _find_run(name: str, root: str) -> RunDir:
    """The run called ``name`` in ``root``, or at the path ``name``. Raises UserError naming the runs there are."""
    from models.errors import UserError
    from trainer.run_dir import RunDir

    for path in (Path(root) / name, Path(name)):
        if (path / "config.yaml").is_file():
            return RunDir(path)
    known = sorted(path.parent.name for path in Path(root).glob("*/config.yaml"))
    there = f"runs in {root}: {', '.join(known[-8:])}" if known else f"there are no runs in {root}; give its path or --root"
    raise UserError(f"no run '{name}' ({Path(root) / name / 'config.yaml'} does not exist)\n{there}")


# --- plan, runs, eval


def _show_plan(args: argparse.Namespace) -> int:
    from memory_mgmt import plan_view
    from trainer import config_file
    from trainer.planning import plan_run

    path = config_file.find(args.config, HOME / "configs")
    if args.sweep:
        return _sweep(path, args)
    config = config_file.resolve(path, args.overrides)
    if args.calibrate:
        _calibrate(config, args.device)
    config = _settled(config, args.device, None)
    plan = plan_run(config, args.device)
    written = _write_timeline(config, plan, args) if args.timeline else ()
    _show(plan.to_json() if args.json else plan_view.plain(plan) + "\n", None if args.json else lambda: plan_view.render(plan))
    for file in written:
        print(f"written: {file}", file=sys.stderr)
    return 0


def _calibrate(config: RunConfig, device_name: str | None) -> None:
    """Measure the device that a run of ``config`` gets here, and keep the rates where plans look for them."""
    from models.errors import UserError
    from trainer.planning import calibration_path, this_machine

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
    from trainer import plan_files

    return plan_files.write_plan_files(plan_files.planned_trace(config, plan, args.device), plan, args.timeline)


def _sweep(path: Path, args: argparse.Namespace) -> int:
    from models.errors import UserError
    from trainer import sweep, sweep_table
    from trainer.planning import plan_run
    from trainer.sweep_traces import trace_ahead

    if args.timeline:
        raise UserError("--timeline: draws one plan, and --sweep makes many; give one of them")
    if args.calibrate:
        raise UserError("--calibrate: measures before one plan; give --sweep afterwards, the rates are kept")

    def plan(config: RunConfig, device: str | None) -> MemoryPlan:
        return plan_run(config, device, with_changes=False)

    axes = sweep.parse_axes(args.sweep)
    with _progress("planning combinations") as progress:
        rows = sweep.sweep(path, args.overrides, axes, args.device, plan, prepare=trace_ahead, progress=progress)
    _show(sweep.to_json(rows) if args.json else sweep_table.plain(rows) + "\n", None if args.json else lambda: sweep_table.render(rows))
    return 0


def _show(text: str, rendered: Callable[[], Any] | None) -> None:
    """Print ``text``, or on a terminal what ``rendered`` makes, if anything."""
    if rendered is None or not sys.stdout.isatty():
        print(text, end="")
        return
    from rich.console import Console

    Console().print(rendered())


@contextlib.contextmanager
def _progress(text: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal as a function of (done, total); None elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _runs(args: argparse.Namespace) -> int:
    from trainer import runs_table

    rows = runs_table.read_runs(_find_run(args.name, args.root).path if args.name else args.root)
    if rows:
        runs_table.render(rows)
    else:
        print(f"no runs in {args.root}")
    return 0


def _eval(args: argparse.Namespace) -> int:
    run_dir = _find_run(args.name, args.root)
    config = _reload(run_dir)

    from parallel.distributed import Env, select_device, use_threads
    from trainer.evals.perplexity import perplexity

    select_device(config.train.device, Env())
    use_threads(config.train.threads_per_rank, Env())
    print("\n".join(perplexity(run_dir, args.checkpoint, args.data, args.sequences).lines()))
    return 0


# --- the command line


class _HelpConfig(argparse.Action):
    """Prints every configuration key and ends, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from trainer.config_file import help_config

        print(help_config())
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="longstride",
        description="Pretrain memory-augmented language models on long sequences, planned before the run.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 75 stopped early and resumable. "
        "--debug with any verb shows tracebacks.",
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    train = verbs.add_parser("train", help="train a configuration, on one process or on N local ranks")
    _add_config(train)
    _add_nproc(train)
    train.set_defaults(run=_train)

    resume = verbs.add_parser("resume", help="go on with a run from its newest good checkpoint")
    _add_run(resume)
    _add_overrides(resume, "settings to change, such as train.steps=400 or parallel.cp=4; others are refused")
    _add_nproc(resume)
    resume.set_defaults(run=_resume)

    plan = verbs.add_parser("plan", help="show the memory one rank will need, without running anything")
    _add_config(plan)
    plan.add_argument("--device", help="plan for this device: cpu, h100, ... (default: this machine's)")
    plan.add_argument("--json", action="store_true", help="print the plan, or the rows of --sweep, as JSON")
    plan.add_argument("--timeline", metavar="DIR", help="write memory_plan.json and the memory timeline (PNG, HTML) into DIR")
    plan.add_argument("--calibrate", action="store_true", help="first measure this machine's device (seconds); kept for later plans")
    plan.add_argument(
        "--sweep",
        metavar="key=value,value,...",
        nargs="+",
        help="print a fit table over all combinations; keys are settings, device and gpus; 64k is 65536 (data.seq_len=64k,1m gpus=1,8)",
    )
    plan.set_defaults(run=_show_plan)

    runs = verbs.add_parser("runs", help="list runs and how they stand")
    _add_run(runs, nargs="?")
    runs.set_defaults(run=_runs)

    evaluate = verbs.add_parser("eval", help="perplexity of a run's checkpoint on held-out data")
    _add_run(evaluate)
    evaluate.add_argument("--checkpoint", type=int, metavar="STEP", help="step of the checkpoint (default: the newest good one)")
    evaluate.add_argument("--data", metavar="PATH", help="held-out data of the run's source kind (default: the run's own)")
    evaluate.add_argument("--sequences", type=int, metavar="N", help="held-out sequences (default: train.eval_sequences of the run)")
    evaluate.set_defaults(run=_eval)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one in configs/")
    _add_overrides(parser, "settings that override the file, such as train.steps=100")
    parser.add_argument("--help-config", action=_HelpConfig, nargs=0, help="list every key with its type, default and meaning")


def _add_overrides(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=text)


def _add_run(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("name", metavar="RUN", nargs=nargs, help="name or path of a run directory")
    parser.add_argument("--root", default="runs", help="directory that holds runs (default: runs)")


def _add_nproc(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks to start on this machine; must equal the product of the degrees")


if __name__ == "__main__":
    sys.exit(main())
