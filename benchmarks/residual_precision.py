"""What ``train.residual: bf16`` costs in loss: the same small model, data and seeds with the residual stream in float32 and in bfloat16.

Held-out loss after training on text, several seeds each; the difference is taken seed by seed, since a seed's first weights and order of
data are the same both ways. Writes residual_precision.json and .md beside this file, run by run; what is there is not made again.

    python benchmarks/residual_precision.py [--seeds 3] [--steps 100]      about a minute of CPU per run
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
MODEL = ["model.d_model=96", "model.n_heads=4", "model.n_layers=8", "model.layers=[full]"]
TRAINING = ["data.seq_len=256", "train.micro_batch_size=8", "train.precision=bf16", "train.eval_sequences=64", "optim.lr=2e-3"]
QUIET = ["train.threads_per_rank=1", "memory.plan=estimate", "parallel.cp=1"]
WAYS = ("fp32", "bf16")


def run(residual: str, seed: int, steps: int) -> float:
    """Held-out loss in nats per token after ``steps`` steps."""
    with tempfile.TemporaryDirectory() as root:
        chosen = [f"train.residual={residual}", f"train.seed={seed}", f"train.steps={steps}", f"train.eval_every_steps={steps}"]
        place = [f"run.root={root}", "run.name=case"]
        command = [sys.executable, str(HOME / "longstride.py"), "train", "debug_cpu", *MODEL, *TRAINING, *QUIET, *chosen, *place]
        done = subprocess.run(command, capture_output=True, text=True, cwd=root)
        if done.returncode:
            raise SystemExit(f"{residual}, seed {seed}: exit code {done.returncode}\n{done.stderr[-2000:]}{done.stdout[-1000:]}")
        records = [json.loads(line) for line in (Path(root) / "case" / "metrics.jsonl").read_text().splitlines()]
        return [record["loss"] for record in records if record["split"] == "valid"][-1]


def write(file: Path, steps: int, losses: dict[str, dict[str, float]]) -> None:
    """The results as JSON and, beside it, as a table."""
    file.write_text(json.dumps({"steps": steps, "losses": losses}, indent=2) + "\n")
    seeds = sorted(set(losses["fp32"]) & set(losses["bf16"]), key=int)
    lines = [
        "# The residual stream in bfloat16 (`train.residual: bf16`): held-out loss",
        "",
        f"8 layers of width 96, sequences of 256 tokens, {steps} steps of 8 sequences, `train.precision: bf16`, CPU. "
        "`python benchmarks/residual_precision.py`",
        "",
        "| seed | float32 | bfloat16 | difference |",
        "|---|---:|---:|---:|",
    ]
    differences = [losses["bf16"][seed] - losses["fp32"][seed] for seed in seeds]
    for seed, difference in zip(seeds, differences, strict=True):
        lines.append(f"| {seed} | {losses['fp32'][seed]:.4f} | {losses['bf16'][seed]:.4f} | {difference:+.4f} |")
    if len(seeds) > 1:
        spread = statistics.stdev(losses["fp32"][seed] for seed in seeds)
        mean, deviation = statistics.mean(differences), statistics.stdev(differences)
        lines += ["", f"Mean difference {mean:+.4f} nats (standard deviation {deviation:.4f}); seeds themselves spread by {spread:.4f}."]
    file.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Make the runs that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    file = Path(__file__).with_suffix(".json")
    known = json.loads(file.read_text()) if file.exists() else {}
    losses = known["losses"] if known.get("steps") == arguments.steps else {way: {} for way in WAYS}
    for seed in range(arguments.seeds):
        for way in WAYS:
            if str(seed) not in losses[way]:
                losses[way][str(seed)] = run(way, seed, arguments.steps)
                print(f"seed {seed}, residual {way}: {losses[way][str(seed)]:.4f}", flush=True)
                write(file, arguments.steps, losses)


if __name__ == "__main__":
    main()
