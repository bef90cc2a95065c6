"""One training step of the same small Llama under Hugging Face Trainer and under longstride, on this machine's CPU.

Claim measured: tokens per second, and growth of peak resident memory, at 4K, 16K and 64K tokens, on 1 process and on 2 ranks.

What is equal: weights (longstride's initial weights, copied into ``LlamaForCausalLM``), tokens, fp32, AdamW (no weight decay,
the two exclude different parameters from it), clipping at norm 1, constant learning rate, number of sequences and tokens per
optimizer step, threads (all cores on 1 process, one thread per rank on 2 ranks), and the code that measures. Losses of every
step are compared. What differs is named in the result: with 2 ranks Hugging Face Trainer runs its own data parallelism (one
whole sequence per rank), longstride splits every sequence over both ranks (cp = 2) and takes the same two sequences one after
the other. Each case is a fresh process, so peaks do not mix.

  python benchmarks/train_step.py            # everything, about 12 minutes; writes train_step.json and train_step.md beside it
  python benchmarks/train_step.py --quick    # 2K and 4K tokens, prints only
  python benchmarks/train_step.py --only seq_len=65536,ranks=1   # some cases, prints only

The vocabulary of 8,192 is the largest power of two for which the peer's 2 ranks fit 24 GB of memory at 64K tokens; a larger one
favours longstride, whose logits exist one tile at a time. Needs ``transformers`` (make install-dev).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, not as a module

from benchmarks.common import machine, python, where, write_results  # noqa: E402
from models.config import ModelConfig  # noqa: E402

MODEL = ModelConfig(d_model=128, n_heads=2, n_kv_heads=1, head_dim=32, d_ff=352, layers=("full",), n_layers=2)
VOCAB_SIZE = 8192
LEARNING_RATE = 1e-3
BETAS = (0.9, 0.95)
SEED = 0
STEPS = {2048: 3, 4096: 4, 16384: 3, 65536: 1}
"""Optimizer steps per length; the first is left out of the timing where there are several (at 64K tokens a step takes most of a
minute, beside which warming up is nothing)."""
LOSS_TOLERANCE = 1e-4
SYSTEMS = {
    "hf": "Hugging Face Trainer",
    "hf_checkpointing": "Hugging Face Trainer, gradient_checkpointing",
    "longstride": "longstride",
    "longstride_recompute": "longstride, memory.recompute=block, freed blocks given back",
}
PAIRS = (("longstride", "hf"), ("longstride_recompute", "hf_checkpointing"))


@dataclass(frozen=True)
class Case:
    """One process group to measure."""

    system: str
    ranks: int
    seq_len: int

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimizer step over all ranks; the same for both systems."""
        return self.ranks

    @property
    def title(self) -> str:
        """For progress lines."""
        return f"{SYSTEMS[self.system]}, {self.ranks} rank(s), {self.seq_len} tokens"


