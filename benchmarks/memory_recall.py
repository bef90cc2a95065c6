"""Does a memory remember? Recall of key-value pairs that lie further back than attention reaches, with and without a memory.

The task is multi-query associative recall (MQAR, arXiv 2312.04927) with a gap: pairs first, then filler, then queries, and every query is
further from its pair than all sliding-window layers together see. So a model without memory can only guess. Every variant gets the same
width, steps and batches. Some learn with a curriculum (``GROWN``): first queries right behind the pairs, then gaps that grow (published
recipes of segment memories grow the number of segments likewise); the model without memory is trained either way. Only the whole gap is
scored, on sequences that were never trained on. A trained model is also asked with its memory emptied before the queries: what it then
recalls did not come from the memory.

Runs are kept one by one in memory_recall.jsonl beside this script: whatever ends it, the next call does only what is missing. For each
seed the learning rates are tried until a run has passed 97%.

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
from dataclasses import asdict, dataclass, replace
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

    def examples(self, batch: int, generator: torch.Generator, forgotten: bool = False) -> Batch:
        """K pairs of different keys, filler, then Q keys of the pairs, drawn with repetition. Labels stand at these keys only; the values
        never follow, so that no query helps another. ``forgotten``: queries are a document of their own, for which memories begin anew."""
        keys_BK = torch.rand(batch, self.keys, generator=generator).argsort(1)[:, : self.pairs]
        values_BK = torch.randint(self.values, (batch, self.pairs), generator=generator) + self.keys
        filler_BG = torch.randint(self.fillers, (batch, self.gap), generator=generator) + self.keys + self.values
        asked_BQ = torch.randint(self.pairs, (batch, self.queries), generator=generator)
        pairs = torch.stack([keys_BK, values_BK], 2).flatten(1)
        tokens_BT = torch.cat([pairs, filler_BG, keys_BK.gather(1, asked_BQ)], 1)
        labels_BT = torch.full_like(tokens_BT, IGNORE_INDEX)
        labels_BT[:, -self.queries :] = values_BK.gather(1, asked_BQ)
        positions_BT = torch.arange(self.tokens).expand(batch, self.tokens).contiguous()
        whole = Bounds.whole(batch, self.tokens)
        apart = Bounds(self.tokens, ((0, self.tokens),), ((0, self.tokens - self.queries),) * batch)
        return Batch(tokens_BT, labels_BT, positions_BT, apart if forgotten else whole)


TASK = Task()
WINDOW = 16
SHAPE: dict[str, Any] = {"d_model": 64, "n_heads": 2, "d_ff": 128, "window": WINDOW, "vocab_size": TASK.vocab, "init_std": 0.07}
PROTOCOL: dict[str, Any] = {
    "task": asdict(TASK),
    "shape": SHAPE,
    "curriculum": [[0.25, [0]], [0.5, [0, 8, 16]], [1.0, [0, 16, TASK.gap, TASK.gap]]],
    "steps": 800,
    "batch": 32,
    "weight_decay": 0.01,
    "warmup": 0.1,
    "clip": 1.0,
}
"""``curriculum``: up to these shares of the steps a batch's gap is drawn from these lengths."""


_NETWORK: dict[str, Any] = {"chunk_size": 16, "expansion": 1.0}


def _with(**memory: Any) -> dict[str, Any]:
    """The memory reads the embeddings, without what a window mixes into them."""
    return {"layers": ["memory", "swa"], "memory": memory}


def _behind(**memory: Any) -> dict[str, Any]:
    """The memory behind a window, with one head of the whole width."""
    return {"layers": ["swa", "memory"], "memory": {"n_heads": 1, **memory}}


def _layer(**memory: Any) -> dict[str, Any]:
    """The memory added to a window's layer, as papers have it whose layers attend to their tokens and to the memory; a window below."""
    return {"layers": ["swa", "memory"], "memory": {"attach": "mal", **memory}}


def _around(kind: str, **own: Any) -> dict[str, Any]:
    """A memory around layers that see one segment, as long as the window, and nothing before it."""
    return {"layers": ["full", "full"], "memory": {"kind": kind, kind: {"segment": WINDOW, **own}}}


VARIANTS: dict[str, dict[str, Any]] = {
    "swa": {"layers": ["swa", "swa"]},
    "swa_grown": {"layers": ["swa", "swa"]},
    "full": {"layers": ["full", "full"]},
    "gated_deltanet": _behind(kind="gated_deltanet"),
    "gated_deltanet_grown": _behind(kind="gated_deltanet"),
    "mamba2": _behind(kind="mamba2", mamba2={"state_dim": 64, "expand": 1.0}),
    "gsa": _behind(kind="gsa", gsa={"n_slots": 32}),
    "titans_mag": _with(kind="titans", attach="mag", titans=_NETWORK),
    "titans_mac": _with(kind="titans", attach="mac", mac={"segment": WINDOW, "residual": True}, titans={"expansion": 1.0}),
    "titans_mac_attention_only": _with(kind="titans", attach="mac", mac={"segment": WINDOW}, titans={"expansion": 1.0}),
    "rmt": _around("rmt", tokens=8),
    "armt": _around("armt", tokens=8),
    "hmt": _around("hmt", sensory=1),
    "neurocache": _with(kind="neurocache", neurocache={"compression": 2, "top_k": 1, "neighborhood": 2, "segment": 16, "cache_size": 64}),
    "slots": _layer(kind="slots", slots={"n_slots": 16, "segment": 8}),
    "lm2": _layer(kind="slots", slots={"variant": "lm2", "n_slots": 16, "segment": 8}),
    "fam": {"layers": ["swa", "memory"], "memory": {"kind": "fam", "fam": {"n_feedback": 8, "block": 8}}},
    "infini": _behind(kind="infini", infini={"segment": WINDOW}),
    "mom": _behind(kind="mom", mom={"n_memories": 2, "top_k": 1}),
    "titans_lmm": _with(kind="titans", titans=_NETWORK),
    "titans_mal": _with(kind="titans", attach="mal", titans=_NETWORK),
    "titans_linear": _with(kind="titans", titans={"chunk_size": 16, "network": "linear"}),
    "yaad": _with(kind="titans", titans={**_NETWORK, "variant": "yaad"}),
    "moneta": _with(kind="titans", titans={**_NETWORK, "variant": "moneta"}),
    "lact": _with(kind="titans", titans={**_NETWORK, "variant": "lact"}),
}
RATES = (1e-2, 4e-3, 2e-3)
"""Learning rates in the order in which they are tried; with the curriculum the second is first."""
GROWN = ("swa_grown", "gated_deltanet_grown", "rmt", "armt", "hmt", "slots", "lm2", "fam")
"""Variants that are trained with the curriculum."""


