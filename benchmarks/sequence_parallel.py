"""Attention over ranks: longstride's schemes and the published ones, forward and backward, same shapes, same machine, same run.

Claims measured: no peer is faster (processor time of all ranks) at equal exactness, and none holds less memory at the peak. Beside them
the error against float64 and the share of wall time in which a rank waits for messages (on a machine with fewer cores than ranks that is
mostly waiting for the other ranks' turns).

    python benchmarks/sequence_parallel.py --peers DIR [--only TEXT] [--case TEXT] [--repeats 3]
    python benchmarks/sequence_parallel.py --peers DIR --smoke

DIR holds the peers: pip install --no-deps --target DIR -r benchmarks/sequence_peers.txt. Each system runs in fresh processes; one that
does not run is reported with what it says. Results are kept as they come (a second call makes only those that are missing) and written
beside this file. ``--smoke``: small shapes, once, printed and kept nowhere.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import queue
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TIMEOUT = 400.0


@dataclass(frozen=True)
class Case:
    """Causal attention of one row."""

    name: str
    ranks: int
    tokens: int
    heads: int
    kv_heads: int
    dtype: str
    dim: int = 64


CASES = (
    Case("grouped queries", 2, 4096, 8, 2, "bfloat16"),
    Case("one key head per query head", 4, 4096, 8, 8, "bfloat16"),
    Case("float32", 4, 2048, 8, 2, "float32"),
)

# --- one rank


def run_rank(case: Case, key: str, repeats: int, folder: Path, rank: int, peers: str, results: Any) -> None:
    """Measure one system on one rank of a fresh process and put (rank, figures or why not) into ``results``."""
    try:
        sys.path.append(peers)
        results.put((rank, _measure_rank(case, key, repeats, folder, rank)))
    except BaseException as error:
        results.put((rank, {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]}))


def _measure_rank(case: Case, key: str, repeats: int, folder: Path, rank: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from benchmarks.sequence_peers import SYSTEMS
    from memory_mgmt.allocator_log import record_cpu_allocations

    system = next(system for system in SYSTEMS if _key(system) == key)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.ranks)
    held, attention = system.prepare(case.tokens)
    whole = _inputs(case)
    q, k, v = (x[:, held].clone().requires_grad_() for x in whole[:3])
    dout = whole[3][:, held].clone()
    del whole
    waits = _count_waits()

    def step() -> list[torch.Tensor]:
        out = attention(q, k, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]

    found = step()
    errors = _squares(found, torch.load(folder / "exact.pt", mmap=True), held)
    del found
    cpu, wall, waited = [], [], []
    for _ in range(repeats):
        dist.barrier()
        waits[0] = 0.0
        started = time.perf_counter(), time.process_time()
        step()
        wall.append(time.perf_counter() - started[0])
        cpu.append(time.process_time() - started[1])
        waited.append(waits[0])
    with record_cpu_allocations() as log:
        step()
        peak = log.peak_bytes()
    return {"cpu": cpu, "wall": wall, "waited": waited, "peak": peak, "errors": errors}


def _inputs(case: Case) -> list[Any]:
    """q, k, v, dout [1, T, heads, D]."""
    import torch

    generator = torch.Generator().manual_seed(11)
    shapes = [(1, case.tokens, n, case.dim) for n in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
    return [torch.randn(shape, generator=generator).to(getattr(torch, case.dtype)) for shape in shapes]


def _squares(found: list[Any], exact: list[Any], held: Any) -> list[list[float]]:
    """(squared error, squared norm) of out, dq, dk, dv on this rank."""
    pairs = [(x.double(), truth[:, held]) for x, truth in zip(found, exact, strict=True)]
    return [[float((x - truth).square().sum()), float(truth.square().sum())] for x, truth in pairs]


def _count_waits() -> list[float]:
    """Seconds spent in waiting for messages, from now on: in ``wait`` and in collectives that return when they are done."""
    import torch.distributed as dist

    waits = [0.0]

    def timed(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                waits[0] += time.perf_counter() - started

        return call

    def timed_if_it_blocks(function: Any) -> Any:
        blocking = timed(function)
        return lambda *args, **kwargs: (function if kwargs.get("async_op") else blocking)(*args, **kwargs)

    dist.Work.wait = timed(dist.Work.wait)  # type: ignore[method-assign]
    names = ("all_gather", "all_gather_into_tensor", "all_to_all_single", "all_to_all", "reduce_scatter", "all_reduce", "barrier")
    for name in names:
        setattr(dist, name, timed_if_it_blocks(getattr(dist, name)))
    return waits


# --- all ranks of all systems


def _key(system: Any) -> str:
    return f"{system.package or 'longstride'}: {system.name}"


def _exact(case: Case, folder: Path) -> None:
    """Save [out, dq, dk, dv] in float64, one head after another."""
    import torch

    from models.block import CAUSAL
    from models.kernels import block_attention, block_attention_backward

    q, k, v, dout = (x.double().transpose(1, 2) for x in _inputs(case))
    out, lse = block_attention(q, k, v, CAUSAL)
    grads = block_attention_backward(dout, q, k, v, out, lse, CAUSAL)
    torch.save([x.transpose(1, 2).contiguous() for x in (out, *grads)], folder / "exact.pt")


def measure(case: Case, system: Any, repeats: int, peers: str, exact: Path) -> dict[str, Any]:
    """The figures of one system, or ``failed`` with what it said. Ranks come from a server that has imported torch once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "benchmarks.sequence_peers", "memory_mgmt.allocator_log"])
    results = context.Queue()
    answers: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "exact.pt").symlink_to(exact)
        ranks = [
            context.Process(target=run_rank, args=(case, _key(system), repeats, Path(name), rank, peers, results), daemon=True)
            for rank in range(case.ranks)
        ]
        for process in ranks:
            process.start()
        with contextlib.suppress(queue.Empty):
            while len(answers) < case.ranks:  # once one has failed the others only find out
                rank, answer = results.get(timeout=20.0 if any("failed" in a for a in answers.values()) else TIMEOUT)
                answers[rank] = answer
        for process in ranks:
            process.join(timeout=1.0 if len(answers) == case.ranks else 0.0)
            process.kill()
    reasons = [answer["failed"] for answer in answers.values() if "failed" in answer]
    if reasons or len(answers) < case.ranks:  # the reason of the rank that began, not that its peer is gone
        silent = f"no result in {TIMEOUT:.0f} s"
        return {"failed": min(reasons, key=lambda reason: "gloo" in reason or "onnection" in reason, default=silent)}
    return _summary(list(answers.values()))


