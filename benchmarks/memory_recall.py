"""Does a memory remember? Recall of key-value pairs that lie further back than attention reaches, with and without a memory.

The task is multi-query associative recall (MQAR, arXiv 2312.04927) with a gap: pairs first, then filler, then queries, and every query is
further from its pair than all sliding-window layers together see. So a model without memory can only guess. Every variant gets the same
width, steps and batches; its score is the best of the learning rates and seeds, on sequences that were never trained on.

Runs are kept one by one in memory_recall.jsonl beside this script: whatever ends it, the next call does only what is missing. A variant
needs no further run once one has passed 97%; the others go through all learning rates and seeds.

    python benchmarks/memory_recall.py                                   # all that is missing
    python benchmarks/memory_recall.py --only titans_mag --lr 1e-2       # one variant, one learning rate
    python benchmarks/memory_recall.py --report                          # writes memory_recall.md from the runs so far

Legend: B batch, T tokens, K pairs, Q queries, G filler tokens.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]  # run as a script, not as a module

import torch  # noqa: E402
from common import machine, where  # noqa: E402
from torch import Tensor  # noqa: E402

from models.batch import IGNORE_INDEX, Batch, Bounds  # noqa: E402
from models.config import ModelConfig  # noqa: E402
from models.transformer import Transformer, init_weights  # noqa: E402

ENOUGH = 0.97
"""A run that recalls so much is stopped, and its variant is done."""
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Task:
    """What is asked. Reach: ``layers`` windows of w see layers x (w - 1) tokens back; the gap alone is as long."""

    pairs: int = 4
    gap: int = 30
    queries: int = 8
    keys: int = 8
    values: int = 16
    fillers: int = 16

    @property
    def vocab(self) -> int:
        """Keys, then values, then fillers."""
        return self.keys + self.values + self.fillers

    @property
    def tokens(self) -> int:
        """T"""
        return 2 * self.pairs + self.gap + self.queries

    def examples(self, batch: int, generator: torch.Generator) -> Batch:
        """K pairs of different keys, filler, then Q keys of the pairs, drawn with repetition. Labels stand at these keys only; the values
        never follow, so that no query helps another."""
        keys_BK = torch.rand(batch, self.keys, generator=generator).argsort(1)[:, : self.pairs]
        values_BK = torch.randint(self.values, (batch, self.pairs), generator=generator) + self.keys
        filler_BG = torch.randint(self.fillers, (batch, self.gap), generator=generator) + self.keys + self.values
        asked_BQ = torch.randint(self.pairs, (batch, self.queries), generator=generator)
        pairs = torch.stack([keys_BK, values_BK], 2).flatten(1)
        tokens_BT = torch.cat([pairs, filler_BG, keys_BK.gather(1, asked_BQ)], 1)
        labels_BT = torch.full_like(tokens_BT, IGNORE_INDEX)
        labels_BT[:, -self.queries :] = values_BK.gather(1, asked_BQ)
        positions_BT = torch.arange(self.tokens).expand(batch, self.tokens).contiguous()
        return Batch(tokens_BT, labels_BT, positions_BT, Bounds.whole(batch, self.tokens))


TASK = Task()
WINDOW = 16
SHAPE: dict[str, Any] = {"d_model": 64, "n_heads": 2, "d_ff": 128, "window": WINDOW, "vocab_size": TASK.vocab, "init_std": 0.07}
PROTOCOL: dict[str, Any] = {
    "task": asdict(TASK),
    "shape": SHAPE,
    "steps": 800,
    "batch": 32,
    "weight_decay": 0.01,
    "warmup": 0.1,
    "clip": 1.0,
}


_NETWORK: dict[str, Any] = {"chunk_size": 16, "expansion": 1.0}


def _with(**memory: Any) -> dict[str, Any]:
    """The memory reads the embeddings, without what a window mixes into them."""
    return {"layers": ["memory", "swa"], "memory": memory}


def _behind(**memory: Any) -> dict[str, Any]:
    """The memory behind a window, with one head of the whole width."""
    return {"layers": ["swa", "memory"], "memory": {"n_heads": 1, **memory}}


VARIANTS: dict[str, dict[str, Any]] = {
    "swa": {"layers": ["swa", "swa"]},
    "full": {"layers": ["full", "full"]},
    "gated_deltanet": _behind(kind="gated_deltanet"),
    "mamba2": _behind(kind="mamba2", mamba2={"state_dim": 64, "expand": 1.0}),
    "gsa": _behind(kind="gsa", gsa={"n_slots": 32}),
    "titans_mag": _with(kind="titans", attach="mag", titans=_NETWORK),
    "titans_mac": _with(kind="titans", attach="mac", mac={"segment": 16}, titans={"expansion": 1.0}),
    "rmt": {"layers": ["full", "full"], "memory": {"kind": "rmt", "rmt": {"segment": 24, "tokens": 8}}},
    "neurocache": _with(kind="neurocache", neurocache={"compression": 2, "top_k": 1, "neighborhood": 2, "segment": 16, "cache_size": 64}),
    "slots": _behind(kind="slots", n_heads=None, slots={"n_slots": 8, "segment": 16}),
    "titans_lmm": _with(kind="titans", titans=_NETWORK),
    "titans_mal": _with(kind="titans", attach="mal", titans=_NETWORK),
    "titans_linear": _with(kind="titans", titans={"chunk_size": 16, "network": "linear"}),
    "yaad": _with(kind="titans", titans={**_NETWORK, "variant": "yaad"}),
    "moneta": _with(kind="titans", titans={**_NETWORK, "variant": "moneta"}),
    "lact": _with(kind="titans", titans={**_NETWORK, "variant": "lact"}),
}
RATES = (1e-2, 4e-3, 2e-2)


@torch.no_grad()
def accuracy(model: Transformer, batch: Batch) -> float:
    """Share of queries whose most likely next token is the value."""
    assert model.head is not None
    asked = batch.labels_BT != IGNORE_INDEX
    logits: Tensor = model.hidden(batch)[asked] @ model.head.weight.t()
    return (logits.argmax(-1) == batch.labels_BT[asked]).float().mean().item()


def train(variant: str, lr: float, seed: int, steps: int, batch: int, verbose: bool = False) -> dict[str, Any]:
    """One model, trained until it answers enough of a held-out batch or the steps are over."""
    model = Transformer(ModelConfig.model_validate({**SHAPE, **VARIANTS[variant]}), TASK.vocab)
    init_weights(model, seed)
    # Gates, norms and biases are not decayed, as in the product's own groups.
    parts = [[p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    groups = [{"params": parts[0]}, {"params": parts[1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr, weight_decay=PROTOCOL["weight_decay"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=PROTOCOL["warmup"])
    generator, held_out = torch.Generator().manual_seed(seed), TASK.examples(256, torch.Generator().manual_seed(10_000))
    begun, score, step = time.process_time(), 0.0, 0
    for step in range(1, steps + 1):
        one = TASK.examples(batch, generator)
        loss = model(one).sum() / (one.labels_BT != IGNORE_INDEX).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), PROTOCOL["clip"])
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            score = accuracy(model, held_out)
            if verbose:
                print(f"  {variant} lr {lr:g} seed {seed} step {step}: loss {loss.item():.3f}, {score:.1%}", flush=True)
            if score > ENOUGH:
                break
    count, seconds = sum(p.numel() for p in model.parameters()), time.process_time() - begun
    return {"accuracy": round(score, 4), "steps": step, "cpu_seconds": round(seconds, 1), "parameters": count}


class Runs:
    """The runs in a file of one JSON object per line, the first one the protocol. Several processes may add to it."""

    def __init__(self, file: Path, records: list[dict[str, Any]]) -> None:
        self.file, self.records = file, records

    @staticmethod
    def read(file: Path) -> Runs:
        """Of ``file``, which need not exist. Raises ValueError where its runs were made by another protocol."""
        if not file.exists():
            return Runs(file, [])
        first, *rest = (json.loads(line) for line in file.read_text().splitlines() if line.strip())
        if first.get("protocol") != PROTOCOL:
            raise ValueError(f"{file} holds runs of another protocol ({first.get('protocol')}); move it away or name another --results")
        return Runs(file, rest)

    def add(self, record: dict[str, Any]) -> None:
        """Keep one run, on disk before this returns. What another process has added in between stays."""
        folder = os.open(self.file.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            self.records = [*Runs.read(self.file).records, record]
            unfinished = self.file.with_suffix(".unfinished")
            with unfinished.open("w") as out:
                out.writelines(json.dumps(line) + "\n" for line in ({"protocol": PROTOCOL}, *self.records))
                out.flush()
                os.fsync(out.fileno())
            unfinished.replace(self.file)
        finally:
            os.close(folder)

    def of(self, variant: str) -> list[dict[str, Any]]:
        """A variant's runs with its present settings, the best first."""
        same = (r for r in self.records if r["variant"] == variant and r["model"] == VARIANTS[variant])
        return sorted(same, key=lambda r: -r["accuracy"])

    def has(self, variant: str, lr: float, seed: int) -> bool:
        """Whether this run is there."""
        return any((r["lr"], r["seed"]) == (lr, seed) for r in self.of(variant))