def drawn_gap(variant: str, share: float, generator: torch.Generator) -> int:
    """The gap of a batch for which ``share`` of the steps have gone."""
    if variant not in GROWN:
        return TASK.gap
    gaps = next(gaps for until, gaps in PROTOCOL["curriculum"] if share <= until)
    return gaps[int(torch.randint(len(gaps), (), generator=generator))]


def _held_out() -> torch.Generator:
    return torch.Generator().manual_seed(10_000)


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
    generator, held_out = torch.Generator().manual_seed(seed), TASK.examples(256, _held_out())
    begun, score, step = time.process_time(), 0.0, 0
    for step in range(1, steps + 1):
        one = replace(TASK, gap=drawn_gap(variant, step / steps, generator)).examples(batch, generator)
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
    emptied = accuracy(model, TASK.examples(256, _held_out(), forgotten=True))
    return {
        "accuracy": round(score, 4),
        "emptied": round(emptied, 4),
        "steps": step,
        "cpu_seconds": round(seconds, 1),
        "parameters": count,
    }


def settings_of(variant: str) -> dict[str, Any]:
    """What a run of ``variant`` is kept with, and counted by."""
    return {"variant": variant, "model": VARIANTS[variant], "curriculum": variant in GROWN}


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
        same = (r for r in self.records if all(r.get(name) == value for name, value in settings_of(variant).items()))
        return sorted(same, key=lambda r: -r["accuracy"])

    def has(self, variant: str, lr: float, seed: int) -> bool:
        """Whether this run is there."""
        return any((r["lr"], r["seed"]) == (lr, seed) for r in self.of(variant))


def run_missing(runs: Runs, variant: str, args: argparse.Namespace) -> None:
    """A variant's runs, one after the other; of each seed until one learning rate has recalled enough."""
    for seed in args.seeds:
        for lr in args.lr or ((RATES[1], RATES[0], *RATES[2:]) if variant in GROWN else RATES):
            tried = Runs.read(args.results)
            if any(r["accuracy"] > ENOUGH and r["seed"] == seed for r in tried.of(variant)):
                break
            if tried.has(variant, lr, seed):
                continue
            result = train(variant, lr, seed, PROTOCOL["steps"], PROTOCOL["batch"], args.verbose)
            runs.add({**settings_of(variant), "lr": lr, "seed": seed, **result, "machine": machine("torch")})
            end = f"{result['accuracy']:6.1%} after {result['steps']} steps, {result['cpu_seconds']:.0f} s"
            print(f"{variant:16s} lr {lr:g} seed {seed}: {end}", flush=True)


def _curriculum() -> str:
    parts, since = [], 0.0
    for until, gaps in PROTOCOL["curriculum"]:
        shares = [f"{gap} ({gaps.count(gap)} of {len(gaps)})" if len(gaps) > 1 else f"{gap}" for gap in sorted(set(gaps))]
        parts.append(f"{since:.0%} to {until:.0%} of the steps a gap of {', '.join(shares)}")
        since = until
    return "; ".join(parts)


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
        f"warm-up of a tenth. Curriculum where the table says so: {_curriculum()}. Scored with the whole gap on held-out sequences; of "
        f"each seed the learning rates {', '.join(f'{lr:g}' for lr in RATES)} are tried until one run passes {ENOUGH:.0%}, where it stops. "
        f"*Emptied*: the best run's model, its memory emptied before the queries. `python benchmarks/memory_recall.py`",
        "",
        "| variant | layers | curriculum | parameters | recall | emptied | steps | learning rate, seed | CPU seconds | best of each seed "
        "| runs made |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant, settings in VARIANTS.items():
        made = runs.of(variant)
        if made:
            best = made[0]
            seeds = [next(r for r in made if r["seed"] == seed) for seed in sorted({r["seed"] for r in made})]
            lines.append(
                f"| {variant} | {', '.join(settings['layers'])} | {'yes' if variant in GROWN else 'no'} | {best['parameters']:,} "
                f"| {best['accuracy']:.1%} | {best['emptied']:.1%} | {best['steps']} "
                f"| {best['lr']:g}, {best['seed']} | {best['cpu_seconds']:.0f} "
                f"| {', '.join(format(r['accuracy'], '.1%') for r in seeds)} | {len(made)} |"
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
    parser.add_argument("--lr", nargs="*", type=float, help="instead of the three")
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