def _summary(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all ranks together: medians over repeats, sums over ranks, the largest peak."""
    repeats = range(len(answers[0]["cpu"]))
    errors = [sum(a["errors"][i][0] for a in answers) / sum(a["errors"][i][1] for a in answers) for i in range(4)]
    return {
        "cpu_seconds": median(sum(a["cpu"][i] for a in answers) for i in repeats),
        "wall_seconds": median(max(a["wall"][i] for a in answers) for i in repeats),
        "waiting": median(sum(a["waited"][i] for a in answers) / sum(a["wall"][i] for a in answers) for i in repeats),
        "peak_bytes": max(a["peak"] for a in answers),
        "errors": [error**0.5 for error in errors],
    }


# --- the report


def page(report: dict[str, Any], measured_on: str) -> str:
    """The results for people."""
    lines = [
        "# Attention over ranks: time, memory, error",
        "",
        f"{measured_on}. One thread per rank, gloo; load average {report['machine']['load_average_at_start']} before. Made by "
        "`python benchmarks/sequence_parallel.py --peers DIR`; its first lines say what is measured.",
        "",
        "Time: processor time of all ranks, forward and backward, over that of longstride's ring; memory: the largest rank's peak of "
        "tensors above its inputs, over the ring's. Above 1: longstride's ring is better. Kernel: torch's flash attention for CPU "
        "everywhere but in ring-attention-pytorch, which brings its own in PyTorch. In float32, which flash-attn does not take, "
        "ring-flash-attn and yunchang overwrite their own dq (a buffer that `.to(torch.float32)` copies in bf16 only).",
    ]
    for case in CASES:
        rows = report["cases"].get(case.name, {})
        if not rows:
            continue
        lines += ["", f"## {case.name}: {case.ranks} ranks, {case.tokens:,} tokens, {case.heads} query, {case.kv_heads} key/value heads of "
                  f"{case.dim}, {case.dtype}", "", "| system | time | ratio | peak MiB | ratio | error out, dq, dk, dv | waiting | |",
                  "|---|---:|---:|---:|---:|---|---:|---|"]  # fmt: skip
        ours = rows.get("longstride: ring", {})
        lines += [_row(key, row, ours) for key, row in rows.items()]
        lines += ["", *_verdict(rows)]
    return "\n".join(lines) + "\n"


def _row(key: str, row: dict[str, Any], ours: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {key} | | | | | | | {row.get('note', '')} does not run: `{row['failed'].replace('|', '/')}` |"
    time_ratio, memory_ratio = (row[name] / ours[name] if name in ours else float("nan") for name in ("cpu_seconds", "peak_bytes"))
    errors = ", ".join(f"{error:.1e}" for error in row["errors"])
    return (
        f"| {key} | {row['cpu_seconds']:.2f} s | {time_ratio:.2f} | {row['peak_bytes'] / 2**20:.1f} | {memory_ratio:.2f} | {errors} "
        f"| {row['waiting']:.0%} | {row.get('note', '')} |"
    )


def _verdict(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Whether the goals are met: the best of ours beside the best peer of those that are as exact (errors at most 1.2 times our least)."""
    done = {key: row for key, row in rows.items() if "failed" not in row}
    own = {key: row for key, row in done.items() if key.startswith("longstride")}
    if not own:
        return []
    exact = min(max(row["errors"]) for row in own.values())
    peers = {key: row for key, row in done.items() if key not in own and max(row["errors"]) <= 1.2 * exact}
    own = {key: row for key, row in own.items() if max(row["errors"]) <= 1.2 * exact}
    if not peers:
        return ["No peer ran at equal exactness (its largest error at most 1.2 times our least)."]
    lines = []
    for what, name in (("processor time", "cpu_seconds"), ("peak memory", "peak_bytes")):
        ours, best = min(own, key=lambda key: own[key][name]), min(peers, key=lambda key: peers[key][name])
        ratio = own[ours][name] / peers[best][name]
        lines.append(f"- {what}: {ours} takes {ratio:.2f} of {best}, the best peer: {'met' if ratio <= 1 else '**not met**'}")
    return lines


def _smoke(peers: str, only: str, of_case: str) -> int:
    """Run every system once on small shapes; 1 where one of ours does not run."""
    from benchmarks.sequence_peers import SYSTEMS

    failed = False
    for case in (replace(case, tokens=case.tokens // 8) for case in CASES if of_case in case.name):
        with tempfile.TemporaryDirectory() as folder:
            _exact(case, Path(folder))
            for system in (system for system in SYSTEMS if only in _key(system)):
                row = measure(case, system, 1, peers, Path(folder) / "exact.pt")
                print(case.name, _key(system), json.dumps(row), flush=True)
                failed |= not system.package and "failed" in row and not (case.ranks < 4 and system.name == "ring_x_ulysses")
    return int(failed)


def main() -> int:
    """Measure what is missing, and write the results."""
    from benchmarks.common import machine, where, write_results
    from benchmarks.sequence_peers import SYSTEMS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="", help="where the peers are installed")
    parser.add_argument("--only", default="", help="systems whose name contains this")
    parser.add_argument("--again", action="store_true", help="also those that there are results of")
    parser.add_argument("--case", default="", help="cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="an eighth of the tokens, one repeat; results are printed and not kept")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    kept = Path(__file__).with_suffix(".json")
    report: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"cases": {}}
    report["machine"] = machine("torch")
    named = {d.metadata["Name"]: d.version for d in distributions(path=[args.peers])} if args.peers else {}
    wanted = {system.package for system in SYSTEMS}
    report["machine"] |= {name: number for name, number in named.items() if name in wanted} or report.get("peers", {})
    if args.smoke:
        return _smoke(args.peers, args.only, args.case)
    for case in (case for case in CASES if args.case in case.name):
        rows = report["cases"].setdefault(case.name, {})
        chosen = [s for s in SYSTEMS if args.only in _key(s) and (args.again or "cpu_seconds" not in rows.get(_key(s), {}))]
        with tempfile.TemporaryDirectory() as folder:
            if chosen:
                _exact(case, Path(folder))
            for system in chosen:
                rows[_key(system)] = {**measure(case, system, args.repeats, args.peers, Path(folder) / "exact.pt"), "note": system.note}
                print(case.name, _key(system), json.dumps(rows[_key(system)]), flush=True)
                names = [name for name in report["machine"] if name == "torch" or name in wanted]
                write_results(__file__, report, page(report, where(report["machine"], *names)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
