"""What memory layers cost over ranks by each way of sharing a sequence, what a pipeline of columns hides, and ARMT's diagonals.

Four tables. *Exchange*: one exchange of affine states, forward and backward, gathered or around the ring: bytes that a rank hands to
messages, beside the formulas of `memory_mgmt/cost_memory_exchange.py`, and the most memory alive. *Waiting*: the ring's pipeline with a
fixed time per whole state in place of its products (asleep), so that what is measured is the order of things and not this machine's
cores. *Layers*: forward and backward of one layer, Titans as context (MAC) among them. *ARMT*: forward and backward of a stack, one segment
after the other and by diagonals.

Ranks are gloo processes of one thread on this machine. Times are CPU seconds of the processes, summed over ranks: what is computed, not
what is waited for, since the machine was shared with other work.

  python benchmarks/memory_exchange.py            # writes memory_exchange.json and memory_exchange.md beside it
  python benchmarks/memory_exchange.py --quick    # small shapes, prints only
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import machine, where, write_results

MIB = 2**20
HEADS, KEY, VALUE = 8, 128, 128
"""Of the states that are exchanged: 512 KiB, and as much again of transitions."""
WORK = 1.6
"""Seconds per whole state in the table of waiting."""
WIDTH, SEGMENT = 256, 128
LAYERS = {
    "Gated DeltaNet": ({"kind": "gated_deltanet"}, ("states", "ring", "ulysses")),
    "Mamba-2": ({"kind": "mamba2", "mamba2": {"state_dim": 64}}, ("states", "ring", "ulysses")),
    "Titans, MLP": ({"kind": "titans"}, ("states", "ulysses")),
    "Titans as context (MAC)": ({"kind": "titans", "attach": "mac", "mac": {"segment": SEGMENT}}, ("states",)),
}
"""By name: ``model.memory``, and the exchanges that serve it."""


def run_rank(rank: int, ranks: int, tokens: int, store: str, results: Any) -> None:
    """All tables' figures of one rank of ``ranks``, or why there are none."""
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        if ranks > 1:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        found: dict[str, Any] = {"layers": _layers(ranks, tokens)}
        if ranks > 1:
            found |= {"exchange": _exchanges(ranks), "waiting": _waiting(ranks)}
        results.put((rank, found))
        if ranks > 1:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException as error:
        results.put((rank, {"failed": f"{type(error).__name__}: {error}"}))
        raise


@contextmanager
def _messages() -> Iterator[list[int]]:
    """[bytes] that this rank hands to messages inside."""
    import torch.distributed as dist

    names = ("batch_isend_irecv", "all_gather", "all_reduce", "all_to_all_single")
    before, sent = {name: getattr(dist, name) for name in names}, [0]

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "batch_isend_irecv":
                sent[0] += sum(op.tensor.nbytes for op in args[0] if op.op is dist.isend)
            else:
                sent[0] += (args[0] if name == "all_reduce" else args[1]).nbytes
            return before[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counted(name))
    try:
        yield sent
    finally:
        for name in names:
            setattr(dist, name, before[name])


def _measured(step: Callable[[], None], repeats: int = 3) -> dict[str, float]:
    """CPU seconds (median), bytes handed to messages and the most memory alive beside what was before, of one ``step``."""
    from memory_mgmt.allocator_log import record_cpu_allocations

    with _messages() as sent, record_cpu_allocations() as log:
        step()
        peak = log.peak_bytes()
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        step()
        seconds.append(time.process_time() - begin)
    return {"cpu": statistics.median(seconds), "sent": sent[0], "peak": peak}


def _exchanges(ranks: int) -> dict[str, dict[str, float]]:
    import torch
    import torch.distributed as dist

    from models.batch import Bounds
    from parallel.sequence import ranges_for
    from parallel.state_passing import RingCarry

    found, rank = {}, dist.get_rank()
    for layout in ("contiguous", "zigzag"):
        ranges = ranges_for(layout, 16 * ranks, rank, ranks)
        m = [torch.randn(1, HEADS, KEY, KEY).mul_(0.05).requires_grad_() for _ in ranges]
        e = [torch.randn(1, HEADS, KEY, VALUE).requires_grad_() for _ in ranges]
        initial = torch.zeros(1, HEADS, KEY, VALUE)
        for ring in (False, True):
            carry, bounds = RingCarry(dist.group.WORLD, layout, ring=ring), Bounds(16 * ranks, ranges, ((0,),))

            def step(carry: Any = carry, bounds: Any = bounds, m: Any = m, e: Any = e, initial: Any = initial) -> None:
                incoming, _ = carry.affine(m, e, initial, bounds)
                torch.autograd.grad([x.square().sum() for x in incoming], [*m, *e])

            found[f"{layout}, {'ring' if ring else 'states'}"] = _measured(step, 9)
    return found


