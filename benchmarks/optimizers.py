"""Processor time, bytes and temporary bytes of every preset's step beside other packages' optimizers, all in one process.

Small: every parameter of a byte-level LLaMA of 857,216 parameters; wide: three matrices of 1024 to 2048. Gradients are recorded from
training runs on the source text of Python's own library. Everything is one thread's processor time, systems take turns, the least of the
rounds counts: on a machine with other work that is stable where medians of wall time are not. "Renewal" is what making every projection
anew adds to a step. State bytes are those of every tensor the optimizer can reach, by storage; temporary bytes the most that a step holds
at one moment in torch's allocator. A peer that does not run is listed with its error.

  python -m pip install --no-deps --target peers -r benchmarks/optimizer_peers.txt
  python benchmarks/optimizers.py --peers peers            # about 10 minutes; writes optimizers.json and optimizers.md beside it
  python benchmarks/optimizers.py --peers peers --quick    # the small workload alone, fewer rounds, prints only

Exit code 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]  # run as a script, not as a module

import torch  # noqa: E402
from common import machine, write_results  # noqa: E402
from optimizer_measures import decoder, measured, recorded, renewal, worst_step  # noqa: E402
from optimizer_peers import PRESETS, Workload, ours, systems  # noqa: E402
from optimizers_report import goals, markdown  # noqa: E402
from torch import nn  # noqa: E402

from models.config import ModelConfig  # noqa: E402
from models.transformer import Transformer  # noqa: E402
from optim.build import build_optimizer, quantise_matrices_  # noqa: E402
from optim.config import READ  # noqa: E402
from optim.plan import plan  # noqa: E402

PACKAGES = ("galore-torch", "apollo-torch", "bitsandbytes", "torchao", "pytorch_optimizer", "q-galore-torch", "lomo-optim", "transformers")
WIDE = ("mixer.wq.weight", "ffn.w_up.weight", "ffn.w_down.weight")
SPIKES = {"small": ((25, 3), (200, 3)), "wide": ((30, 2),)}
"""Workload -> (gap, cycles) in which the worst step is looked for."""
SPIKING = {
    "small": [name for name in PRESETS if not {"update_gap", "root_gap"}.isdisjoint(READ.get(name, ()))],
    "wide": ["galore", "fira", "apollo"],
}
"""Workload -> presets in which it is looked for: those that make something anew; of wide matrices those of different kind."""


def small() -> Workload:
    """The small LLaMA, gradients 25 steps apart."""
    model = decoder(128, 344, 4, 4)
    gradients = recorded(model, 16, 128, 25, 8)
    return Workload("small", model, 32, gradients)


def wide() -> Workload:
    """A 1024 x 1024, a 2048 x 1024 and a 1024 x 2048 matrix of a decoder of one layer, gradients 10 steps apart."""
    trained = decoder(1024, 2048, 1, 8)
    names = {name.replace(".", "_").removesuffix("_weight"): f"blocks.0.{name}" for name in WIDE}
    gradients = [{f"{new}.weight": one[old] for new, old in names.items()} for one in recorded(trained, 8, 128, 10, 4)]
    weights = dict(trained.named_parameters())
    model = nn.ModuleDict({new: nn.Linear(*reversed(weights[old].shape), bias=False) for new, old in names.items()})
    for new, old in names.items():
        model[new].load_state_dict({"weight": weights[old].detach()})
    return Workload("wide", model, 256, gradients)


def published_shapes() -> list[dict[str, Any]]:
    """State bytes per parameter of a LLaMA of 1B (GaLore's configuration: rank 512), by storage on the meta device."""
    shape = ModelConfig(d_model=2048, d_ff=5461, n_layers=24, n_heads=32, layers=("full",))
    rows = []
    for preset in PRESETS:
        with torch.device("meta"):
            model = Transformer(shape, 32_000)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if preset == "q_galore":
            quantise_matrices_(model)
        rank: dict[str, Any] = {"rank": 512} if "rank" in READ.get(preset, ()) and preset != "apollo_mini" else {}
        of_all = plan(build_optimizer(model, preset=preset, **rank))
        held, planned = sum(row.measured_bytes or 0 for row in of_all), sum(row.planned_bytes for row in of_all)
        rows.append({"preset": preset, "parameters": parameters, "state_bytes": held, "planned_bytes": planned})
    return rows


def packages() -> dict[str, str | None]:
    """Versions; None where a package is not there."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def measure(quick: bool) -> dict[str, Any]:
    """The whole report."""
    report: dict[str, Any] = {"machine": machine("torch"), "packages": packages(), "workloads": [], "renewals": [], "worst": []}
    for make, rounds, renewals in [(small, 15, 5)] if quick else [(small, 40, 10), (wide, 15, 3)]:
        workload = make()
        rows = measured(systems(), workload, rounds, renewals)
        report["workloads"].append({"name": workload.name, "parameters": workload.parameters, "rank": workload.rank, "rows": rows})
        report["renewals"].append(renewal(rows, workload, renewals))
        for gap, cycles in SPIKES[workload.name][: 1 if quick else None]:
            spiking = [ours(preset, preset) for preset in SPIKING[workload.name]]
            report["worst"] += [{"workload": workload.name, **worst_step(system, workload, gap, cycles)} for system in spiking]
    report["llama_1b"] = published_shapes()
    report["goals"] = goals(report)
    return report


def main() -> int:
    """Measure, print, write; exit code 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder that the peers were installed to (pip's --target)")
    parser.add_argument("--quick", action="store_true", help="the small workload alone, fewer rounds, prints only")
    arguments = parser.parse_args()
    if arguments.peers is not None:
        if not arguments.peers.is_dir():
            print(f"error: --peers {arguments.peers} is not a folder; install them as the first lines of this script say", file=sys.stderr)
            return 2
        sys.path.append(str(arguments.peers.resolve()))
    torch.set_num_threads(1)  # threads that wait for one another on a busy machine would be timed too
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # what compiles does so here and now, as on a fresh machine
        report = measure(arguments.quick)
    print(text := markdown(report))
    if not arguments.quick:
        write_results(__file__, report, text)
    return 0 if all(goal["met"] for goal in report["goals"]) else 1


if __name__ == "__main__":
    sys.exit(main())
