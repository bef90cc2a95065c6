"""A process that plans an optimizer and ends: reads a request as JSON, writes an ``OptimizerPlan`` as JSON (``trainer/optimizer_plan.py``).
Exit code 2: the optimizer refuses the model, with the reason on stderr."""

from __future__ import annotations

import dataclasses
import json
import sys

import torch

from models.transformer import Transformer
from optim.build import quantise_matrices_
from optim.plan import PlannedParameter, planned, table, table_by_kind
from parallel.tensor_parallel import leave_parts
from trainer.config import RunConfig


def rows_of(config: RunConfig, vocab_size: int, shards: int, tp: int = 1) -> list[PlannedParameter]:
    """Of the first of ``shards`` ranks that share the parameters, or one of ``tp`` parts of them: no other has more."""
    with torch.device("meta"):
        model = Transformer(config.model, vocab_size)
        if tp > 1:
            leave_parts(model, 0, tp)
    if config.optim.bfloat16_weights:
        model = model.bfloat16()
    if config.optim.kept_weights == "int8_stochastic":
        quantise_matrices_(model)
    return planned(model.double() if config.train.precision == "fp64" else model, config.optim, shards)


def main() -> int:
    """Answer one request. Returns the exit code."""
    request = json.load(sys.stdin)
    try:
        rows = rows_of(RunConfig.model_validate(request["config"]), request["vocab_size"], request["shards"], request["tp"])
    except ValueError as refused:
        print(refused, file=sys.stderr)
        return 2
    json.dump(
        {
            "bytes": sum(row.planned_bytes for row in rows),
            "by_kind": table_by_kind(rows),
            "by_parameter": table(rows),
            "rows": [dataclasses.asdict(row) for row in rows],
        },
        sys.stdout,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
