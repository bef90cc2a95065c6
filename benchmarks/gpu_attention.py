"""Attention on one CUDA GPU: every kernel at 8K to 256K tokens, and keys streamed from host memory against resident ones.

Kernels: one causal block, 32 query and 8 key/value heads of 128 in bfloat16, forward and backward apart; TFLOP/s of the visible scores (two
products forward, five backward) and their share of the rate of an 8,192-cubed matrix product measured in the same run. What a kernel
refuses or runs out of memory at is said in its place.

Streaming: a whole layer's attention, forward and backward, 8 query and 8 key/value heads (the fewest scores per key, so the hardest case
for the link), at 256K and 1M tokens: LocalAttention against ``parallel.host_keys`` with chunks of 65,536 tokens. Seconds, ratio, peak
memory above the inputs, the largest relative difference of out, dq, dk and dv; in the JSON file also what was copied and waited for.

    python benchmarks/gpu_attention.py               writes gpu_attention.json and .md beside this file
    python benchmarks/gpu_attention.py --out DIR     writes them there
    python benchmarks/gpu_attention.py --smoke       the same code, tiny, on the CPU: shows that it works; writes only with --out
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, not as a module

import torch  # noqa: E402

from benchmarks.common import machine, where, write_results  # noqa: E402
from memory_mgmt.offload import HostStore  # noqa: E402
from models.attention import LocalAttention  # noqa: E402
from models.batch import Bounds  # noqa: E402
from models.errors import UserError  # noqa: E402
from models.kernels import CAUSAL, KERNELS, block_attention, block_attention_backward, explain  # noqa: E402
from parallel.host_keys import HostKeysAttention  # noqa: E402


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    device: str
    dtype: torch.dtype
    heads: tuple[int, int]
    dim: int
    lengths: tuple[int, ...]
    streamed_heads: tuple[int, int]
    streamed: tuple[int, ...]
    chunk: int
    matmul: int
    seconds: float
    """At least so long is each thing repeated, after one time that does not count."""


GPU = Sizes("cuda", torch.bfloat16, (32, 8), 128, tuple(1 << n for n in range(13, 19)), (8, 8), (1 << 18, 1 << 20), 65_536, 8192, 1.0)
SMOKE = Sizes("cpu", torch.float32, (4, 2), 32, (128, 256), (2, 2), (256, 512), 100, 128, 0.0)


def seconds_of(work: Callable[[], object], sizes: Sizes) -> float:
    """Seconds of one call."""

    def synchronise() -> None:
        if sizes.device == "cuda":
            torch.cuda.synchronize()

    work()
    synchronise()
    calls, start = 0, time.perf_counter()
    while not calls or time.perf_counter() - start < sizes.seconds:
        work()
        synchronise()
        calls += 1
    return (time.perf_counter() - start) / calls


def matmul_rate(sizes: Sizes) -> float:
    """FLOP/s of a square matrix product."""
    a, b = (torch.randn(sizes.matmul, sizes.matmul, device=sizes.device, dtype=sizes.dtype) for _ in range(2))
    return 2 * sizes.matmul**3 / seconds_of(lambda: a @ b, sizes)


def tensors(sizes: Sizes, heads: tuple[int, int], length: int) -> list[torch.Tensor]:
    """q, k, v, dout [1, heads, T, D]; memory is token after token, as in a layer."""
    generator = torch.Generator(sizes.device).manual_seed(0)
    counts = (heads[0], heads[1], heads[1], heads[0])
    made = (torch.randn(1, length, n, sizes.dim, device=sizes.device, dtype=sizes.dtype, generator=generator) for n in counts)
    return [x.transpose(1, 2) for x in made]


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is measured, or why it is not."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except (UserError, RuntimeError) as error:
        return {"failed": " ".join(str(error).split())[:160]}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def kernel_case(kernel: str, length: int, sizes: Sizes, matmul: float) -> dict[str, Any]:
    """One kernel at one length: seconds, FLOP/s and share of ``matmul``, forward and backward."""
    q, k, v, dout = tensors(sizes, sizes.heads, length)
    out, lse = block_attention(q, k, v, CAUSAL, kernel=kernel)
    forward = seconds_of(lambda: block_attention(q, k, v, CAUSAL, kernel=kernel), sizes)
    backward = seconds_of(lambda: block_attention_backward(dout, q, k, v, out, lse, CAUSAL, kernel=kernel), sizes)
    row: dict[str, Any] = {}
    for name, seconds, products in (("forward", forward, 2), ("backward", backward, 5)):
        rate = products * 2 * (length * (length + 1) / 2) * sizes.heads[0] * sizes.dim / seconds
        row |= {f"{name}_seconds": seconds, f"{name}_flops": rate, f"{name}_share": rate / matmul}
    return row


def streamed_case(length: int, sizes: Sizes) -> dict[str, Any]:
    """Resident keys against streamed ones at one length."""
    bounds = Bounds.whole(1, length)
    store = HostStore(sizes.device)
    schemes = {
        "resident": LocalAttention(None),
        "streamed": HostKeysAttention(None, "contiguous", None, store, sizes.chunk),
    }
    row: dict[str, Any] = {}
    found: dict[str, list[torch.Tensor]] = {}
    for name, scheme in schemes.items():
        given = tensors(sizes, sizes.streamed_heads, length)
        dout = given.pop()
        leaves = [x.requires_grad_() for x in given]

        def step(scheme: Any = scheme, leaves: list[torch.Tensor] = leaves, dout: torch.Tensor = dout) -> list[torch.Tensor]:
            out = scheme(*leaves, bounds)
            return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

        if sizes.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        found[name] = [x.cpu() for x in step()]
        if sizes.device == "cuda":
            row[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated() - before  # pyright: ignore[reportPossiblyUnboundVariable]
        store.statistics(reset=True)
        row[f"{name}_seconds"] = seconds_of(step, sizes)
    row["waited_seconds"] = store.statistics().waited_seconds  # of all streamed steps
    row["copied_bytes"] = store.copied_bytes.to_device + store.copied_bytes.to_host
    row["throughput"] = row["resident_seconds"] / row["streamed_seconds"]
    row["difference"] = max(_difference(a, b) for a, b in zip(found["streamed"], found["resident"], strict=True))
    store.close()
    return row


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def kernel_line(name: str, length: int, row: dict[str, Any]) -> str:
    """One row of the kernels' table."""
    if "failed" in row:
        return f"| {name} | {length:,} | {row['failed']} | | | | |"
    parts = (f"{row[f'{way}_flops'] / 1e12:.4g} | {row[f'{way}_share']:.1%}" for way in ("forward", "backward"))
    return f"| {name} | {length:,} | | {' | '.join(parts)} |"


