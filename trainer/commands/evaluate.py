"""The verb ``eval``: held-out loss of a checkpoint."""

from __future__ import annotations

import argparse

from trainer.commands.open_run import reload
from trainer.commands.places import find_run


def evaluate(args: argparse.Namespace) -> int:
    """``longstride eval``."""
    run_dir = find_run(args.name, args.root)
    config = reload(run_dir)

    from parallel.distributed import Env, select_device, use_threads
    from trainer.evals.perplexity import perplexity

    select_device(config.train.device, Env())
    use_threads(config.train.threads_per_rank, Env())
    print("\n".join(perplexity(run_dir, args.checkpoint, args.data, args.sequences).lines()))
    return 0
