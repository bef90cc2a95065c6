"""How long ranks wait where a memory's state goes from rank to rank, with one and with several sequences in flight.

Claim measured: with M sequences of a micro-batch one behind the other (`models/memory/sequential.py`), P ranks are idle for about
(P - 1) w / (L M (w + r) + (P - 1) w) of a step, w of writing and r of reading per layer and sequence, instead of
(P - 1) w / (L (w + r) + (P - 1) w) with all sequences as one.

Ranks are gloo processes that run the layers of the product (`slots`, forward and backward). Arithmetic is tiny; in its place writing and
reading take a fixed time per sequence (asleep), so that what is measured is the order of things and not this machine's cores.

  python benchmarks/wavefront.py            # six minutes; writes wavefront.json and wavefront.md beside it
  python benchmarks/wavefront.py --quick    # prints only
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import write_results

WRITE, READ = 0.4, 0.4
"""Seconds per layer and sequence, in each direction."""
SEGMENT, WIDTH = 4, 8


def run_rank(rank: int, ranks: int, layers: int, rows: int, together: bool, store: str, results: Any) -> None:
    """One step of ``layers`` layers on ``rows`` sequences; puts (rank, seconds at work, seconds in all)."""
    import torch
    import torch.distributed as dist

    from models.batch import Bounds
    from models.memory import sequential
    from models.memory.slots import GatedSlots
    from parallel.state_passing import RingCarry

    busy, pace = [0.0], [1.0]

    class Pause(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
            ctx.seconds = seconds
            rest(seconds)
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
            rest(ctx.seconds)
            return grads[0], None

    def rest(seconds: float) -> None:
        begin = time.monotonic()
        time.sleep(pace[0] * seconds)
        busy[0] += time.monotonic() - begin

    class Paced(GatedSlots):
        def rewrite(self, plan: Any, n: int, weights: Any, state_BmD: Any, streams: Any) -> Any:
            return Pause.apply(super().rewrite(plan, n, weights, state_BmD, streams), WRITE * len(state_BmD))

        def read(self, *args: Any) -> Any:
            y_BTC = super().read(*args)
            return Pause.apply(y_BTC, READ * len(y_BTC))

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    if together:
        sequential.in_flight = lambda rows, ranks: [(0, rows)]
    torch.manual_seed(0)
    stack = [Paced(WIDTH, 1, WIDTH, 4, SEGMENT, False, 1e-5) for _ in range(layers)]
    for layer in stack:
        layer.carry = RingCarry(dist.group.WORLD, "contiguous")
        for p in layer.parameters():
            torch.nn.init.normal_(p, std=0.2)
    bounds = Bounds.whole(rows, ranks * SEGMENT).with_ranges(((rank * SEGMENT, (rank + 1) * SEGMENT),))
    x = torch.randn(rows, SEGMENT, WIDTH, requires_grad=True)

    def step() -> None:
        y = x
        for layer in stack:
            y = y + layer(y, None, bounds)[0]
        y.square().sum().backward()

    pace[0] = 0.0  # what is done for the first time takes its time
    step()
    pace[0], busy[0] = 1.0, 0.0
    dist.barrier()
    begin = time.monotonic()
    step()
    dist.barrier()
    results.put((rank, busy[0], time.monotonic() - begin))
    dist.destroy_process_group()


def idle(ranks: int, layers: int, rows: int, together: bool) -> float:
    """Share of their time that ranks waited, on average."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "parallel.state_passing", "models.memory.slots"])
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        args = (ranks, layers, rows, together, store, results)
        processes = [context.Process(target=run_rank, args=(rank, *args), daemon=True) for rank in range(ranks)]
        for process in processes:
            process.start()
        answers = [results.get(timeout=300.0) for _ in range(ranks)]
        for process in processes:
            process.join(timeout=30.0)
    return 1 - sum(busy for _, busy, _ in answers) / sum(whole for _, _, whole in answers)


def foretold(ranks: int, layers: int, groups: int) -> float:
    """The share by the formula of the module."""
    waited = (ranks - 1) * WRITE
    return waited / (layers * groups * (WRITE + READ) + waited)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one case, prints only")
    cases = [(2, 2, 4)] if parser.parse_args().quick else [(2, 2, 4), (4, 2, 1), (4, 2, 4), (4, 2, 8), (4, 4, 4)]
    rows: list[dict[str, Any]] = []
    for ranks, layers, sequences in cases:
        groups = min(sequences, 2 * ranks)
        row = {"ranks": ranks, "layers": layers, "sequences": sequences}
        row |= {"as_one": idle(ranks, layers, sequences, True), "as_one_foretold": foretold(ranks, layers, 1)}
        row |= {"in_flight": idle(ranks, layers, sequences, False), "in_flight_foretold": foretold(ranks, layers, groups)}
        rows.append(row)
        print(row, flush=True)
    lines = [
        "# Waiting of ranks where a memory's state goes from rank to rank",
        "",
        "Share of a step (forward and backward) in which ranks wait; `python benchmarks/wavefront.py`. Writing and reading are "
        f"{1000 * WRITE:.0f} ms asleep per layer and sequence and direction; in brackets the formula.",
        "",
        "| ranks | layers | sequences | all as one | in flight |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        shares = [f"{row[key]:.1%} ({row[key + '_foretold']:.1%})" for key in ("as_one", "in_flight")]
        lines.append(f"| {row['ranks']} | {row['layers']} | {row['sequences']} | {shares[0]} | {shares[1]} |")
    if len(cases) > 1:
        write_results(__file__, rows, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
