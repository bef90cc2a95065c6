"""Mixture of Memories with memories that work on their own tokens (``model.memory.mom.compute: routed``) against all on all (``dense``).

    python benchmarks/mom_routing.py [--only TEXT] [--repeats 3]
    python benchmarks/mom_routing.py --smoke --out DIR            # tiny sizes, results into DIR

One layer, forward and backward of one row, float32, one thread. Both take turns (every repeat runs each once); time is the process's own,
least of the repeats; peak memory is that of the allocator's log above parameters and inputs. ``even``: a router as it was drawn; ``one
memory``: a router that sends every token to the same memories, the most uneven there is. A second call measures the chosen sizes again and
keeps the others.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import machine, where, write_results  # noqa: E402


@dataclass(frozen=True)
class Size:
    """Of one layer."""

    width: int
    heads: int
    key: int
    memories: int
    top_k: int
    tokens: int
    uneven: bool = False

    @property
    def name(self) -> str:
        """In words."""
        router = "one memory" if self.uneven else "even"
        return f"d_model {self.width}, {self.heads} heads of {self.key}, {self.top_k} of {self.memories}, {self.tokens} tokens, {router}"


SIZES = (
    Size(160, 5, 32, 4, 2, 4096),
    Size(512, 8, 64, 4, 2, 2048),
    Size(512, 8, 64, 8, 2, 2048),
    Size(512, 8, 64, 8, 2, 2048, uneven=True),
    Size(1024, 8, 64, 8, 2, 1024),
)
SMOKE = (Size(32, 2, 16, 8, 2, 512),)


def measure(size: Size, repeats: int) -> dict[str, Any]:
    """Seconds and peak bytes of both, and the largest difference of their results over the largest result."""
    import torch

    from memory_mgmt.allocator_log import record_cpu_allocations
    from models.batch import Bounds
    from models.config import ModelConfig
    from models.memory.mom import MixtureOfMemories
    from models.memory.protocol import build_memory

    torch.set_num_threads(1)
    mixture = {"n_memories": size.memories, "top_k": size.top_k}
    memory = {"kind": "mom", "head_dim": size.key, "mom": mixture}
    config = {"d_model": size.width, "n_heads": size.heads, "layers": ["memory"], "memory": memory}
    module = build_memory(ModelConfig.model_validate(config))
    assert isinstance(module, MixtureOfMemories)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            value = module.init_parameter(name, p.shape, g)
            p.copy_(torch.randn(p.shape, generator=g) * size.width**-0.5 if value is None else value)
        if size.uneven:
            module.w_router.weight[:, 0] = -torch.arange(float(size.memories))
    x = torch.randn(1, size.tokens, size.width, generator=g)
    if size.uneven:
        x[..., 0] = 9.0
    x.requires_grad_()

    def step(routed: bool) -> list[Any]:
        module.routed = routed
        y, _ = module(x, None, Bounds.whole(1, size.tokens))
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()], allow_unused=True)]

    pairs = [(a, b) for a, b in zip(step(True), step(False), strict=True) if a is not None and b is not None]
    found: dict[str, Any] = {
        "error": max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs),
        "repeats": repeats,
    }
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        for routed, taken in times.items():
            started = time.process_time()
            step(routed)
            taken.append(time.process_time() - started)
    for routed, name in ((True, "routed"), (False, "dense")):
        with record_cpu_allocations() as log:
            step(routed)
            peak = log.peak_bytes()
        found[name] = {"cpu_seconds": min(times[routed]), "peak_bytes": peak}
    return found


def page(report: dict[str, Any]) -> str:
    """The results for people."""
    load = report["machine"]["load_average_at_start"]
    lines = [
        "# Mixture of Memories: memories on their own tokens, or all on all",
        "",
        f"{where(report['machine'], 'torch')}. One thread, float32, load average {load} before. Made by "
        "`python benchmarks/mom_routing.py`; its first lines say what is measured. Difference: largest of a result or a "
        "gradient, over its largest value.",
        "",
        "| layer | routed, tokens/s | dense, tokens/s | x | routed, peak MiB | dense, peak MiB | x | difference |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in report["sizes"].items():
        routed, dense = row["routed"], row["dense"]
        tokens = row["size"]["tokens"]
        speeds = [tokens / one["cpu_seconds"] for one in (routed, dense)]
        peaks = [one["peak_bytes"] / 2**20 for one in (routed, dense)]
        lines.append(
            f"| {name} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {speeds[0] / speeds[1]:.2f} | {peaks[0]:.0f} | {peaks[1]:.0f} "
            f"| {peaks[0] / peaks[1]:.2f} | {row['error']:.0e} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Measure the chosen sizes and write the results; exit code 2 where arguments are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="sizes whose name contains this")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a tiny size")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="directory of the results")
    args = parser.parse_args(arguments)
    chosen = SMOKE if args.smoke else tuple(size for size in SIZES if args.only in size.name)
    for wrong, why in ((args.smoke and args.out == parser.get_default("out"), "--smoke needs --out, so that results stay"),
                       (not args.out.is_dir(), f"no such directory: {args.out}"), (args.repeats < 1, "--repeats is at least 1"),
                       (not chosen, f"no size's name contains {args.only!r}")):  # fmt: skip
        if wrong:
            print(f"error: {why}", file=sys.stderr)
            return 2
    report: dict[str, Any] = {"machine": machine("torch"), "sizes": {}}
    kept = args.out / "mom_routing.json"
    if kept.is_file():
        report["sizes"] = json.loads(kept.read_text())["sizes"]
    for size in chosen:
        report["sizes"][size.name] = {"size": asdict(size), **measure(size, args.repeats)}
        write_results(str(args.out / "mom_routing.py"), report, page(report))
        print(page(report).splitlines()[-1], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