def streamed_line(length: int, row: dict[str, Any]) -> str:
    """One row of the table of streamed keys."""
    if "failed" in row:
        return f"| {length:,} | {row['failed']} | | | | | |"
    peaks = [f"{row[f'{name}_peak_bytes'] / 2**30:.2f}" if f"{name}_peak_bytes" in row else "" for name in ("resident", "streamed")]
    seconds = f"{row['resident_seconds']:.4g} | {row['streamed_seconds']:.4g} | {row['throughput']:.1%}"
    return f"| {length:,} | {seconds} | {' | '.join(peaks)} | {row['difference']:.1e} |"


def main(smoke: bool, out: Path | None) -> int:
    """Measure, print, write. Returns the exit code."""
    sizes = SMOKE if smoke else GPU
    if sizes.device == "cuda" and not torch.cuda.is_available():
        print("error: there is no CUDA GPU here; --smoke runs the same code on the CPU", file=sys.stderr)
        return 2
    if out is not None and not out.is_dir():
        print(f"error: --out {out}: no such directory; make it first", file=sys.stderr)
        return 2
    torch.use_deterministic_algorithms(False)
    name = torch.cuda.get_device_name() if sizes.device == "cuda" else "CPU (smoke: says nothing about a GPU)"
    matmul = matmul_rate(sizes)
    lines = [f"matrix product of {sizes.matmul:,}: {matmul / 1e12:.4g} TFLOP/s in {str(sizes.dtype).removeprefix('torch.')}", ""]
    lines += ["| kernel | tokens | | forward TFLOP/s | of matmul | backward TFLOP/s | of matmul |", "|---|---:|---|---:|---:|---:|---:|"]
    print("\n".join(lines), flush=True)
    kernels: dict[str, dict[str, Any]] = {}
    for kernel in KERNELS:
        if kernel == "float64":
            continue  # the reference, never chosen by itself
        for length in sizes.lengths:
            row = attempt(lambda kernel=kernel, length=length: kernel_case(kernel, length, sizes, matmul))
            kernels.setdefault(kernel, {})[str(length)] = row
            lines.append(kernel_line(kernel, length, row))
            print(lines[-1], flush=True)
            if "failed" in row:
                break  # longer ones fail likewise
    chosen = explain(sizes.device, sizes.dtype, sizes.dim, CAUSAL, capability=torch.cuda.get_device_capability() if not smoke else None)
    head = ["", f"`auto`: {chosen}", ""]
    head += ["| tokens | resident s | streamed s | throughput | resident peak GiB | streamed peak GiB | difference |"]
    lines += [*head, "|---:|---:|---:|---:|---:|---:|---:|"]
    print("\n".join(lines[-5:]), flush=True)
    streamed = {}
    for length in sizes.streamed:
        streamed[str(length)] = attempt(lambda length=length: streamed_case(length, sizes))
        lines.append(streamed_line(length, streamed[str(length)]))
        print(lines[-1], flush=True)
    report = {"device": name, "machine": machine("torch"), "matmul_flops": matmul, "kernels": kernels, "streamed": streamed}
    if out is not None or not smoke:
        title = [
            "# Attention on one GPU",
            "",
            f"{name}; {where(report['machine'], 'torch')}. Made by `python benchmarks/gpu_attention.py`.",
            "",
        ]
        script = Path(__file__) if out is None else out / Path(__file__).name
        write_results(str(script), report, "\n".join([*title, *lines]) + "\n")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--out", type=Path, default=None, help="directory for the results")
    asked = parser.parse_args()
    sys.exit(main(asked.smoke, asked.out))