@dataclass
class Stopwatch:
    """Wall and CPU seconds of each step; CPU seconds (all threads of the process) hardly move with other load on the machine."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def start(self) -> None:
        """A step begins."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """The step ended."""
        self.seconds.append(time.perf_counter() - self._wall)
        self.cpu_seconds.append(time.process_time() - self._cpu)


def sequence(index: int, seq_len: int) -> Any:
    """Token ids [seq_len] of the index-th sequence."""
    import torch

    generator = torch.Generator().manual_seed(1000 + index)
    return torch.randint(VOCAB_SIZE, (seq_len,), generator=generator)


# --- the two systems: each returns (losses, seconds per step, peak growth in bytes) of this rank -------------------------------


def run_hugging_face(case: Case, weights: Path) -> dict[str, Any]:
    """Hugging Face Trainer on LlamaForCausalLM; under a launcher it is the Trainer's DistributedDataParallel."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from memory_mgmt.monitor import MemoryMonitor

    class Sequences(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            for index in range(STEPS[case.seq_len] * case.sequences_per_step):
                tokens = sequence(index, case.seq_len)
                yield {"input_ids": tokens, "labels": tokens}

    stopwatch = Stopwatch()

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            stopwatch.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            stopwatch.stop()

    class KeepLoss(Trainer):
        losses: list[float] = []

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            self.losses.append(float(loss))
            return loss

    monitor = MemoryMonitor(torch.device("cpu"))
    model = LlamaForCausalLM._from_config(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=MODEL.d_model,
            intermediate_size=MODEL.ff_width,
            num_hidden_layers=len(MODEL.layer_kinds),
            num_attention_heads=MODEL.n_heads,
            num_key_value_heads=MODEL.kv_heads,
            head_dim=MODEL.attention_head_dim,
            max_position_embeddings=case.seq_len,
            rms_norm_eps=MODEL.norm_eps,
            tie_word_embeddings=False,
            use_cache=False,
        ),
        attn_implementation="sdpa",
    )
    model.load_state_dict(torch.load(weights, weights_only=True, mmap=True))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=STEPS[case.seq_len],
            per_device_train_batch_size=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch",
            use_cpu=True,
            gradient_checkpointing=case.system == "hf_checkpointing",
            gradient_checkpointing_kwargs={"use_reentrant": False},
            ddp_find_unused_parameters=False,
            accelerator_config={"dispatch_batches": False, "split_batches": False},
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = KeepLoss(model=model, args=arguments, train_dataset=Sequences(), callbacks=[Clock()])
        trainer.train()
    return {"losses": trainer.losses, "peak_bytes": monitor.peak_bytes(), **asdict(stopwatch)}


def run_longstride(case: Case, weights: Path) -> dict[str, Any]:
    """longstride's Engine as its Trainer builds it; with 2 ranks every sequence is split over both."""
    import torch
    import torch.distributed as dist

    from memory_mgmt.config import MemoryConfig
    from memory_mgmt.host_allocator import return_freed_memory
    from memory_mgmt.monitor import MemoryMonitor
    from models.batch import IGNORE_INDEX, Batch, Bounds
    from optim.config import OptimConfig
    from parallel.config import ParallelConfig
    from trainer.build import build_engine, mesh_for
    from trainer.config import DataSection, RunConfig, TrainSection

    device = torch.device("cpu")
    if case.system == "longstride_recompute":
        return_freed_memory()  # what trainer/build.py does where memory is tight
    if case.ranks > 1:
        dist.init_process_group("gloo")
    monitor = MemoryMonitor(device)
    config = RunConfig(
        model=MODEL,
        data=DataSection(seq_len=case.seq_len),
        train=TrainSection(seed=SEED, grad_accum=case.sequences_per_step, precision="fp32"),
        optim=OptimConfig(lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0, clip_norm=1.0),
        parallel=ParallelConfig(cp=case.ranks),
        memory=MemoryConfig(recompute="block" if case.system == "longstride_recompute" else "none"),
    )
    engine = build_engine(config, VOCAB_SIZE, mesh_for(config, device), device)

    def batch(index: int) -> Batch:
        tokens = sequence(index, case.seq_len)
        labels = torch.cat([tokens[1:], torch.tensor([IGNORE_INDEX])])
        positions = torch.arange(case.seq_len)
        return Batch(tokens[None], labels[None], positions[None], Bounds.whole(1, case.seq_len))

    losses, stopwatch = [], Stopwatch()
    for step in range(STEPS[case.seq_len]):
        batches = [batch(step * case.sequences_per_step + i) for i in range(case.sequences_per_step)]
        stopwatch.start()
        losses.append(engine.forward_backward(batches).loss)
        engine.step(LEARNING_RATE)
        stopwatch.stop()
    if case.ranks > 1:
        dist.destroy_process_group()
    return {"losses": losses, "peak_bytes": monitor.peak_bytes(), **asdict(stopwatch)}


def write_weights(path: Path) -> None:
    """longstride's initial weights under Hugging Face names (both use the half-split rotary convention)."""
    import torch

    from models.transformer import Transformer, init_weights

    model = Transformer(MODEL, VOCAB_SIZE)
    init_weights(model, SEED)
    torch.save({hugging_face_name(name): tensor.clone() for name, tensor in model.state_dict().items()}, path)


