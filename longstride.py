"""The front door: one subcommand per verb; what a verb does is in trainer/commands/, imported only when it is called.

``longstride train``, ``python -m longstride train`` and ``python longstride.py train`` are the same command. Exit codes: 0 done,
1 failed, 2 bad usage or configuration (nothing was started), 75 stopped early and resumable, 85 hung and ended by the watchdog
(resumable), 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

HOME = Path(__file__).resolve().parent
ROOMS = ("trainer", "parallel", "memory_mgmt", "optim", "models", "slurm")
HIDDEN = {
    "_rank": "trainer.commands.train:run_rank",
    "_job_rank": "trainer.commands.job_rank:run_job_rank",
    "_job_start": "slurm.commands:job_start",
    "_node_run": "slurm.health:node_run",
    "_job_end": "slurm.commands:job_end",
}
"""What longstride starts for itself: the name of a function that is given the remaining words."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    foreign = _foreign_rooms()
    if foreign:
        print("\n".join(f"error: {line}" for line in foreign), file=sys.stderr)
        return 2
    from trainer.commands.guard import guarded

    if arguments and arguments[0] in HIDDEN:
        code = _function(HIDDEN[arguments[0]])(*arguments[1:])
    else:
        code = guarded(lambda: _dispatch(arguments), sys.stderr, debug)
    _leave_if_failed(code)
    return code


def _function(name: str) -> Callable[..., int]:
    """The function called ``module:function``, its module imported now."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _dispatch(arguments: list[str]) -> int:
    parser, verbs = _parsers()
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    if not arguments[0].startswith("-") and arguments[0] not in verbs:
        parser.error(f"there is no verb '{arguments[0]}'{_did_you_mean(arguments[0], verbs)} (there are: {', '.join(verbs)})")
    args, rest = parser.parse_known_args(arguments)
    if rest:  # argparse does not put key=value that follow an option with those before it
        if arguments[0] not in verbs:
            parser.error(f"there is no option {rest[0]} before the verb; a verb's options follow it")
        verb = verbs[arguments[0]]
        options = [word for word in rest if word.startswith("-")]
        if options:
            known = [option for option in verb._option_string_actions if option.startswith("--")]
            verb.error(f"there is no option {options[0]}{_did_you_mean(options[0], known)}")
        if not hasattr(args, "overrides"):
            verb.error(f"one word too many: {rest[0]}")
        args.overrides += rest
    return _function(args.run)(args)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.split("=")[0], known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


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


# --- the command line


class _HelpConfig(argparse.Action):
    """Prints every configuration key and ends, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from trainer.config_file import help_config

        print(help_config())
        parser.exit()


