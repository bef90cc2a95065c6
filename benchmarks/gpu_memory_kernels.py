"""Affine memories on one CUDA GPU: the eager kernels against flash-linear-attention's, forward and backward, at 8K to 128K tokens.

One layer of each kind (Gated DeltaNet, Mamba-2, Gated Slot Attention), width 2,048, 16 heads of 128 (Mamba-2: values of 256, states of
128; Gated Slot Attention: 64 slots), one row, bfloat16 autocast, float32 parameters, as in a training step: tokens per second forward and
backward together, peak memory above the inputs, the largest relative difference of output and input's gradient to the eager kernel in
float32. Whole, and packed (a document every 3,000 tokens). ``model.memory.kernel: auto`` takes fla where this says that it is there
(``longstride train CONFIG --explain``); what a kernel refuses or runs out of memory at is said in its place.

    python benchmarks/gpu_memory_kernels.py             writes gpu_memory_kernels.json and .md beside this file
    python benchmarks/gpu_memory_kernels.py --out DIR   writes them there
    python benchmarks/gpu_memory_kernels.py --smoke     the same code, tiny, on the CPU: shows that it works; writes only with --out
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
from models.batch import Bounds  # noqa: E402
from models.config import ModelConfig  # noqa: E402
from models.errors import UserError  # noqa: E402
from models.memory.kernel_choice import explain, installed_fla, recurrence_of  # noqa: E402
from models.memory.protocol import MemoryModule, build_memory  # noqa: E402

KERNELS = ("eager", "fla")


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    device: str
    width: int
    heads: int
    slots: int
    lengths: tuple[int, ...]
    document: int
    seconds: float
    """At least so long is each thing repeated, after one time that does not count."""

    def models(self) -> dict[str, dict[str, Any]]:
        """``model.memory`` of every layer."""
        state = self.width // self.heads
        return {
            "gated_deltanet": {},
            "mamba2": {"mamba2": {"state_dim": state, "expand": 2.0}},
            "gsa": {"gsa": {"n_slots": self.slots}},
        }


GPU = Sizes("cuda", 2048, 16, 64, tuple(1 << n for n in range(13, 18)), 3000, 1.0)
SMOKE = Sizes("cpu", 64, 2, 16, (96, 192), 50, 0.0)


def layer_config(kind: str, own: dict[str, Any], sizes: Sizes) -> ModelConfig:
    """A model of one such layer."""
    shapes = {"d_model": sizes.width, "n_heads": sizes.heads, "layers": ["memory"]}
    return ModelConfig.model_validate({**shapes, "memory": {"kind": kind, **own}})


def layer(kind: str, own: dict[str, Any], kernel: str, sizes: Sizes) -> MemoryModule:
    """The layer with weights of its own rules, else normal with standard deviation 1 / sqrt(inputs)."""
    module, generator = build_memory(layer_config(kind, {"kernel": kernel, **own}, sizes)), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            value = module.init_parameter(name, p.shape, generator)
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5 if value is None else value)
    return module.to(sizes.device)


def step_of(module: MemoryModule, tokens: int, packed: bool, sizes: Sizes, bf16: bool) -> Callable[[], list[torch.Tensor]]:
    """One forward and backward pass: output and the input's gradient."""
    starts = tuple(range(0, tokens, sizes.document)) if packed else (0,)
    bounds = Bounds(tokens, ((0, tokens),), (starts,))
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, tokens, sizes.width, generator=generator).to(sizes.device).requires_grad_()
    dout = torch.randn(1, tokens, sizes.width, generator=generator).to(sizes.device)

    def step() -> list[torch.Tensor]:
        with torch.autocast(sizes.device, torch.bfloat16, enabled=bf16):
            y, _ = module(x, None, bounds)
        x.grad = None
        module.zero_grad()
        y.backward(dout.to(y.dtype))
        assert x.grad is not None
        return [y.detach(), x.grad]

    return step


def measured(step: Callable[[], list[torch.Tensor]], sizes: Sizes) -> tuple[float, int | None, list[torch.Tensor]]:
    """Seconds of a step, its peak bytes above what was there (None on the CPU), and its results."""
    cuda = sizes.device == "cuda"
    results = [x.float().cpu() for x in step()]  # compiles and chooses block sizes
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    calls, start = 0, time.perf_counter()
    while not calls or time.perf_counter() - start < sizes.seconds:
        step()
        if cuda:
            torch.cuda.synchronize()
        calls += 1
    peak = torch.cuda.max_memory_allocated() - before if cuda else None  # pyright: ignore[reportPossiblyUnboundVariable]
    return (time.perf_counter() - start) / calls, peak, results


def case(kind: str, own: dict[str, Any], kernel: str, tokens: int, packed: bool, sizes: Sizes) -> dict[str, Any]:
    """One layer at one length by one kernel, or why it is not measured."""
    try:
        seconds, peak, results = measured(step_of(layer(kind, own, kernel, sizes), tokens, packed, sizes, bf16=True), sizes)
        exact = [x.float().cpu() for x in step_of(layer(kind, own, "eager", sizes), tokens, packed, sizes, bf16=False)()]
        off = max(float((a - b).norm() / b.norm()) for a, b in zip(results, exact, strict=True))
        return {"seconds": seconds, "peak_bytes": peak, "difference": off}
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except (UserError, RuntimeError) as error:
        return {"failed": " ".join(str(error).split())[:160]}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def line(kind: str, tokens: int, packed: bool, kernel: str, row: dict[str, Any]) -> str:
    """One row of the table."""
    name = f"| {kind} | {tokens:,} | {'packed' if packed else 'whole'} | {kernel} |"
    if "failed" in row:
        return f"{name} {row['failed']} | | |"
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"
    return f"{name} {tokens / row['seconds']:,.0f} | {peak} | {row['difference']:.1e} |"


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
    capability = torch.cuda.get_device_capability() if sizes.device == "cuda" else None
    lines, rows = [f"flash-linear-attention {installed_fla() or 'is not installed'}", ""], []
    for kind, own in sizes.models().items():
        config = layer_config(kind, own, sizes)
        recurrence = recurrence_of(config, sizes.device, "bf16", capability, deterministic=False)
        assert recurrence is not None
        lines.append(f"`auto`, {kind}: {explain(recurrence)}")
    lines += ["", "| layer | tokens | documents | kernel | tokens/s | peak GiB | difference |", "|---|---:|---|---|---:|---:|---:|"]
    print("\n".join(lines), flush=True)
    for kind, own in sizes.models().items():
        for tokens in sizes.lengths:
            for packed in (False, True):
                for kernel in KERNELS:
                    row = case(kind, own, kernel, tokens, packed, sizes)
                    rows.append({"kind": kind, "tokens": tokens, "packed": packed, "kernel": kernel, **row})
                    lines.append(line(kind, tokens, packed, kernel, row))
                    print(lines[-1], flush=True)
    report = {"device": name, "fla": installed_fla(), "machine": machine("torch"), "rows": rows}
    if out is not None or not smoke:
        title = ["# Kernels of affine memories on one GPU", "", f"{name}; {where(report['machine'], 'torch')}.", ""]
        title[2] += " Made by `python benchmarks/gpu_memory_kernels.py`."
        script = Path(__file__) if out is None else out / Path(__file__).name
        write_results(str(script), report, "\n".join([*title, *lines]) + "\n")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--out", type=Path, default=None, help="directory for the results")
    asked = parser.parse_args()
    sys.exit(main(asked.smoke, asked.out))
