"""What a training step holds in memory under torch's CPU allocator and under the arena, and what an allocation costs, on this machine.

Claims measured: growth of peak resident memory during steps, without and with recomputation of every block; seconds per step; nanoseconds
of ``torch.empty(4096)``. Four-layer decoder (torch.nn modules, d_model 512, 8 heads, feed-forward 1408, vocabulary 8000), 2 rows of 512
tokens, fp32, fused AdamW, one thread. Every case is a fresh process with the same seed; losses of all steps are compared and must be
equal bit for bit.

All cases take the same steps: 4 to warm up (optimizer states exist; the arena watches them and plans), then what is free, the C library's
heap and the arena's region, is given back to the system and the measured steps begin: growth is what a step needs on top of weights,
optimizer states and code. The last column counts everything from before the model, the warm-up with its steps that the arena watches
(served by the normal allocator) included. Times are those of the fastest step; CPU seconds hardly move with other load on the machine.

  python benchmarks/arena_step.py            # about 5 minutes; writes arena_step.json and arena_step.md beside it
  python benchmarks/arena_step.py --quick    # 2 measured steps, prints only
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, not as a module

from benchmarks.common import machine, python, where, write_results  # noqa: E402

D_MODEL, HEADS, D_FF, LAYERS, VOCAB = 512, 8, 1408, 4, 8000
ROWS, TOKENS = 2, 512
WARM_UP = 4
SYSTEMS = {
    "default": "torch's allocator",
    "returned": "torch's allocator, freed blocks given back at once (memory_mgmt/host_allocator.py)",
    "arena": "arena",
}
GOALS = {"none": 0.75, "block": 0.50}
"""Resident growth with the arena over torch's allocator: at most this."""
ALLOCATIONS = 20_000


