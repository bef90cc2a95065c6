"""Peak memory and speed of one training step from 131,072 to 1,048,576 tokens: one sequence, one process, this machine's CPU.

Gated DeltaNet + sliding window and Titans (memory as gate) + sliding window, the whole sequence at once and in segments
(``train.segment_tokens``), and a Recurrent Memory Transformer around sliding windows, which always runs in segments; under a policy that
keeps block inputs only and works in tiles. Every case is a fresh process that first takes a step of 2,048 tokens, so that libraries and
optimizer states exist; memory is the growth of peak resident memory in the measured step above the process before the model was built, the
batch (int32; tokens and labels as one text, positions: 8 bytes per token) and the loss of every token (4 bytes) included. Speed is tokens
per CPU second, which other work on the machine disturbs least. Measured steps are kept one by one in memory_million.jsonl beside this
script: whatever ends it, the next call does only what is missing.

  python benchmarks/memory_million.py                          # all that is missing, then the page and the picture
  python benchmarks/memory_million.py --only gated_deltanet
  python benchmarks/memory_million.py --by-turns 1 --only titans_mag_segments   # speeds, in one process
  python benchmarks/memory_million.py --report                 # page and picture from what is there

Legend: B batch (1), T tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]  # run as a script, not as a module

from common import machine, python, where  # noqa: E402

from memory_mgmt.config import MemoryConfig  # noqa: E402
from models.config import ModelConfig  # noqa: E402

SIZES = (131_072, 262_144, 524_288, 1_048_576)
WARM_UP_TOKENS = 2_048
VOCAB_SIZE = 256
_SHAPE: dict[str, Any] = {"d_model": 32, "n_heads": 1, "d_ff": 64, "window": 64, "layers": ["memory", "swa"]}
_TITANS = {"chunk_size": 1024, "network": "linear"}
_MAG = {**_SHAPE, "memory": {"kind": "titans", "attach": "mag", "titans": _TITANS}}
SEGMENT_TOKENS = 65_536
"""Of the cases in segments."""
_RMT = {**_SHAPE, "layers": ["swa", "swa"], "memory": {"kind": "rmt", "rmt": {"segment": SEGMENT_TOKENS, "tokens": 16}}}
MODELS = {
    "gated_deltanet": ModelConfig.model_validate(_SHAPE),
    "titans_mag": ModelConfig.model_validate(_MAG),
    "gated_deltanet_segments": ModelConfig.model_validate(_SHAPE),
    "titans_mag_segments": ModelConfig.model_validate(_MAG),
    "rmt_segments": ModelConfig.model_validate(_RMT),
}
POLICY = MemoryConfig(recompute="block", loss_tile_tokens=4096, ffn_tile_tokens=8192, memory_tile_tokens=8192)
FLAT = 0.10


def run_case(name: str, sizes: list[int]) -> list[dict[str, Any]]:
    """Loss, seconds and peak growth of measured steps of ``sizes``, one after the other; in a process of its own."""
    import torch

    from memory_mgmt.apply import apply_policy
    from memory_mgmt.host_allocator import return_freed_memory
    from memory_mgmt.monitor import MemoryMonitor
    from memory_mgmt.policy_settings import policy_of
    from models.batch import Batch, Bounds
    from models.layer_segments import LayerSegments
    from models.transformer import Block, Transformer, init_weights
    from trainer.engine import forward
    from trainer.replay import SegmentRunner

    return_freed_memory()  # otherwise holes of the heap are measured, not the step
    torch.set_num_threads(1)
    monitor = MemoryMonitor(torch.device("cpu"))
    model = Transformer(MODELS[name], VOCAB_SIZE)
    init_weights(model, 0)
    apply_policy(model, policy_of(POLICY, MODELS[name].layer_kinds))
    if name.endswith("_segments") and model.stack is None:
        model.layer_segments = LayerSegments([cast(Block, block).mixer for block in model.blocks], SEGMENT_TOKENS)
    runner = SegmentRunner(model) if model.segmented is not None else None

    def one_segment(shard: Batch, segment: Any) -> Any:
        return forward(model, shard, torch.device("cpu"), "fp32", segment)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    found: list[dict[str, Any]] = []
    for n in (WARM_UP_TOKENS, *sizes):
        text = torch.randint(VOCAB_SIZE, (1, n + 1), generator=generator, dtype=torch.int32)
        monitor.reset()
        begun, cpu = time.perf_counter(), time.process_time()
        batch = Batch(text[:, :-1], text[:, 1:], torch.arange(n, dtype=torch.int32).unsqueeze(0), Bounds.whole(1, n))
        if runner is not None:
            loss = runner(one_segment, batch, n).sum() / n
        else:
            loss = model(batch).sum() / n
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu
        found.append({"loss": loss.item(), "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": monitor.peak_bytes()})
    return found[1:]


def protocol() -> dict[str, Any]:
    """What makes measured steps comparable."""
    models = {name: model.model_dump(mode="json", exclude_defaults=True) for name, model in MODELS.items()}
    return {
        "models": models,
        "segment_tokens": SEGMENT_TOKENS,
        "policy": POLICY.model_dump(mode="json", exclude_defaults=True),
        "vocab_size": VOCAB_SIZE,
        "batch": "int32",
    }


def read(file: Path) -> list[dict[str, Any]]:
    """The steps measured so far. Raises ValueError where they are of other models or another policy."""
    if not file.exists():
        return []
    first, *rest = (json.loads(line) for line in file.read_text().splitlines() if line.strip())
    if first.get("protocol") != protocol():
        raise ValueError(f"{file} holds steps of other models or another policy; move it away or name another --results")
    return rest


def write(file: Path, text: str) -> None:
    """Whole or not at all."""
    unfinished = file.with_suffix(".unfinished")
    with unfinished.open("w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    unfinished.replace(file)


def measure_missing(file: Path, name: str, sizes: list[int]) -> None:
    """A model's steps, the short ones first."""
    for tokens in sizes:
        if any((one["model"], one.get("tokens")) == (name, tokens) for one in read(file)):
            continue
        printed, failure = python(Path(__file__).resolve(), "--child", name, str(tokens))
        if failure:
            print(f"{name} at {tokens:,}: {failure}", file=sys.stderr)
            return
        step = json.loads(printed.splitlines()[-1])[0]
        one = {"model": name, "tokens": tokens, **step, "first_pass_stops": True, "machine": machine("torch")}
        lines = [{"protocol": protocol()}, *read(file), one]
        write(file, "".join(json.dumps(line) + "\n" for line in lines))
        print(
            f"{name} at {tokens:,}: {one['peak_bytes'] / 2**20:,.0f} MiB, {tokens / one['cpu_seconds']:,.0f} tokens per CPU second",
            flush=True,
        )