def hugging_face_name(name: str) -> str:
    """``blocks.0.mixer.wq.weight`` -> ``model.layers.0.self_attn.q_proj.weight`` and so on."""
    renamed = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
    if name in renamed:
        return renamed[name]
    parts = {
        "blocks": "model.layers",
        "mixer.wq": "self_attn.q_proj",
        "mixer.wk": "self_attn.k_proj",
        "mixer.wv": "self_attn.v_proj",
        "mixer.wo": "self_attn.o_proj",
        "ffn.w_gate": "mlp.gate_proj",
        "ffn.w_up": "mlp.up_proj",
        "ffn.w_down": "mlp.down_proj",
        "norm1": "input_layernorm",
        "norm2": "post_attention_layernorm",
    }
    for ours, theirs in parts.items():
        name = name.replace(ours, theirs, 1)
    return name


# --- running cases and reporting -----------------------------------------------------------------------------------------------


def child(case: Case, weights: Path, out: Path) -> None:
    """What a fresh process does: run, and write this rank's figures."""
    run = run_hugging_face if case.system.startswith("hf") else run_longstride
    rank = int(os.environ.get("RANK", "0"))
    out.with_suffix(f".{rank}").write_text(json.dumps(run(case, weights)))


def measure(case: Case, weights: Path, folder: Path, threads: int) -> dict[str, Any]:
    """Run one case in fresh processes, ``threads`` per rank (0: all cores shared among the ranks).

    Returns its figures, or {'error': ...} when it dies (for instance killed for memory).
    """
    out = folder / "case"
    for old in folder.glob("case.*"):
        old.unlink()
    script = [Path(__file__).resolve(), "--child", json.dumps(asdict(case)), "--weights", weights, "--out", out]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"] if case.ranks > 1 else []
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = str(threads or max(1, (os.cpu_count() or 1) // case.ranks))
    _, failure = python(*launcher, *script, environment=environment)
    files = sorted(folder.glob("case.*"))
    if failure or len(files) != case.ranks:
        return {**asdict(case), "error": failure or f"{len(files)} of {case.ranks} ranks wrote figures"}
    return {**asdict(case), **combine(case, [json.loads(file.read_text()) for file in files])}


def combine(case: Case, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of the whole group from those of its ranks."""
    seconds = [max(step) for step in zip(*(rank["seconds"] for rank in ranks), strict=True)]
    cpu_seconds = [sum(step) for step in zip(*(rank["cpu_seconds"] for rank in ranks), strict=True)]
    first = 1 if len(seconds) > 1 else 0
    losses = [statistics.fmean(step) for step in zip(*(rank["losses"] for rank in ranks), strict=True)]
    peaks = [rank["peak_bytes"] for rank in ranks]
    tokens = case.sequences_per_step * case.seq_len
    return {
        "losses": losses,
        "step_seconds": seconds,
        "step_cpu_seconds": cpu_seconds,
        "tokens_per_second": tokens / statistics.median(seconds[first:]),
        "tokens_per_cpu_second": tokens / statistics.median(cpu_seconds[first:]),
        "peak_bytes_largest_rank": max(peaks),
        "peak_bytes_all_ranks": sum(peaks),
    }


def compare(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratios longstride over peer for every pair of cases that both ended."""
    by_case = {(r["system"], r["ranks"], r["seq_len"]): r for r in results if "error" not in r}
    rows = []
    for ours_name, theirs_name in PAIRS:
        for (system, ranks, seq_len), ours in by_case.items():
            theirs = by_case.get((theirs_name, ranks, seq_len))
            if system != ours_name or theirs is None:
                continue
            differences = [abs(a - b) / abs(b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
            rows.append(
                {
                    "longstride": ours_name,
                    "peer": theirs_name,
                    "ranks": ranks,
                    "seq_len": seq_len,
                    # Above 1 longstride is faster; for CPU time and memory below 1 it needs less.
                    "throughput_ratio": ours["tokens_per_second"] / theirs["tokens_per_second"],
                    "cpu_time_ratio": theirs["tokens_per_cpu_second"] / ours["tokens_per_cpu_second"],
                    "memory_ratio": ours["peak_bytes_all_ranks"] / theirs["peak_bytes_all_ranks"],
                    "largest_loss_difference": max(differences),
                    "losses_equal": max(differences) <= LOSS_TOLERANCE,
                }
            )
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        "# One training step: longstride beside Hugging Face Trainer",
        "",
        f"{where(report['machine'], 'torch', 'transformers')}. Made by `python benchmarks/train_step.py`, whose first lines say what is "
        "equal and what is not.",
        "",
        f"Model: {report['model']}. fp32, AdamW; one sequence per step on 1 rank, two on 2 ranks.",
        "",
        "| tokens | ranks | system | tokens/s | peak growth, all ranks | largest rank | last loss |",
        "|---:|---:|---|---:|---:|---:|---:|",
    ]
    for r in report["cases"]:
        head = f"| {r['seq_len']:,} | {r['ranks']} | {SYSTEMS[r['system']]} |"
        if "error" in r:
            lines.append(f"{head} failed: {r['error']} | | | |")
            continue
        memory = f"{r['peak_bytes_all_ranks'] / 2**20:,.0f} MiB | {r['peak_bytes_largest_rank'] / 2**20:,.0f} MiB"
        lines.append(f"{head} {r['tokens_per_second']:,.0f} | {memory} | {r['losses'][-1]:.6f} |")
    lines += [
        "",
        "| tokens | ranks | longstride | against | throughput | CPU time | peak growth | losses |",
        "|---:|---:|---|---|---:|---:|---:|---|",
    ]
    for row in report["ratios"]:
        equal = f"equal within {row['largest_loss_difference']:.0e}" if row["losses_equal"] else "DIFFER"
        lines.append(
            f"| {row['seq_len']:,} | {row['ranks']} | {SYSTEMS[row['longstride']]} | {SYSTEMS[row['peer']]} | "
            f"{row['throughput_ratio']:.2f}x | {row['cpu_time_ratio']:.2f}x | {row['memory_ratio']:.2f}x | {equal} |"
        )
    return "\n".join(lines) + "\n"


def cases(lengths: list[int], only: str | None) -> list[Case]:
    """Every case, or those that match ``only`` (``seq_len=65536,ranks=1,system=hf``)."""
    every = [Case(system, ranks, length) for length in lengths for ranks in (1, 2) for system in SYSTEMS]
    wanted = dict(part.split("=", 1) for part in only.split(",")) if only else {}
    return [case for case in every if all(str(getattr(case, key)) == value for key, value in wanted.items())]


def main() -> int:
    """Run the cases one after the other, print ratios; exit code 1 when a loss differs or a longstride case fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="2K and 4K tokens only; nothing is written")
    parser.add_argument("--only", help="some cases: seq_len=N,ranks=N,system=NAME; nothing is written")
    parser.add_argument("--threads", type=int, default=0, help="threads per rank; 0 (default) shares all cores among the ranks")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(Case(**json.loads(arguments.child)), arguments.weights, arguments.out)
        return 0
    results = []
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        write_weights(weights)
        for case in cases([2048, 4096] if arguments.quick else [4096, 16384, 65536], arguments.only):
            start = time.perf_counter()
            print(f"{case.title} ...", flush=True)
            results.append(measure(case, weights, Path(folder), arguments.threads))
            print(f"  {results[-1].get('error') or round(results[-1]['tokens_per_second'])} tokens/s ({time.perf_counter() - start:.0f} s)")
    model = f"{MODEL.model_dump_json(exclude_defaults=True)}, vocabulary {VOCAB_SIZE}"
    report = {"machine": machine("torch", "transformers"), "model": model, "cases": results, "ratios": compare(results)}
    print(markdown(report))
    if not (arguments.quick or arguments.only or arguments.threads):
        write_results(__file__, report, markdown(report))
    failed = [r for r in results if "error" in r and r["system"].startswith("longstride")]
    return 1 if failed or not all(row["losses_equal"] for row in report["ratios"]) else 0


if __name__ == "__main__":
    sys.exit(main())