def run_missing(runs: Runs, variant: str, args: argparse.Namespace) -> None:
    """A variant's runs, one after the other, until one has recalled enough."""
    for seed in args.seeds:
        for lr in args.lr:
            tried = Runs.read(args.results)
            if any(r["accuracy"] > ENOUGH for r in tried.of(variant)):
                return
            if tried.has(variant, lr, seed):
                continue
            result = train(variant, lr, seed, PROTOCOL["steps"], PROTOCOL["batch"], args.verbose)
            runs.add({"variant": variant, "model": VARIANTS[variant], "lr": lr, "seed": seed, **result, "machine": machine("torch")})
            end = f"{result['accuracy']:6.1%} after {result['steps']} steps, {result['cpu_seconds']:.0f} s"
            print(f"{variant:16s} lr {lr:g} seed {seed}: {end}", flush=True)


def report(runs: Runs) -> str:
    """Markdown."""
    lines = [
        "# Recall beyond the window",
        "",
        f"{TASK.pairs} pairs, then {TASK.gap} filler tokens, then {TASK.queries} queries: {TASK.tokens} tokens, {TASK.keys} keys, "
        f"{TASK.values} values. Two layers of width {SHAPE['d_model']}, window {WINDOW}: without memory they see {2 * (WINDOW - 1)} tokens "
        f"back, and every query is further from its pair. Guessing scores {1 / TASK.values:.1%}, knowing the values but not whose they are "
        f"{1 / TASK.pairs:.0%}.",
        "",
        f"AdamW, weight decay {PROTOCOL['weight_decay']}, batch {PROTOCOL['batch']}, at most {PROTOCOL['steps']} steps, cosine after a "
        f"warm-up of a tenth. The best of the runs; a run stops at {ENOUGH:.0%}. `python benchmarks/memory_recall.py`",
        "",
        "| variant | layers | parameters | recall | steps | learning rate, seed | CPU seconds | runs made | range of their recall |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for variant, settings in VARIANTS.items():
        made = runs.of(variant)
        if made:
            best, worst = made[0], made[-1]
            lines.append(
                f"| {variant} | {', '.join(settings['layers'])} | {best['parameters']:,} | {best['accuracy']:.1%} | {best['steps']} "
                f"| {best['lr']:g}, {best['seed']} | {best['cpu_seconds']:.0f} | {len(made)} "
                f"| {worst['accuracy']:.1%} to {best['accuracy']:.1%} |"
            )
    missing = [variant for variant in VARIANTS if not runs.of(variant)]
    if missing:
        lines += ["", f"No run yet: {', '.join(missing)}."]
    if runs.records:
        lines += ["", f"Measured on {where(runs.records[-1]['machine'], 'torch')}; one thread per run, beside other work."]
    return "\n".join([*lines, ""])


def main() -> int:
    """Run what is missing of the variants asked for; exit code 2 where the results cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=sorted(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--lr", nargs="*", type=float, default=list(RATES))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--verbose", action="store_true", help="the score every 50 steps")
    parser.add_argument("--report", action="store_true", help="write the page from the runs so far")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="file of the runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        runs = Runs.read(args.results)
        if not args.report:
            for variant in args.only:
                run_missing(runs, variant, args)
        args.results.with_suffix(".md").write_text(report(Runs.read(args.results)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
