"""Validation loss against optimizer state: every preset with two learning rates swept, the baseline as hard as the others.

A small byte-level language model is trained on novels for a fixed number of steps with every preset. The rate of the matrices of hidden
layers and the rate of everything else (embedding, head, norms) are swept apart for each, AdamW included: three by two rates around the
papers' values, and further as long as the best has an untried neighbour in either direction. All are judged at the end of the decay on a
novel that no run has seen; the best rates of each are run with three seeds. A difference is called one only where it exceeds the sum of
both ranges over seeds.

Runs are kept one by one in optimizer_quality.jsonl beside this script: whatever ends it, the next call does only what is missing. It takes
about 75 CPU seconds for a run and 15 runs for a preset.

  python benchmarks/optimizer_quality.py                 # all that is missing, the most important presets first
  python benchmarks/optimizer_quality.py --only apollo   # one row of the table
  python benchmarks/optimizer_quality.py --list          # what has been run, what would be next
  python benchmarks/optimizer_quality.py --report        # writes optimizer_quality.md and optimizer_quality.png from the runs so far
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]  # run as a script, not as a module

import torch  # noqa: E402
from common import machine  # noqa: E402
from optimizer_quality_run import Protocol, Text, train  # noqa: E402
from optimizer_quality_sweep import SEEDS, Entry, Point, Runs, entries, next_point  # noqa: E402


def main() -> int:
    """Run what is missing, or say what is there; exit code 2 where the text or the results cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="ROW", action="append", help="only this row of the table (--list names them); may be repeated")
    parser.add_argument("--list", action="store_true", help="what has been run, what would be next")
    parser.add_argument("--report", action="store_true", help="write the page and the picture from the runs so far")
    parser.add_argument("--minutes", type=float, help="start no further run after so many minutes")
    parser.add_argument("--books", type=Path, default=ROOT.parent / "shared" / "data" / "books", help="folder of the novels")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="file of the runs")
    arguments = parser.parse_args()
    known = entries()
    unknown = sorted(set(arguments.only or ()) - {entry.name for entry in known})
    if unknown:
        print(f"error: --only {', '.join(unknown)} is unknown; known: {', '.join(entry.name for entry in known)}", file=sys.stderr)
        return 2
    chosen = [entry for entry in known if not arguments.only or entry.name in arguments.only]
    protocol = Protocol()
    try:
        runs = Runs.read(arguments.results, protocol.as_json())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.list:
        print(runs.listing(chosen))
        return 0
    if arguments.report:
        return _report(runs, known)
    try:
        text = Text(arguments.books, protocol)
    except FileNotFoundError as error:
        print(f"skipped: {error}; point --books to them")
        return 0
    torch.set_num_threads(1)  # one run is one core; threads that wait for one another on a busy machine cost more than they save
    return _run_missing(runs, chosen, text, protocol, arguments.minutes)


def _report(runs: Runs, known: list[Entry]) -> int:
    from optimizer_quality_report import write_report  # needs matplotlib, which running does not

    try:
        print(write_report(runs, known, Path(__file__).resolve().parent))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run_missing(runs: Runs, chosen: list[Entry], text: Text, protocol: Protocol, minutes: float | None) -> int:
    started, where = time.monotonic(), machine("torch")
    while (point := next_point(runs, chosen)) is not None:
        if minutes is not None and time.monotonic() - started > 60 * minutes:
            print("time is up; call again to go on")
            return 0
        result = _run(point, text, protocol)
        runs.add(point, result, where)
        print(f"{point.describe()}: {result['loss'] or 'diverged'} ({result['cpu_seconds']} CPU s)", flush=True)
    print(f"nothing is missing: every row is swept and its best rates have {SEEDS} seeds")
    return 0


def _run(point: Point, text: Text, protocol: Protocol) -> dict[str, Any]:
    entry = point.entry
    config = protocol.config(entry.preset, entry.settings_for(asdict(protocol)), point.lr, point.rest_lr)
    return train(text, protocol, config, point.seed)


if __name__ == "__main__":
    sys.exit(main())