def _waiting(ranks: int) -> dict[str, float]:
    """Seconds until this rank's part of a chain is done, by blocks of columns."""
    import torch
    import torch.distributed as dist

    from parallel import state_blocks
    from parallel.state_ring import STATE_TAG, _Chain

    found, state = {}, torch.zeros(KEY, VALUE)
    for blocks in (1, 4, 16):
        state_blocks.column_blocks = lambda *_, blocks=blocks: blocks
        dist.barrier()
        begin = time.monotonic()

        def moved(stop: int, columns: slice, block: Any, blocks: int = blocks) -> Any:
            time.sleep(WORK / blocks)
            return block

        _Chain.of(dist.group.WORLD, list(range(ranks)), state, STATE_TAG).run(state, moved)
        found[str(blocks)] = time.monotonic() - begin
        dist.barrier()
    return found


def _layers(ranks: int, tokens: int) -> dict[str, dict[str, float]]:
    import torch
    import torch.distributed as dist

    from models.batch import Bounds
    from models.config import MemoryModuleConfig, ModelConfig
    from models.memory.context import MemoryAsContext
    from models.memory.protocol import build_memory
    from parallel.state_passing import RingCarry

    found = {}
    for name, (settings, exchanges) in LAYERS.items():
        for exchange in exchanges if ranks > 1 else ("one process",):
            torch.manual_seed(0)
            config = ModelConfig(d_model=WIDTH, n_heads=4, layers=("memory",), memory=MemoryModuleConfig(**settings))
            module = MemoryAsContext(config) if config.memory.attach == "mac" else build_memory(config)
            with torch.no_grad():
                for p in module.parameters():
                    p.copy_(torch.randn(p.shape) * 0.05)
            rank = dist.get_rank() if ranks > 1 else 0
            bounds = Bounds.whole(1, tokens).with_ranges(((rank * tokens // ranks, (rank + 1) * tokens // ranks),))
            if ranks > 1:
                module.carry = RingCarry(dist.group.WORLD, "contiguous", ring=exchange == "ring", by_heads=exchange == "ulysses")
            x = torch.randn(1, tokens // ranks, WIDTH, requires_grad=True)

            def step(module: Any = module, x: Any = x, bounds: Any = bounds) -> None:
                module(x, None, bounds)[0].square().sum().backward()

            found[f"{name}, {exchange}"] = _measured(step)
    return found


def armt(segments: int, repeats: int = 3) -> list[dict[str, Any]]:
    """ARMT's stack on so many segments in this process, one after the other and by diagonals of 2, 4, ... of them."""
    import torch

    from models.batch import Batch, Bounds
    from models.config import ModelConfig
    from models.memory.armt import AssociativeMemory
    from models.memory.armt_diagonals import Diagonals
    from models.transformer import Transformer, init_weights

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for width, segment in ((64, 32), (256, 128)):
        memory = {"kind": "armt", "armt": {"segment": segment, "tokens": 8, "key_dim": 16}}
        given = {"d_model": width, "n_heads": 4, "layers": ("full",), "n_layers": 8, "memory": memory}
        model = Transformer(ModelConfig.model_validate(given), 64)
        init_weights(model, 0)
        text = torch.randint(64, (1, segments * segment + 1), dtype=torch.int32)
        batch = Batch(text[:, :-1], text[:, 1:], torch.zeros_like(text[:, 1:]), Bounds.whole(1, segments * segment))
        assert isinstance(model.stack, AssociativeMemory)
        for together in (1, 2, 4, 8):
            model.stack.diagonals = Diagonals(together) if together > 1 else None

            def step(model: Any = model, batch: Any = batch) -> None:
                model(batch).sum().backward()

            calls = segments * 8 if together == 1 else segments // together * (together + 7)
            rows.append({"width": width, "segment": segment, "segments": segments, "together": together, "calls": calls})
            rows[-1] |= _alone(step, repeats)
            print(rows[-1], flush=True)
    return rows


def _alone(step: Callable[[], None], repeats: int) -> dict[str, float]:
    from memory_mgmt.allocator_log import record_cpu_allocations

    with record_cpu_allocations() as log:
        step()
        peak = log.peak_bytes()
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        step()
        seconds.append(time.process_time() - begin)
    return {"cpu": statistics.median(seconds), "peak": peak}


def on_ranks(ranks: int, tokens: int) -> list[dict[str, Any]]:
    """What `run_rank` found on every rank. Raises RuntimeError where one failed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "parallel.state_passing", "models.memory.titans", "memory_mgmt.allocator_log"])
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        args = (ranks, tokens, str(Path(folder) / "store"), results)
        processes = [context.Process(target=run_rank, args=(rank, *args), daemon=True) for rank in range(ranks)]
        for process in processes:
            process.start()
        answers: dict[int, dict[str, Any]] = dict(results.get(timeout=900.0) for _ in range(ranks))
        for process in processes:
            process.join(timeout=60.0)
    failed = [found["failed"] for found in answers.values() if "failed" in found]
    if failed:
        raise RuntimeError(failed[0])
    return [answers[rank] for rank in range(ranks)]


def foretold(ranks: int, how: str) -> int:
    """Bytes that the rank with most hands to the messages of one exchange, forward and backward."""
    layout, exchange = how.split(", ")
    ranges, state, transition = 1 if layout == "contiguous" else 2, 4 * HEADS * KEY * VALUE, 4 * HEADS * KEY * KEY
    if exchange == "states":
        return ranges * (transition + state) + (ranges + 1) * state
    inner = ranks > 2
    return 2 * state * (ranges if inner else 1) if inner or layout == "zigzag" else state


def tables(report: dict[str, Any]) -> str:
    """The page for people."""
    lines = ["# Memory layers over ranks", "", f"`python benchmarks/memory_exchange.py`; {where(report['machine'], 'torch')}.", ""]
    lines += [
        "CPU seconds of all ranks together, median; other work ran on the machine, so elapsed times would say nothing. MiB of one rank, "
        "the one with most.",
        "",
        f"## One exchange of affine states ({HEADS} heads of {KEY} x {VALUE} and as large transitions, float32), forward and backward",
        "",
        "| ranks | layout | exchange | handed to messages (formula) | most memory | CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    for ranks, answers in report["ranks"].items():
        for how in answers[0].get("exchange", ()):
            each = [found["exchange"][how] for found in answers]
            sent, peak = max(one["sent"] for one in each) / MIB, max(one["peak"] for one in each) / MIB
            formula, cpu = foretold(int(ranks), how) / MIB, sum(one["cpu"] for one in each)
            lines.append(f"| {ranks} | {how.replace(', ', ' | ')} | {sent:.2f} MiB ({formula:.2f}) | {peak:.1f} MiB | {cpu:.3f} |")
    lines += [
        "",
        f"## Until the last rank is done with a chain, {WORK} s per rank and whole state (asleep); in brackets (P + k - 1) / k of it",
        "",
        "| ranks | 1 block | 4 blocks | 16 blocks |",
        "|---|---|---|---|",
    ]
    for ranks, answers in report["ranks"].items():
        if "waiting" in answers[0]:
            times = {k: max(found["waiting"][k] for found in answers) for k in answers[0]["waiting"]}
            cells = [f"{seconds:.2f} s ({WORK * (int(ranks) + int(k) - 1) / int(k):.2f})" for k, seconds in times.items()]
            lines.append(f"| {ranks} | {' | '.join(cells)} |")
    lines += [
        "",
        f"## One layer, {report['tokens']:,} tokens in all, d_model {WIDTH}, 4 heads, forward and backward",
        "",
        "| layer | ranks | exchange | CPU seconds | tokens per CPU second | handed to messages | most memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in LAYERS:
        for ranks, answers in report["ranks"].items():
            for how in answers[0]["layers"]:
                if how.rpartition(", ")[0] != name:
                    continue
                each = [found["layers"][how] for found in answers]
                cpu, peak = sum(one["cpu"] for one in each), max(one["peak"] for one in each) / MIB
                sent = max(one["sent"] for one in each) / MIB
                words = f"{cpu:.2f} | {report['tokens'] / cpu:,.0f} | {sent:.1f} MiB | {peak:.0f} MiB"
                lines.append(f"| {name} | {ranks} | {how.rpartition(', ')[2]} | {words} |")
    lines += [
        "",
        "## ARMT's diagonals (`train.diagonal_segments`), 8 layers on one core, forward and backward",
        "",
        "| d_model | segment | segments | together | calls | CPU seconds | most memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["armt"]:
        shape = f"{row['width']} | {row['segment']} | {row['segments']} | {row['together']} | {row['calls']}"
        lines.append(f"| {shape} | {row['cpu']:.2f} | {row['peak'] / MIB:.0f} MiB |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, prints only")
    quick = parser.parse_args().quick
    tokens = 256 if quick else 1024
    report: dict[str, Any] = {"machine": machine("torch"), "tokens": tokens, "ranks": {}}
    for ranks in (1, 2) if quick else (1, 2, 4):
        report["ranks"][str(ranks)] = on_ranks(ranks, tokens)
        print(f"{ranks} ranks done", flush=True)
    report["armt"] = armt(8)
    page = tables(report)
    print(page)
    if not quick:
        write_results(__file__, report, page)


if __name__ == "__main__":
    main()
