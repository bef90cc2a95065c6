"""How other systems hold memory, in closed form from the tensors of their method. Used by ``plan_published.py``.

Three systems: ``alst`` (DeepSpeed ZeRO-3 with Ulysses, CPU-Adam, tiled loss and MLP, checkpoints in host memory), ``trl``
(Accelerate FSDP2 with torch's context parallelism, chunked loss, ``save_on_cpu``) and ``memo`` (Megatron tensor parallelism with
token-wise swapping; with ``swap`` off it is Megatron's full recomputation). Every term is named where it is added. Nothing here is
fitted to a case: sizes follow from shapes and from what the systems' public code allocates; what is assumed are the constants below.

Legend: T tokens of one rank, S of the sequence.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, not as a module

from published_recipes import SKELETAL, Recipe, Sizes, sizes_of
from published_times import alpha, step_seconds

from memory_mgmt.devices import DEVICES, GIB

RESERVED = 1.03
"""Assumption: what the caching allocator (expandable segments) holds over what is live, of everything that scales with tokens."""
OUTSIDE = 0.6 * GIB
"""Assumption: CUDA context, cuBLAS and cuDNN workspaces of one process."""
COMMUNICATOR = 1.0 * GIB
"""Assumption: NCCL's buffers where ranks talk to each other."""

ZERO_LIVE = 1e9
"""DeepSpeed's stage3_max_live_parameters, in elements."""
ZERO_BUCKETS = 2 * 5e8
"""DeepSpeed's reduce_bucket_size, in elements; two of them overlap."""

Terms = dict[str, float]


