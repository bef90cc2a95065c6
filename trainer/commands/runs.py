"""The verb ``runs``. Imports no torch."""

from __future__ import annotations

import argparse

from trainer import runs_table
from trainer.commands.places import find_run


def list_runs(args: argparse.Namespace) -> int:
    """``longstride runs``."""
    rows = runs_table.read_runs(find_run(args.name, args.root).path if args.name else args.root)
    if rows:
        runs_table.render(rows)
    else:
        print(f"no runs in {args.root}")
    return 0
