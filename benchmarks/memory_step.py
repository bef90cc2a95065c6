"""Peak memory and time of one training step at 131,072 tokens under several ways to keep activations, on this machine's CPU.

Claim measured: a step under a memory policy needs at most 0.35 times the memory of the plain model with per-block checkpointing and
a loss on whole logits, at no more than 1.25 times its time. Two models: full attention, and Gated DeltaNet memory layers.

What is equal: weights, tokens, fp32, clipping at norm 1 and AdamW, threads (all cores), one sequence; the losses of all ways are
compared. Each case is a fresh process that first takes a step of 1,024 tokens, so that libraries and optimizer states exist. Memory is
the growth of peak resident memory in the measured step above the process before the model was built.

  plain            this repository's modules, torch.utils.checkpoint around every block, torch's cross_entropy on all logits
  save_on_cpu      no checkpointing, torch.autograd.graph.save_on_cpu around the forward pass, torch's cross_entropy on all logits
                   (on a CPU it moves nothing, so it shows what keeping everything costs)
  hf               Hugging Face LlamaForCausalLM of the same shape with gradient checkpointing (no peer of the memory model there)
  block            longstride, only block inputs kept, no tiles but the loss's
  policy           longstride with the policy named in the result

  python benchmarks/memory_step.py            # everything, 10 to 20 minutes; writes memory_step.json and memory_step.md beside it
  python benchmarks/memory_step.py --quick    # 8K tokens, prints only
  python benchmarks/memory_step.py --only attention,policy    # one case, prints only
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, not as a module

from benchmarks.common import machine, python, where, write_results  # noqa: E402
from benchmarks.train_step import hugging_face_name  # noqa: E402
from memory_mgmt.config import MemoryConfig  # noqa: E402
from models.config import MemoryModuleConfig, ModelConfig  # noqa: E402

TOKENS, WARM_UP_TOKENS, QUICK_TOKENS = 131_072, 1_024, 8_192
VOCAB_SIZE = 4096
MODELS = {
    "attention": ModelConfig(d_model=64, n_heads=1, head_dim=32, d_ff=192, layers=("full",), n_layers=2),
    "memory": ModelConfig(d_model=64, n_heads=2, d_ff=192, layers=("memory",), n_layers=2, memory=MemoryModuleConfig(chunk_size=64)),
}
POLICIES = {
    "attention": MemoryConfig(recompute="mixer", ffn_tile_tokens=4096, loss_tile_tokens=1024),
    "memory": MemoryConfig(ffn_tile_tokens=4096, memory_tile_tokens=4096, loss_tile_tokens=1024),
}
WAYS = {"attention": ("plain", "save_on_cpu", "hf", "block", "policy"), "memory": ("plain", "save_on_cpu", "block", "policy")}
MEMORY_GOAL, TIME_GOAL = 0.35, 1.25
LOSS_TOLERANCE = 1e-4


# --- one case, in a process of its own -----------------------------------------------------------------------------------------


def longstride_model(name: str) -> Any:
    """The model with its initial weights."""
    from models.transformer import Transformer, init_weights

    model = Transformer(MODELS[name], VOCAB_SIZE)
    init_weights(model, 0)
    return model


def hugging_face_model(name: str) -> Any:
    """LlamaForCausalLM of the same shape and weights, with gradient checkpointing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = MODELS[name]
    model = LlamaForCausalLM._from_config(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=shape.d_model,
            intermediate_size=shape.ff_width,
            num_hidden_layers=len(shape.layer_kinds),
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.attention_head_dim,
            max_position_embeddings=TOKENS,
            rms_norm_eps=shape.norm_eps,
            tie_word_embeddings=False,
            use_cache=False,
        ),
        attn_implementation="sdpa",
    )
    model.load_state_dict({hugging_face_name(key): value for key, value in longstride_model(name).state_dict().items()})
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model


def loss_of(model: Any, way: str, tokens_BT: Any) -> Any:
    """Mean loss over all tokens but the last, differentiable."""
    import torch
    from torch.nn import functional as F
    from torch.utils.checkpoint import checkpoint

    from models.batch import IGNORE_INDEX, Batch, Bounds

    if way == "hf":
        return model(input_ids=tokens_BT, labels=tokens_BT).loss
    T = tokens_BT.shape[1]
    labels_BT = torch.cat([tokens_BT[:, 1:], tokens_BT.new_full((1, 1), IGNORE_INDEX)], dim=1)
    batch = Batch(tokens_BT, labels_BT, torch.arange(T).unsqueeze(0), Bounds.whole(1, T))
    if way in ("block", "policy"):
        return model(batch).sum() / (T - 1)

    def run(body: Any, *args: Any) -> Any:
        return checkpoint(body, *args, use_reentrant=False, preserve_rng_state=False)

    if way == "plain":
        for block in model.blocks:
            block.run = run
        logits_BTV = F.linear(model.hidden(batch), model.head.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORE_INDEX)
    with torch.autograd.graph.save_on_cpu():
        logits_BTV = F.linear(model.hidden(batch), model.head.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORE_INDEX)


