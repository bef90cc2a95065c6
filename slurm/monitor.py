"""``longstride monitor RUN``: one run, live on a terminal, once elsewhere. Imports no torch."""

from __future__ import annotations

import argparse
import sys
import time

from models.errors import UserError
from slurm.commands import UNFINISHED, with_jobs
from trainer import monitor_view, runs_table
from trainer.commands.places import find_run
from trainer.run_dir import RunDir

LOOKS_PER_QUEUE_LOOK = 5
"""Files are read at every look; Slurm's controller, which many people share, is asked less often."""


def monitor(args: argparse.Namespace) -> int:
    """Show the run; live until it has ended or Ctrl-C, which ends only the view."""
    if not 0.1 <= args.every <= 3600:
        raise UserError("--every: give seconds between 0.1 and 3600")
    run_dir = find_run(args.name, args.root)
    if args.once or not sys.stdout.isatty():
        print(monitor_view.plain(monitor_view.view(with_jobs([runs_table.read_run(run_dir.path)])[0])))
        return 0
    _live(run_dir, args.every)
    return 0


def _live(run_dir: RunDir, every_seconds: float) -> None:
    from rich.live import Live

    row = with_jobs([runs_table.read_run(run_dir.path)])[0]
    with Live(monitor_view.render(monitor_view.view(row)), auto_refresh=False) as live:
        look = 0
        while row.status in (*UNFINISHED, "starting"):
            try:
                time.sleep(every_seconds)
            except KeyboardInterrupt:
                return
            look += 1
            fresh = runs_table.read_run(run_dir.path)
            row = with_jobs([fresh])[0] if look % LOOKS_PER_QUEUE_LOOK == 0 else fresh
            live.update(monitor_view.render(monitor_view.view(row)), refresh=True)
