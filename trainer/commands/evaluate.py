"""The verb ``eval``: held-out loss of a checkpoint, or suites of generated tasks."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from models.errors import UserError
from parallel.distributed import environment
from trainer.commands.open_run import reload
from trainer.commands.places import find_run
from trainer.commands.terminal import progress
from trainer.config import RunConfig
from trainer.run_dir import RunDir
from trainer.sweep import expanded

_OF_SUITES = ("lengths", "samples", "depths", "seed", "kv_gib", "overrides")
_OF_LOSS = ("sequences",)


def evaluate(args: argparse.Namespace) -> int:
    """``longstride eval``."""
    run_dir = find_run(args.name, args.root)
    config = reload(run_dir)
    _refuse_foreign(args)

    from parallel.distributed import Env, select_device, use_threads

    select_device(config.train.device, Env())
    use_threads(config.train.threads_per_rank, Env())
    if args.suite is not None:
        return _suites(args, run_dir, config)

    from trainer.evals.perplexity import perplexity

    print("\n".join(perplexity(run_dir, args.checkpoint, args.data, args.sequences).lines()))
    return 0


def _refuse_foreign(args: argparse.Namespace) -> None:
    foreign = _OF_SUITES if args.suite is None else _OF_LOSS
    for name in foreign:
        if getattr(args, name) not in (None, []):
            said = "key=value" if name == "overrides" else f"--{name.replace('_', '-')}"
            raise UserError(f"{said}: is read {'only with' if args.suite is None else 'without'} --suite; leave it out")
    if args.suite is not None and args.data is not None and "position" not in args.suite.split(","):
        raise UserError("--data: is read by the suite position and without --suite; leave it out")
    if environment().world_size > 1:
        raise UserError("longstride eval runs on one process, also for runs of many ranks: start it without torchrun or srun -n")


def _suites(args: argparse.Namespace, run_dir: RunDir, config: RunConfig) -> int:
    from trainer.evals import positions, report, suites

    if config.data.bidirectional_prefixes:
        raise UserError(
            "--suite: reads sequences chunk by chunk, in one direction, and this run's attention sees prefixes whole (data.prefix_mask "
            "bidirectional); leave --suite out for the held-out loss, or train with data.prefix_mask=causal"
        )
    if config.data.cluster_key is not None:
        raise UserError(
            "--suite: its samples have no clusters, by which this run's layers fetch parameters (data.cluster_key); "
            "leave --suite out for the held-out loss"
        )
    request = suites.Request(
        tasks=suites.tasks_of(args.suite.split(",")),
        lengths=_lengths(args.lengths) if args.lengths else (config.data.seq_len,),
        depths=_depths(args.depths) if args.depths else suites.Request.depths,
        samples=20 if args.samples is None else args.samples,
        seed=args.seed or 0,
        overrides=tuple(args.overrides),
    )
    if request.samples < 1:
        raise UserError(f"--samples: {request.samples} is none; give 1 or more")
    tasks = suites.build_tasks(request, config)
    kept = None if args.kv_gib is None else int(args.kv_gib * 2**30)
    reader, step, device = suites.open_model(run_dir, config, args.checkpoint, kept)
    print(f"{run_dir.path}, step {step}; answered: {report.METHOD}")
    facts = {"run": run_dir.name, "step": step, "device": str(device)}

    def keep(name: str, lines: list[str], record: dict[str, Any], picture: bytes) -> None:
        path = report.write(run_dir.path / "evals", f"{name}_step_{step}", record, picture)
        print("\n".join(lines), f"  {shlex.quote(str(path))} and {path.stem}.png", sep="\n", flush=True)

    for task, settings in tasks:
        with _shown() as shown:
            result = suites.measure(reader, task, settings, request, device, shown)
        record = report.content(result, **facts, seed=request.seed, samples=request.samples)
        title = f"{result.task}, step {step} of {run_dir.name}\nanswered; guessing {result.chance:.2g}"
        keep(result.task, report.lines(result), record, report.heat_map(result, title))
    if suites.POSITION in request.tasks:
        documents = partial(positions.long_documents, config, args.data, count=request.samples)
        result = positions.loss_by_position(reader, lambda length: documents(length=length), request.lengths, device)
        title = f"loss by position, step {step} of {run_dir.name}"
        keep(result.task, positions.lines(result), positions.content(result, **facts), positions.picture(result, title))
    return 0


@contextlib.contextmanager
def _shown() -> Iterator[Callable[[str], Callable[[int, int], None] | None]]:
    """Progress bars, one after the other, on a terminal."""
    with contextlib.ExitStack() as stack:
        yield lambda text: stack.enter_context(progress(text)) if sys.stderr.isatty() else None


def _lengths(words: str) -> tuple[int, ...]:
    """``1k,64k,1m`` as numbers of tokens, ascending."""
    found = []
    for word in words.split(","):
        try:
            number = expanded(word.strip())
        except UserError:  # 1.3k
            number = ""
        if not number.isdecimal() or not 0 < int(number) <= 2**30:
            raise UserError(f"--lengths: {word!r} is no number of tokens; for example 1k,64k,1m")
        found.append(int(number))
    return tuple(sorted(set(found)))


def _depths(words: str) -> tuple[float, ...]:
    try:
        found = sorted({float(word) for word in words.split(",")})
    except ValueError:
        found = [-1.0]
    if not all(0 <= depth <= 1 for depth in found):
        raise UserError(f"--depths: {words!r} are not numbers from 0 (the beginning) to 1 (the end); for example 0,0.5,1")
    return tuple(found)