def alternate(file: Path, name: str, rounds: int) -> None:
    """The shortest and the longest step by turns in one process, so that what else the machine does meets both; speed is compared in
    these. Of the short one as many as make about half as many tokens, before and after each long one."""
    short, long = SIZES[0], SIZES[-1]
    around = [short] * max(1, long // short // 4)
    sizes = [*around, *[long, *around] * rounds]
    printed, failure = python(Path(__file__).resolve(), "--child", name, *map(str, sizes))
    if failure:
        print(f"{name} by turns: {failure}", file=sys.stderr)
        return
    steps = [[n, step["cpu_seconds"]] for n, step in zip(sizes, json.loads(printed.splitlines()[-1]), strict=True)]
    one = {"model": name, "by_turns": steps, "machine": machine("torch")}
    write(file, "".join(json.dumps(line) + "\n" for line in [{"protocol": protocol()}, *read(file), one]))
    print(by_turns(one), flush=True)


def by_turns(one: dict[str, Any]) -> str:
    """What an alternating run says of speed."""
    rates: dict[int, list[float]] = {}
    for n, seconds in one["by_turns"]:
        rates.setdefault(n, []).append(n / seconds)
    short, long = min(rates), max(rates)
    times = median(rates[long]) / median(rates[short])
    even = "within 10 percent" if abs(times - 1) <= FLAT else "more than 10 percent apart"
    counts = f"{len(rates[short])} steps of {short:,} and {len(rates[long])} of {long:,} tokens by turns in one process"
    speeds = f"{median(rates[short]):,.0f} and {median(rates[long]):,.0f} tokens per CPU second"
    return f"- {one['model']}, {counts}: {speeds}, {times:.2f} ({even})."


def measured_sizes(steps: list[dict[str, Any]]) -> str:
    """The lengths that any model has, of those that are to be measured."""
    return ", ".join(f"{n:,}" for n in SIZES if any(one.get("tokens") == n for one in steps)) or "no"


def report(steps: list[dict[str, Any]]) -> str:
    """Markdown: every step, what more tokens cost, and whether memory and speed are flat."""
    lines = [
        f"# One training step by its length; measured so far: {measured_sizes(steps)} tokens",
        "",
        "One sequence, one process, one thread, fp32. Made by `python benchmarks/memory_million.py`, whose first lines say what is "
        "measured.",
        "",
        f"Policy: `{json.dumps(protocol()['policy'])}`. Models: `{json.dumps(protocol()['models'])}`.",
        "",
        "| model | tokens | peak growth | CPU seconds | tokens per CPU second | loss |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    verdicts = []
    turns, steps = [one for one in steps if "by_turns" in one], [one for one in steps if "by_turns" not in one]
    for name in MODELS:
        mine = sorted((one for one in steps if one["model"] == name), key=lambda one: one["tokens"])
        for one in mine:
            speed = one["tokens"] / one["cpu_seconds"]
            peak = f"{one['peak_bytes'] / 2**20:,.0f} MiB"
            earlier = name.endswith("_segments") and not MODELS[name].memory.around_stack and not one.get("first_pass_stops")
            name_here = f"{name} (1)" if earlier else name
            lines.append(f"| {name_here} | {one['tokens']:,} | {peak} | {one['cpu_seconds']:.1f} | {speed:,.0f} | {one['loss']:.4f} |")
        if len(mine) > 1:
            verdicts.append(verdict(name, mine[0], mine[-1]))
        verdicts += [by_turns(one) for one in turns if one["model"] == name]
    if any(line.partition(" | ")[0].endswith("(1)") for line in lines):
        verdicts += ["", "(1) Measured while the first pass over the segments still ran the last layer to its end."]
    steps = steps or turns
    measured = [f"Measured on {where(steps[-1]['machine'], 'torch')}, beside other work."] if steps else []
    return "\n".join([*lines, "", *verdicts, "", *measured, ""])


def verdict(name: str, short: dict[str, Any], long: dict[str, Any]) -> str:
    """The longest step against the shortest."""
    memory = long["peak_bytes"] / short["peak_bytes"]
    speed = (long["tokens"] / long["cpu_seconds"]) / (short["tokens"] / short["cpu_seconds"])
    per_token = (long["peak_bytes"] - short["peak_bytes"]) / (long["tokens"] - short["tokens"])
    flat = "flat" if abs(memory - 1) <= FLAT else f"not flat: {per_token:.0f} bytes for each further token"
    even = "within 10 percent" if abs(speed - 1) <= FLAT else "more than 10 percent apart"
    times = long["tokens"] // short["tokens"]
    return f"- {name}, {times} times the tokens: {memory:.2f} times the memory ({flat}), {speed:.2f} times the speed ({even})."


def draw(steps: list[dict[str, Any]], file: Path) -> None:
    """Memory and speed over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [one for one in steps if "by_turns" not in one]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for name in MODELS:
        mine = sorted((one for one in steps if one["model"] == name), key=lambda one: one["tokens"])
        if not mine:
            continue
        tokens = [one["tokens"] for one in mine]
        left.plot(tokens, [one["peak_bytes"] / 2**20 for one in mine], marker="o", label=name)
        right.plot(tokens, [one["tokens"] / one["cpu_seconds"] for one in mine], marker="o", label=name)
    for axes, label in ((left, "peak growth, MiB"), (right, "tokens per CPU second")):
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens")
        axes.set_ylabel(label)
    figure.legend(*left.get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(file, dpi=110)


def main() -> int:
    """Measure what is missing; exit code 2 where the results cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--sizes", nargs="*", type=int, default=list(SIZES))
    parser.add_argument("--report", action="store_true", help="write page and picture from the steps so far")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="file of the steps")
    parser.add_argument("--by-turns", type=int, metavar="ROUNDS", default=0, help="the shortest and the longest step by turns, instead")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)  # model, then tokens of each step
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run_case(args.child[0], [int(n) for n in args.child[1:]])))
        return 0
    try:
        if not args.report:
            for name in args.only:
                if args.by_turns:
                    alternate(args.results, name, args.by_turns)
                else:
                    measure_missing(args.results, name, args.sizes)
        steps = read(args.results)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write(args.results.with_suffix(".md"), report(steps))
    draw(steps, args.results.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