class _Version(argparse.Action):
    """Prints which longstride this is, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            found = version("longstride")
        except PackageNotFoundError:  # run from a copy of the sources
            found = "(not installed)"
        print(f"longstride {found} in {HOME}")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """Options are written out: one that a later release adds must not change what a script's abbreviation means."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """One line, not the whole usage before it."""
        self.exit(2, f"error: {message}\n{self.prog} --help says what there is\n")


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The command line, and each verb's own."""
    parser = _Parser(
        prog="longstride",
        description="Pretrain memory-augmented language models on long sequences, planned before the run.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 75 stopped early, 85 hung (both resumable), 130 interrupted. "
        "--debug with any verb shows tracebacks. longstride VERB --help says more.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print which longstride this is, and from where")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    train = verbs.add_parser("train", help="train a configuration, on one process or on N local ranks")
    _add_config(train)
    _add_nproc(train)
    train.add_argument("--explain", action="store_true", help="print which attention kernels would be used and why; start nothing")
    train.set_defaults(run="trainer.commands.train:train")

    resume = verbs.add_parser("resume", help="go on with a run from its newest good checkpoint")
    _add_run(resume)
    _add_overrides(resume, "settings to change, such as train.steps=400 or parallel.cp=4; others are refused")
    _add_nproc(resume)
    resume.add_argument("--allow", metavar="KEY", action="append", default=[], help="let this setting change the experiment; repeatable")
    resume.add_argument(
        "--submit",
        dest="run",
        action="store_const",
        const="slurm.submit:resubmit",
        default="trainer.commands.train:resume",
        help="as a Slurm job; options not given are those of the run's last job",
    )
    _add_job(resume)

    submit = verbs.add_parser("submit", help="plan a configuration and queue it as a Slurm job that resumes by itself")
    _add_config(submit)
    _add_job(submit)
    submit.add_argument(
        "--sweep",
        "--array",
        metavar="key=V,V",
        nargs="+",
        help="one run for every combination, as the tasks of one job array; 64k is 65536 (optim.lr=1e-3,3e-4 train.seed=0,1)",
    )
    submit.add_argument("--at-once", type=int, metavar="N", help="tasks of a sweep that run at the same time at most")
    submit.add_argument("--dry-run", action="store_true", help="print the job script; write and queue nothing")
    submit.set_defaults(run="slurm.submit:submit")

    cancel = verbs.add_parser("cancel", help="end a run's Slurm job, saved")
    _add_run(cancel)
    cancel.add_argument("--now", action="store_true", help="do not wait for the step and the checkpoint")
    cancel.set_defaults(run="slurm.commands:cancel")

    plan = verbs.add_parser("plan", help="show what a run will need and how fast it will be, without running anything")
    _add_config(plan)
    plan.add_argument("--device", help="plan for this device: cpu, h100, ... (default: this machine's)")
    plan.add_argument("--json", action="store_true", help="print the plan, or the rows of --sweep, as JSON")
    plan.add_argument("--timeline", metavar="DIR", help="write memory_plan.json and the memory timeline (PNG, HTML) into DIR")
    plan.add_argument("--optimizer", action="store_true", help="also show what kinds of parameters get: update, states, bytes, messages")
    plan.add_argument("--optimizer-rows", action="store_true", help="like --optimizer, parameter by parameter")
    plan.add_argument("--explain", action="store_true", help="show which attention kernels would be used and why, instead of the memory")
    plan.add_argument("--calibrate", action="store_true", help="first measure this machine's device (seconds); kept for later plans")
    plan.add_argument(
        "--sweep",
        metavar="key=V,V",
        nargs="+",
        help="print a fit table over all combinations; keys are settings, device and gpus; 64k is 65536 (data.seq_len=64k,1m gpus=1,8)",
    )
    plan.set_defaults(run="trainer.commands.plan:show_plan")

    runs = verbs.add_parser("runs", help="list runs and how they stand")
    _add_run(runs, nargs="?")
    runs.set_defaults(run="slurm.commands:list_runs")

    monitor = verbs.add_parser("monitor", help="watch one run: loss, speed, memory, the end of its log")
    _add_run(monitor)
    monitor.add_argument("--once", action="store_true", help="print once, as in a pipe")
    monitor.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between two looks (default: 2)")
    monitor.set_defaults(run="slurm.monitor:monitor")

    report = verbs.add_parser("report", help="one HTML page about a run, with everything in it")
    _add_run(report)
    report.add_argument("--output", metavar="FILE", help="where to write it (default: report.html in the run directory)")
    report.set_defaults(run="slurm.commands:write_report")

    evaluate = verbs.add_parser("eval", help="held-out loss of a run's checkpoint, or its accuracy on generated recall tasks")
    _add_run(evaluate)
    evaluate.add_argument("--checkpoint", type=int, metavar="STEP", help="step of the checkpoint (default: the newest good one)")
    evaluate.add_argument("--data", metavar="PATH", help="held-out data of the run's source kind (default: the run's own)")
    evaluate.add_argument("--sequences", type=int, metavar="N", help="held-out sequences (default: train.eval_sequences of the run)")
    tasks = evaluate.add_argument_group("generated tasks instead of held-out data", "see docs/evaluation.md")
    tasks.add_argument("--suite", metavar="NAME,...", help="mqar, associative, passkey ...")
    tasks.add_argument("--lengths", metavar="N,...", help="tokens of a sample, such as 1k,64k,1m (default: data.seq_len of the run)")
    tasks.add_argument(
        "--samples", type=int, metavar="N", help="samples of each length, and of each depth where depth is chosen (default: 20)"
    )
    tasks.add_argument("--depths", metavar="X,...", help="where facts stand, 0 the beginning, 1 the end (default: 0,0.25,0.5,0.75,1)")
    tasks.add_argument("--seed", type=int, metavar="N", help="other samples (default: 0)")
    tasks.add_argument(
        "--kv-gib", type=float, metavar="X", help="keys and values of full attention may take so much (default: half of what is free)"
    )
    _add_overrides(evaluate, "settings of the tasks, such as data.synthetic.pairs=16")
    evaluate.set_defaults(run="trainer.commands.evaluate:evaluate")

    clusters = verbs.add_parser("cluster", help="write documents with the clusters by which hierarchical memories fetch parameters")
    clusters.add_argument("target", metavar="FILE.jsonl", help="what to write; must not exist (FILE.centres.npz beside it neither)")
    kinds = ("python_stdlib", "text", "jsonl", "parquet", "arrow")
    clusters.add_argument("--source", choices=kinds, default="python_stdlib", help="kind of documents, as data.source")
    clusters.add_argument("--path", metavar="PATH", help="file, folder or glob that holds them, as data.path")
    clusters.add_argument("--text-field", metavar="NAME", default="text", help="column or key of the text (default: text)")
    clusters.add_argument("--branching", metavar="N,...", help="clusters that each level divides into, such as 16,16")
    clusters.add_argument("--seed", type=int, metavar="N", default=0, help="other clusters (default: 0)")
    clusters.add_argument("--like", metavar="FILE.centres.npz", help="clusters of an earlier call, such as the training data's")
    clusters.set_defaults(run="trainer.commands.cluster:cluster")

    importing = verbs.add_parser("import", help="make a directory that runs can begin from out of a Hugging Face model")
    importing.add_argument("model", metavar="MODEL_DIR", help="a local directory with config.json and safetensors")
    importing.add_argument("target", metavar="DIR", help="what to make; must not exist")
    _add_overrides(importing, "settings of the runs to come, such as data.seq_len=8192")
    importing.add_argument("--config", metavar="CONFIG", help="a YAML file, or the name of one in configs/, for all but the model")
    importing.set_defaults(run="trainer.commands.interchange:import_model")

    export = verbs.add_parser("export", help="write a checkpoint as a directory that Hugging Face's transformers loads")
    _add_run(export)
    export.add_argument("target", metavar="DIR", help="what to make; must not exist")
    export.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the newest good one)")
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (default: as the checkpoint has them)")
    export.set_defaults(run="trainer.commands.interchange:export_run")
    return parser, dict(verbs.choices)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one in configs/")
    _add_overrides(parser, "settings that override the file, such as train.steps=100")
    parser.add_argument("--help-config", action=_HelpConfig, nargs=0, help="list every key with its type, default and meaning")