def run_case(name: str, way: str, n_tokens: int) -> dict[str, Any]:
    """Loss, seconds and peak growth of the measured step."""
    import torch

    from memory_mgmt.apply import apply_policy
    from memory_mgmt.host_allocator import return_freed_memory
    from memory_mgmt.monitor import MemoryMonitor
    from memory_mgmt.policy_settings import policy_of

    return_freed_memory()  # for every way: otherwise holes of the heap are measured, not the step
    if way == "hf":
        import transformers  # noqa: F401  # its code is no part of the step
    monitor = MemoryMonitor(torch.device("cpu"))
    model = hugging_face_model(name) if way == "hf" else longstride_model(name)
    if way in ("block", "policy"):
        config = POLICIES[name] if way == "policy" else MemoryConfig(recompute="block")
        apply_policy(model, policy_of(config, MODELS[name].layer_kinds))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    for n in (WARM_UP_TOKENS, n_tokens):
        tokens_BT = torch.randint(VOCAB_SIZE, (1, n), generator=generator)
        monitor.reset()
        wall, cpu = time.perf_counter(), time.process_time()
        loss = loss_of(model, way, tokens_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    return {"loss": float(loss), "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": monitor.peak_bytes()}


# --- all cases ---------------------------------------------------------------------------------------------------------------------


def measure(name: str, way: str, n_tokens: int) -> dict[str, Any]:
    """``run_case`` in a fresh process; {'error': ...} when it dies (for instance killed for memory)."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "case.json"
        # Threads that wait without spinning: beside other load, spinning would be measured, not the step.
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        _, failure = python(Path(__file__).resolve(), "--child", name, way, str(n_tokens), out, environment=environment)
        case = {"model": name, "way": way}
        return {**case, "error": failure} if failure else {**case, **json.loads(out.read_text())}


def compare(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every way against the plain one of the same model. Raises ValueError when two losses differ."""
    compared = []
    for name in MODELS:
        mine = {result["way"]: result for result in results if result["model"] == name and "error" not in result}
        plain = mine.get("plain")
        for way, result in mine.items():
            if plain is None or way == "plain":
                continue
            difference = abs(result["loss"] - plain["loss"])
            if difference > LOSS_TOLERANCE:
                raise ValueError(f"{name}, {way}: loss {result['loss']} is not the plain model's {plain['loss']}")
            row = {"model": name, "way": way, "loss_difference": difference}
            for key, figure in (("memory", "peak_bytes"), ("time", "seconds"), ("cpu_time", "cpu_seconds")):
                row[key] = result[figure] / plain[figure]
            compared.append(row)
    return compared


def markdown(report: dict[str, Any]) -> str:
    """The result file."""
    lines = [
        f"# One training step at {report['tokens']:,} tokens: peak memory and time",
        "",
        f"{where(report['machine'], 'torch', 'transformers')}. Made by `python benchmarks/memory_step.py`, whose first lines say what is "
        "measured and what is equal.",
        "",
        f"Vocabulary {VOCAB_SIZE}, fp32, one sequence. " + " ".join(f"{name}: `{text}`." for name, text in report["models"].items()),
        "",
        "Policies: " + " ".join(f"{name}: `{text}`." for name, text in report["policies"].items()),
        "",
        "| model | way | peak growth | seconds | CPU seconds | loss |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for r in report["results"]:
        if "error" in r:
            lines.append(f"| {r['model']} | {r['way']} | {r['error']} | | | |")
        else:
            figures = f"{r['peak_bytes'] / 2**20:,.0f} MiB | {r['seconds']:.1f} | {r['cpu_seconds']:.1f} | {r['loss']:.6f}"
            lines.append(f"| {r['model']} | {r['way']} | {figures} |")
    lines += ["", "| model | against plain | memory | time | CPU time | goals |", "|---|---|---:|---:|---:|---|"]
    for r in report["compared"]:
        met = r["memory"] <= MEMORY_GOAL and r["time"] <= TIME_GOAL
        goals = ("met" if met else "not met") if r["way"] == "policy" else ""
        lines.append(f"| {r['model']} | {r['way']} | {r['memory']:.2f}x | {r['time']:.2f}x | {r['cpu_time']:.2f}x | {goals} |")
    share = 3 * report["tokens"] * VOCAB_SIZE * 4 / 2**20
    lines += ["", f"Goals of a policy: at most {MEMORY_GOAL}x the memory at no more than {TIME_GOAL}x the time."]
    lines += [f"Most of what the plain model needs is its logits, their log-softmax and gradient: {share:,.0f} MiB; the rows of `block`"]
    lines += ["show what is left without them, and without tiles."]
    return "\n".join([*lines, ""])


def main() -> int:
    """Run the cases, print, and write the result files unless only some were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", help="MODEL or MODEL,WAY")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, way, n_tokens, out = arguments.child
        Path(out).write_text(json.dumps(run_case(name, way, int(n_tokens))))
        return 0
    n_tokens = QUICK_TOKENS if arguments.quick else TOKENS
    only = (arguments.only or "").split(",")
    cases = [(name, way) for name in MODELS for way in WAYS[name] if only[0] in ("", name) and (len(only) < 2 or way == only[1])]
    results = []
    for name, way in cases:
        results.append(measure(name, way, n_tokens))
        print(json.dumps(results[-1]), flush=True)
    report = {
        "machine": machine("torch", "transformers"),
        "tokens": n_tokens,
        "vocab_size": VOCAB_SIZE,
        "models": {name: model.model_dump_json(exclude_defaults=True) for name, model in MODELS.items()},
        "policies": {name: config.model_dump_json(exclude_defaults=True) for name, config in POLICIES.items()},
        "results": results,
        "compared": compare(results),
    }
    text = markdown(report)
    print(text)
    if not (arguments.quick or arguments.only):
        write_results(__file__, report, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