@dataclass(frozen=True)
class Estimate:
    """What the closed form says."""

    moments: dict[str, Terms]
    host_bytes: float
    """Of one node."""
    seconds: float
    mfu: float
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def moment(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def live_bytes(self) -> float:
        """The most that tensors take at once: what ``torch.cuda.max_memory_allocated`` shows."""
        return max(sum(size for name, size in terms.items() if name not in ("context", "NCCL")) for terms in self.moments.values())

    @property
    def used_bytes(self) -> float:
        """With allocator and context: what nvidia-smi shows and what must fit."""
        return max(sum(terms.values()) for terms in self.moments.values()) + self.notes["unused"]


def estimate(recipe: Recipe) -> Estimate:
    """Memory by moment, and time."""
    fixed, moments, host = {"alst": _alst, "trl": _trl, "memo": _memo}[recipe.system](recipe)
    outside = {"context": OUTSIDE} | ({"NCCL": COMMUNICATOR} if recipe.gpus > 1 else {})
    full = {name: fixed | terms | outside for name, terms in moments.items()}
    largest = max(moments, key=lambda name: sum(moments[name].values()))
    seconds = step_seconds(recipe)
    peak_flops = DEVICES[recipe.device].peak_tflops["bf16"] * 1e12
    mfu = recipe.shape.model_flops(recipe.tokens) * (recipe.gpus / recipe.sp) / (seconds * peak_flops * recipe.gpus)
    notes = {"unused": (RESERVED - 1) * sum(moments[largest].values())}
    if recipe.system == "memo":
        notes["alpha"] = alpha(recipe)
    return Estimate(full, host, seconds, mfu, notes)


def fits(recipe: Recipe, found: Estimate) -> bool:
    """Whether device and host memory suffice."""
    memory = DEVICES[recipe.device].memory_bytes
    assert memory is not None
    return found.used_bytes <= memory and found.host_bytes <= recipe.host_bytes


# --- memory -----------------------------------------------------------------------------------------------------------------


def _norm(hidden: float, fused: bool) -> float:
    """What a norm keeps beside its input: its output; Hugging Face's own keeps a float32 copy and the normalised values too."""
    return hidden if fused else 4 * hidden


def _mlp(sizes: Sizes, recipe: Recipe) -> tuple[float, float]:
    """(kept by the feed-forward, the most it adds in backward): gate, up and product are kept, and silu(gate) where not fused.

    Backward peaks with the gradient of the product beside all of them (fused: the others are overwritten in place), else at the
    product's backward, with three gradients beside gate, silu(gate) and up.
    """
    if recipe.tiled_mlp:  # kept: nothing; adds the gradient of its input, and one tile of as many tokens as the model is wide
        return 0.0, sizes.hidden + 8 * recipe.shape.width * recipe.shape.ffn * 2
    return (3 * sizes.ffn, sizes.ffn) if recipe.tiled_loss and recipe.system == "alst" else (4 * sizes.ffn, 2 * sizes.ffn)


def _alst(recipe: Recipe) -> tuple[Terms, dict[str, Terms], float]:
    """DeepSpeed ZeRO-3, Ulysses, reentrant checkpoints of each layer."""
    shape, sizes, fused = recipe.shape, sizes_of(recipe), recipe.tiled_loss
    tokens, exchanged = recipe.tokens / recipe.sp, recipe.sp > 1
    head = shape.vocab * shape.width
    fixed: Terms = {
        "parameter shard": 0.0 if recipe.offload_parameters else 2 * shape.parameters / recipe.gpus,
        "gathered parameters (stage3_max_live_parameters)": 2 * min(ZERO_LIVE, shape.parameters),
        "reduce buckets": 2 * ZERO_BUCKETS,
        "gradient of the head or embedding": 2.0 * head,
    }
    checkpoints = {"checkpoints": 0.0 if recipe.offload_checkpoints else shape.layers * sizes.hidden}
    kept_mlp, extra_mlp = _mlp(sizes, recipe)
    before: Terms = {
        "layer input": sizes.hidden if recipe.offload_checkpoints else 0.0,
        "first norm": _norm(sizes.hidden, fused),
        "q, k, v as attended": sizes.q + 2 * sizes.kv_attended,
        "attention output": sizes.q * (2 if exchanged else 1),  # Ulysses: before the exchange (attention) and after (projection)
        "layer output, held by the reentrant checkpoint": sizes.hidden,
        "gradient of the layer output": sizes.hidden,
    }
    mlp: Terms = {
        "second norm and its input": sizes.hidden + _norm(sizes.hidden, fused),
        "feed-forward": kept_mlp,
        "gradients in the feed-forward": extra_mlp,
    }
    accumulators = 4 * sizes.kv_attended if recipe.attention == "flash3" else (0.0 if sizes.same_heads else 2 * sizes.q)
    attention: Terms = {
        "gradient of the residual": sizes.hidden,
        "gradient of the attention output": sizes.q * (2 if exchanged else 1),
        "gradients of q, k, v": sizes.q + 2 * sizes.kv_attended,
        "float32 accumulator of dq": 2 * sizes.q,
        "gradients of k, v before heads are summed": accumulators,
    }
    loss: Terms = {"last hidden states": 2 * sizes.hidden}
    if recipe.tiled_loss:  # Liger: as many chunks as vocab / width, rounded to a power of two of rows
        rows = 2 ** math.ceil(math.log2(tokens / math.ceil(shape.vocab / shape.width)))
        loss |= {"one chunk of logits": 2.0 * rows * shape.vocab, "gradient of the head in the loss": 2.0 * head, "gradient": sizes.hidden}
    else:  # bf16 logits; log-softmax in float32, its gradient, and the gradient it returns
        loss |= {"logits": 2 * tokens * shape.vocab, "log-softmax and two gradients in float32": 3 * 4 * tokens * shape.vocab}
    moments = {"backward of a feed-forward": checkpoints | before | mlp, "backward of an attention": checkpoints | before | attention}
    states = (12 + 4 + 2) * shape.parameters / math.ceil(recipe.gpus / 8)  # float32 weights, moments; float32 gradients; bf16 weights
    parked = shape.layers * sizes.hidden * min(8, recipe.gpus) if recipe.offload_checkpoints else 0.0
    return fixed, moments | {"loss": checkpoints | loss}, states + parked


def _trl(recipe: Recipe) -> tuple[Terms, dict[str, Terms], float]:
    """Accelerate FSDP2 (float32 parameters, gradients and Adam), torch's ring attention with gathered keys, Hugging Face layers."""
    shape, sizes = recipe.shape, sizes_of(recipe)
    root = (1 if shape.tied else 2) * shape.vocab * shape.width
    fixed: Terms = {
        "float32 parameters, gradients, moments": 16 * shape.parameters / recipe.gpus,
        "embedding and head, gathered until the backward pass ends": 2.0 * root,
        "gradient of the head": 2.0 * shape.vocab * shape.width,
        "two layers gathered, two layers of gradients": 4 * 2.0 * shape.layer_parameters,
    }
    checkpoints = {"checkpoints": 0.0 if recipe.offload_checkpoints else shape.layers * sizes.hidden}
    kept_mlp, extra_mlp = _mlp(sizes, recipe)
    normed = 4 if shape.qk_norm else 1  # float32 copy (2), normalised values (1), and what attention sees
    before: Terms = {
        "layer input": sizes.hidden if recipe.offload_checkpoints else 0.0,
        "first norm": _norm(sizes.hidden, fused=False),
        "q, k, v": normed * (sizes.q + sizes.kv) + sizes.kv,
        "attention output": sizes.q,
        "gradient of the layer output": sizes.hidden,
    }
    mlp: Terms = {
        "attention output, rows adjacent": sizes.q,
        "second norm": _norm(sizes.hidden, fused=False),
        "feed-forward": kept_mlp,
        "gradients in the feed-forward": extra_mlp,
    }
    attention: Terms = {
        "gradient of the residual": sizes.hidden,
        "gradient of the attention output": sizes.q,
        "keys and values of all ranks": 2 * sizes.kv * recipe.sp,
        "own keys and values, sent": 2 * sizes.kv,
        "float32 dq": 2 * sizes.q,
        "float32 dk, dv: held, sent, arriving": 3 * 4 * sizes.kv,
        "gradients of this block and the one before": 2 * (sizes.q + 2 * sizes.kv),
        "float32 accumulator of the kernel": 2 * sizes.q,
    }
    rows = 1024.0  # of the chunked loss
    loss = {"last hidden states": 3 * sizes.hidden, "one chunk of logits": rows * shape.vocab * (2 + 3 * 4)}
    moments = {"backward of a feed-forward": checkpoints | before | mlp, "backward of an attention": checkpoints | before | attention}
    parked = shape.layers * sizes.hidden * min(8, recipe.gpus) if recipe.offload_checkpoints else 0.0
    return fixed, moments | {"loss": checkpoints | loss}, parked


def _memo(recipe: Recipe) -> tuple[Terms, dict[str, Terms], float]:
    """Megatron tensor and sequence parallelism over all ranks; activations in units of s h / ranks."""
    shape, n = recipe.shape, recipe.gpus
    unit, whole = 2.0 * recipe.tokens * shape.width / n, 2.0 * recipe.tokens * shape.width
    share = alpha(recipe) if recipe.swap else 0.0
    always = SKELETAL["input"] + SKELETAL["attention"]
    kept = always + share * SKELETAL["others"]
    fixed: Terms = {"bf16 weights, float32 gradients, weights and moments": 18 * shape.parameters / n}
    held = {"two rounding buffers": 2 * kept * unit} if recipe.swap else {"checkpoints": shape.layers * unit}
    again = (1 - share) * SKELETAL["others"] if recipe.swap else always + SKELETAL["others"] - 1
    layer: Terms = {
        "recomputed tensors of the layer": again * unit,
        "gathered input": whole,  # sequence parallelism gathers it before each column-parallel product
        "gradient before its reduce-scatter": whole,
        "gradients of the feed-forward": 4 * unit,
        "gradient of the layer output": unit,
    }
    logits = recipe.tokens * shape.vocab / n
    loss: Terms = {
        "gathered input": whole,
        "float32 logits, overwritten by their softmax": 4 * logits,
        "bf16 logits or their gradient": 2 * logits,
    }
    host = 8 * (shape.layers - 2) * kept * unit if recipe.swap else 0.0
    return fixed, {"backward of a layer": held | layer, "loss": held | loss}, host