def build_model(recompute: bool) -> Any:
    """The decoder; ``model(tokens_BT, labels_BT)`` is the mean loss."""
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.checkpoint import checkpoint

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.RMSNorm(D_MODEL), nn.RMSNorm(D_MODEL)
            self.wqkv = nn.Linear(D_MODEL, 3 * D_MODEL, bias=False)
            self.wo = nn.Linear(D_MODEL, D_MODEL, bias=False)
            self.gate, self.up = nn.Linear(D_MODEL, D_FF, bias=False), nn.Linear(D_MODEL, D_FF, bias=False)
            self.down = nn.Linear(D_FF, D_MODEL, bias=False)

        def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
            rows, tokens, _ = x_BTC.shape
            heads = (part.view(rows, tokens, HEADS, -1).transpose(1, 2) for part in self.wqkv(self.norm1(x_BTC)).chunk(3, dim=-1))
            mixed_BHTD = F.scaled_dot_product_attention(*heads, is_causal=True)
            x_BTC = x_BTC + self.wo(mixed_BHTD.transpose(1, 2).reshape(rows, tokens, D_MODEL))
            h_BTC = self.norm2(x_BTC)
            return x_BTC + self.down(F.silu(self.gate(h_BTC)) * self.up(h_BTC))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCAB, D_MODEL)
            self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
            self.norm, self.head = nn.RMSNorm(D_MODEL), nn.Linear(D_MODEL, VOCAB, bias=False)

        def forward(self, tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
            x_BTC = self.embed(tokens_BT)
            for block in self.blocks:
                x_BTC = checkpoint(block, x_BTC, use_reentrant=False) if recompute else block(x_BTC)
            return F.cross_entropy(self.head(self.norm(x_BTC)).flatten(0, 1), labels_BT.flatten())

    torch.manual_seed(0)
    return Decoder()


def run_step_case(system: str, recompute: str, steps: int) -> dict[str, Any]:
    """Losses, seconds and resident growth of one case, in this process."""
    import torch

    from memory_mgmt.arena import Arena, arena_step
    from memory_mgmt.host_allocator import return_freed_memory
    from memory_mgmt.monitor import MemoryMonitor

    if system == "returned" and not return_freed_memory():
        raise RuntimeError("this C library cannot be told to give freed blocks back")
    torch.set_num_threads(1)  # threads that wait for one another on a busy machine would be timed too
    device = torch.device("cpu")
    whole = MemoryMonitor(device)
    model = build_model(recompute == "block")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(1)
    tokens_BT, labels_BT = (torch.randint(VOCAB, (ROWS, TOKENS), generator=generator) for _ in range(2))
    arena = Arena() if system == "arena" else None
    losses: list[float] = []

    def step() -> tuple[float, float]:
        started, cpu_started = time.perf_counter(), time.process_time()
        with arena_step(arena, "train"):
            loss = model(tokens_BT, labels_BT)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            del loss
            optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started, time.process_time() - cpu_started

    for _ in range(WARM_UP):
        step()
    gc.collect()
    if arena is not None:
        arena.give_back()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    warm_up_peak = whole.peak_bytes()
    monitor = MemoryMonitor(device)
    seconds, cpu_seconds = zip(*(step() for _ in range(steps)), strict=True)
    growth = monitor.peak_bytes()
    result: dict[str, Any] = {
        "losses": losses,
        "step_seconds": seconds,
        "step_cpu_seconds": cpu_seconds,
        "growth_bytes": growth,
        "growth_with_warm_up_bytes": max(whole.peak_bytes(), warm_up_peak),
        "measured_by": monitor.source,
    }
    if arena is not None:
        height, bound = arena.height_bytes(("train",)) or (0, 0)
        result |= {"plan_height_bytes": height, "plan_lower_bound_bytes": bound, **vars(arena.stats)}
    return result


def run_allocation_case(rounds: int) -> dict[str, Any]:
    """CPU nanoseconds per ``torch.empty(4096)``, made and freed: not installed, installed and off, served. Best of interleaved rounds."""
    import torch

    from memory_mgmt.arena import Arena
    from memory_mgmt.arena_native import uninstall

    torch.set_num_threads(1)

    def nanoseconds() -> float:
        started = time.thread_time_ns()
        for _ in range(ALLOCATIONS):
            torch.empty(4096)
        return (time.thread_time_ns() - started) / ALLOCATIONS

    found: dict[str, list[float]] = {"default": [], "installed_off": [], "served": []}
    for _ in range(rounds):
        found["default"] += [nanoseconds() for _ in range(5)]
        arena = Arena()
        for _ in range(2):
            with arena.step():
                nanoseconds()
        for _ in range(5):
            found["installed_off"].append(nanoseconds())
            with arena.step():
                found["served"].append(nanoseconds())
        assert arena.stats.served == 5 * ALLOCATIONS
        arena.close()
        assert uninstall()
    return {name: min(values) for name, values in found.items()}


def in_fresh_process(kind: str, *arguments: str) -> dict[str, Any]:
    """Run one case in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    said, failure = python(Path(__file__).resolve(), "--child", kind, *arguments, environment=environment)
    if failure:
        raise SystemExit(f"{kind} {' '.join(arguments)}: {failure}")
    return json.loads(said.splitlines()[-1])


def ratios(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arena over torch's allocator, for both settings of recomputation."""
    by_case = {(case["system"], case["recompute"]): case for case in cases}
    rows = []
    for recompute, goal in GOALS.items():
        ours, theirs = by_case["arena", recompute], by_case["default", recompute]
        rows.append(
            {
                "recompute": recompute,
                "growth_ratio": ours["growth_bytes"] / theirs["growth_bytes"],
                "goal": goal,
                "step_seconds_ratio": min(ours["step_seconds"]) / min(theirs["step_seconds"]),
                "cpu_seconds_ratio": min(ours["step_cpu_seconds"]) / min(theirs["step_cpu_seconds"]),
                "losses_identical": all(by_case[system, recompute]["losses"] == theirs["losses"] for system in SYSTEMS),
            }
        )
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    here, mib = report["machine"], 2**20
    lines = [
        "# A training step under torch's CPU allocator and under the arena",
        "",
        f"{where(here, 'torch')}, {here['libc']}; load average {here['load_average_at_start']} before. Made by "
        "`python benchmarks/arena_step.py`, whose first lines say what is measured.",
        "",
        "| recompute | system | growth in steps | plan / lower bound | step, wall / CPU | served | not served | growth with warm-up |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case in report["cases"]:
        plan = served = missed = ""
        if case["system"] == "arena":
            plan = f"{case['plan_height_bytes'] / mib:.1f} / {case['plan_lower_bound_bytes'] / mib:.1f} MiB"
            served, missed = f"{case['served']:,}", f"{case['missed'] + case['conflicts']:,}"
        time_taken = f"{min(case['step_seconds']):.2f} / {min(case['step_cpu_seconds']):.2f} s"
        lines.append(
            f"| {case['recompute']} | {SYSTEMS[case['system']]} | {case['growth_bytes'] / mib:.0f} MiB | {plan} | {time_taken} "
            f"| {served} | {missed} | {case['growth_with_warm_up_bytes'] / mib:.0f} MiB |"
        )
    lines += ["", "| recompute | growth, arena over torch's | goal | step, wall | step, CPU | losses |", "|---|---:|---:|---:|---:|---|"]
    for row in report["ratios"]:
        lines.append(
            f"| {row['recompute']} | {row['growth_ratio']:.2f}x | at most {row['goal']:.2f}x | {row['step_seconds_ratio']:.2f}x "
            f"| {row['cpu_seconds_ratio']:.2f}x | {'identical' if row['losses_identical'] else 'DIFFER'} |"
        )
    default, off, served = (report["nanoseconds_per_allocation"][name] for name in ("default", "installed_off", "served"))
    lines += [
        "",
        f"`torch.empty(4096)`, made and freed: {default:.0f} ns with torch's allocator, {off:.0f} ns with the arena installed and off "
        f"({off - default:+.0f}), {served:.0f} ns served ({served - default:+.0f}; goal: at most +100).",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run every case, print the report; exit code 1 when losses differ or a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 measured steps, prints only")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, *rest = arguments.child
        result = run_step_case(rest[0], rest[1], int(rest[2])) if kind == "step" else run_allocation_case(int(rest[0]))
        print(json.dumps(result))
        return 0
    steps = 2 if arguments.quick else 8
    report: dict[str, Any] = {"machine": machine("torch"), "cases": []}
    for recompute in GOALS:
        for system in SYSTEMS:
            print(f"{SYSTEMS[system]}, recompute {recompute} ...", file=sys.stderr)
            case = in_fresh_process("step", system, recompute, str(steps))
            report["cases"].append({"system": system, "recompute": recompute, **case})
    report["nanoseconds_per_allocation"] = in_fresh_process("allocation", "1" if arguments.quick else "8")
    report["ratios"] = ratios(report["cases"])
    print(text := markdown(report))
    if not arguments.quick:
        write_results(__file__, report, text)
    cost = report["nanoseconds_per_allocation"]
    met = all(row["losses_identical"] and row["growth_ratio"] <= row["goal"] for row in report["ratios"])
    return 0 if met and cost["served"] - cost["default"] <= 100 and cost["installed_off"] - cost["default"] <= 100 else 1


if __name__ == "__main__":
    sys.exit(main())