def _add_overrides(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=text)


def _add_run(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("name", metavar="RUN", nargs=nargs, help="name below --root, or path, of a run directory")
    parser.add_argument("--root", default="runs", help="directory that holds runs (default: runs)")


def _add_nproc(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks to start on this machine; must equal the product of the degrees")


def _add_job(parser: argparse.ArgumentParser) -> None:
    job = parser.add_argument_group("of a Slurm job", "defaults: ~/.config/longstride/site.yaml, see docs/slurm.md")
    job.add_argument("--device", help="what the nodes compute on, for the plan: h100, a100, cpu, ...")
    job.add_argument("--nodes", type=int, metavar="N", help="nodes that share the ranks evenly")
    for option, letter, meaning in (
        ("--time", "T", "limit of one attempt, after which the run goes on in the next: 24:00:00, 2-12 (days-hours), 90 (minutes)"),
        ("--partition", "P", "nodes to choose from (sinfo lists partitions)"),
        ("--qos", "Q", "quality of service, as the cluster calls it"),
        ("--account", "A", "account to charge"),
        ("--dependency", "D", "start only then: afterok:1234, singleton, ..."),
    ):
        job.add_argument(option, metavar=letter, help=meaning)
    job.add_argument(
        "--chain",
        type=int,
        metavar="N",
        help="N jobs, each of which may start when the one before has ended: for clusters that do not requeue",
    )
    job.add_argument("--force", action="store_true", help="queue a run that does not fit by its plan")


if __name__ == "__main__":
    sys.exit(main())
