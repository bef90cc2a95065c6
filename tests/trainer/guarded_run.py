"""Whole small runs inside a test process, with faults put into chosen data: what guards are tested with."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch.distributed as dist

from models.batch import Batch
from models.errors import RunFailed
from trainer import build, config_file, passed_over
from trainer import engine as engine_module
from trainer.commands.open_run import checked_plan, open_run, reload
from trainer.commands.places import HOME
from trainer.data.build import build_data, prepare
from trainer.passed_over import PassedOver
from trainer.run_dir import RunDir

SMALL = [
    "data.source=jsonl",
    "data.seq_len=32",
    "model.d_model=16",
    "model.n_heads=2",
    "model.window=16",
    "model.layers=[full,memory]",
    "train.device=cpu",
]


def make_run(folder: Path, name: str, *settings: str) -> RunDir:
    """A new run directory in ``folder``, with data and a plan, not started."""
    text = folder / "text.jsonl"
    if not text.exists():
        lines = [" ".join(f"to be {n * 7919 + i * 104729} or not" for i in range(3 + n % 5)) for n in range(60)]  # no two sequences alike
        text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    places = [f"run.root={folder}", f"run.name={name}", f"data.path={text}", f"data.cache_dir={folder / 'tokens'}"]
    fixed = ["train.eval_sequences=0", "memory.plan=estimate", "train.threads_per_rank=1", "data.tokenize_workers=1"]
    config = config_file.resolve(HOME / "configs" / "debug_cpu.yaml", [*SMALL, *places, *fixed, *settings])
    prepare(config)
    return open_run(config, None, name, checked_plan(config, None))


def train(run_dir: RunDir, resume: bool = False) -> str:
    """Train on this rank; empty when all steps were done, else why not."""
    try:
        return "" if build.train(reload(run_dir), run_dir.path, resume) == 0 else "stopped"
    except RunFailed as error:
        return str(error)


def go_on(folder: str) -> str:
    """``train`` on a rank of its own: begin or go on, and print nothing."""
    with redirect_stdout(io.StringIO()):
        return train(RunDir(folder), resume=True)


@contextmanager
def faults(run_dir: RunDir, factors: dict[int, float], on_rank: int | None = None) -> Iterator[None]:
    """The loss of the data of the n-th step (from 0, of all data in their order) is multiplied by ``factors[n]``, on one rank or all."""
    config = reload(run_dir)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    dp = config.parallel.dp_shard * config.parallel.dp_replicate
    with build_data(config, rank * dp // size, dp).train(None) as steps:
        tokens = [[batch.tokens_BT.numpy().tobytes() for batch in next(steps)[0]] for _ in range(max(factors, default=0) + 1)]
    bad = {row: factor for number, factor in factors.items() for row in tokens[number]} if on_rank in (None, rank) else {}
    real = engine_module.Engine._shard
    real_forward = engine_module.forward
    current: dict[str, float] = {}

    def shard(self: Any, batch: Batch) -> Batch:
        found = real(self, batch)
        current[id(found)] = bad.get(batch.tokens_BT.numpy().tobytes(), 1.0)  # type: ignore[index]
        return found

    def forward(model: Any, shard: Batch, *more: Any) -> Any:
        factor = current.get(id(shard), 1.0)  # type: ignore[call-overload]
        nll = real_forward(model, shard, *more)
        return nll if factor == 1.0 else nll * factor

    engine_module.Engine._shard, engine_module.forward = shard, forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine_module.Engine._shard, engine_module.forward = real, real_forward  # type: ignore[method-assign]


def records(run_dir: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]


def trajectory(run_dir: RunDir) -> list[tuple[int, str, str, int]]:
    """Of each training step: loss and gradient norm in every bit, and the sequences consumed after it."""
    return points(records(run_dir))


def points(records: Sequence[dict[str, Any]]) -> list[tuple[int, str, str, int]]:
    """``trajectory`` of lines of metrics.jsonl."""
    train = [record for record in records if record["split"] == "train"]
    return [(r["step"], float(r["loss"]).hex(), float(r["grad_norm"]).hex(), r["data_cursor"]["sequences"]) for r in train]


def entries(run_dir: RunDir) -> list[PassedOver]:
    return passed_over.read(run_dir.passed_over)
