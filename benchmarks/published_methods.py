"""How other systems hold memory and spend time, in closed form from the tensors of their method. Used by ``plan_published.py``.

Three systems: ``alst`` (DeepSpeed ZeRO-3 with Ulysses, CPU-Adam, tiled loss and MLP, checkpoints in host memory), ``trl``
(Accelerate FSDP2 with torch's context parallelism, chunked loss, ``save_on_cpu``) and ``memo`` (Megatron tensor parallelism with
token-wise swapping; with ``swap`` off it is Megatron's full recomputation). Every term is named where it is added. Nothing here is
fitted to a case: sizes follow from shapes and from what the systems' public code allocates; the three assumptions are the constants
below. Times come from ``memory_mgmt.cost_model`` with the device table's rates, the same for all cases.

Legend: T tokens of one rank, S of the sequence.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, not as a module

from memory_mgmt.cost_model import Rates, Topology, copy_seconds, predict_step
from memory_mgmt.devices import DEVICES, GIB, Device
from memory_mgmt.trace import Phase, Trace, TracedOp

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
CPU_ADAM_BYTES = 34
"""Host traffic per parameter of CPU-Adam: weight, two moments and gradient read, weight, moments and the bf16 copy written."""

Terms = dict[str, float]


@dataclass(frozen=True)
class Shape:
    """A decoder."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    gated: bool = True
    """SwiGLU (three matrices) or GELU (two)."""
    qk_norm: bool = False

    @property
    def q(self) -> int:
        """Width of the queries."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_dim

    @property
    def attention_parameters(self) -> int:
        """Of one layer."""
        return self.width * (2 * self.q + 2 * self.kv)

    @property
    def mlp_parameters(self) -> int:
        """Of one layer."""
        return (3 if self.gated else 2) * self.width * self.ffn

    @property
    def layer_parameters(self) -> int:
        """Of one layer, norms left out."""
        return self.attention_parameters + self.mlp_parameters

    @property
    def parameters(self) -> int:
        """All, norms left out."""
        return self.layers * self.layer_parameters + (1 if self.tied else 2) * self.vocab * self.width

    def model_flops(self, tokens: int) -> float:
        """Of one sequence's forward and backward: 6 per matrix parameter and token, 6 S^2 Hq D per layer (``models/flops.py``)."""
        matrices = self.layers * self.layer_parameters + self.vocab * self.width
        return 6.0 * matrices * tokens + 6.0 * tokens**2 * self.q * self.layers


@dataclass(frozen=True)
class Recipe:
    """A run of one of the systems."""

    system: Literal["alst", "trl", "memo"]
    shape: Shape
    device: str
    gpus: int
    tokens: int
    """Of the sequence."""
    sp: int
    """Ranks that share a sequence."""
    attention: str = "flash2"
    tiled_loss: bool = True
    """Also stands for the fused kernels (norm, rotation, SwiGLU) that ALST switches on with it."""
    tiled_mlp: bool = False
    offload_checkpoints: bool = False
    offload_parameters: bool = False
    swap: bool = True
    """MEMO's swapping; False: full recomputation."""
    host_bytes: float = 1.9e12
    """Of one node."""


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


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the bf16 tensors of one layer on one rank."""

    hidden: float
    q: float
    kv: float
    """Keys (or values) as the rank computes them."""
    kv_attended: float
    """Keys (or values) as its attention sees them: after Ulysses' exchange, repeated where there are more ranks than heads."""
    ffn: float
    same_heads: bool
    """Attention of one rank sees as many key heads as query heads."""


def _sizes(recipe: Recipe) -> _Sizes:
    shape, tokens = recipe.shape, recipe.tokens / recipe.sp
    local_kv_heads = max(1.0, shape.kv_heads / recipe.sp) if recipe.system == "alst" else shape.kv_heads / recipe.sp
    attended = recipe.tokens * local_kv_heads * shape.head_dim * 2
    width, q, kv, ffn = (tokens * n * 2 for n in (shape.width, shape.q, shape.kv, shape.ffn))
    return _Sizes(width, q, kv, attended, ffn, same_heads=shape.heads / recipe.sp <= local_kv_heads)


def _norm(hidden: float, fused: bool) -> float:
    """What a norm keeps beside its input: its output; Hugging Face's own keeps a float32 copy and the normalised values too."""
    return hidden if fused else 4 * hidden


def _mlp(sizes: _Sizes, recipe: Recipe) -> tuple[float, float]:
    """(kept by the feed-forward, the most it adds in backward): gate, up and product are kept, and silu(gate) where not fused.

    Backward peaks with the gradient of the product beside all of them (fused: the others are overwritten in place), else at the
    product's backward, with three gradients beside gate, silu(gate) and up.
    """
    if recipe.tiled_mlp:  # kept: nothing; adds the gradient of its input, and one tile of as many tokens as the model is wide
        return 0.0, sizes.hidden + 8 * recipe.shape.width * recipe.shape.ffn * 2
    return (3 * sizes.ffn, sizes.ffn) if recipe.tiled_loss and recipe.system == "alst" else (4 * sizes.ffn, 2 * sizes.ffn)


def _alst(recipe: Recipe) -> tuple[Terms, dict[str, Terms], float]:
    """DeepSpeed ZeRO-3, Ulysses, reentrant checkpoints of each layer."""
    shape, sizes, fused = recipe.shape, _sizes(recipe), recipe.tiled_loss
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
    shape, sizes = recipe.shape, _sizes(recipe)
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


SKELETAL = {"input": 1, "attention": 1, "others": 14}
"""MEMO, section 2: tensors of one layer in units of b s h elements."""


def alpha(recipe: Recipe) -> float:
    """MEMO's share of tokens whose other tensors are swapped: the most that a layer's forward time and the host's memory allow."""
    unit = 2.0 * recipe.tokens * recipe.shape.width / recipe.gpus
    rates, topology = _rates(recipe), _topology(recipe)
    forward = _as_trace([("forward", _layer_forward(recipe))])
    seconds = predict_step(forward, rates, topology, tokens_per_step=1, model_flops_per_step=1.0).step_seconds
    moved = seconds / copy_seconds("copy_out", int(unit), rates, topology)
    stored = recipe.host_bytes / (8 * (recipe.shape.layers - 2)) / unit
    always = SKELETAL["input"] + SKELETAL["attention"]
    return max(0.0, min(1.0, (min(moved, stored) - always) / SKELETAL["others"]))


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


# --- time -------------------------------------------------------------------------------------------------------------------


def step_seconds(recipe: Recipe) -> float:
    """Seconds of one optimizer step by the cost model, and what it does not schedule: copies that block, and Adam on the CPU."""
    rates, topology = _rates(recipe), _topology(recipe)
    flops = recipe.shape.model_flops(recipe.tokens)
    predicted = predict_step(_step(recipe), rates, topology, tokens_per_step=recipe.tokens, model_flops_per_step=flops)
    seconds = predicted.step_seconds
    if recipe.offload_checkpoints:  # save_on_cpu and ALST's checkpoint copy on the computing stream
        moved = int(_sizes(recipe).hidden)
        seconds += recipe.shape.layers * sum(copy_seconds(way, moved, rates, topology) for way in ("copy_out", "copy_in"))
    if recipe.system == "alst":
        node = _device(recipe).node
        assert node is not None
        nodes = math.ceil(recipe.gpus / node.devices)
        seconds += CPU_ADAM_BYTES * recipe.shape.parameters / nodes / (node.numa_nodes * node.host_bandwidth)
    return seconds


def _device(recipe: Recipe) -> Device:
    return DEVICES[recipe.device]


def _rates(recipe: Recipe) -> Rates:
    return Rates.from_device(_device(recipe), attention=recipe.attention)


def _topology(recipe: Recipe) -> Topology:
    return Topology(min(8, recipe.gpus), cp=recipe.sp, dp_shard=recipe.gpus // recipe.sp)


def _op(name: str, phase: Phase = "forward", **values: Any) -> TracedOp:
    numbers = {key: round(value) if isinstance(value, float) else value for key, value in values.items()}
    rest: dict[str, Any] = {"flops": 0, "bytes": 0, "dtype": "bf16"} | numbers
    return TracedOp(time=0, module="", layer=None, phase=phase, name=name, **rest)


def _as_trace(stretches: list[tuple[str, list[TracedOp]]]) -> Trace:
    ops: list[TracedOp] = []
    marks: list[tuple[int, str]] = []
    for label, work in stretches:
        marks.append((len(ops), label))
        for op in work:
            op.time = len(ops)
            ops.append(op)
    return Trace("cuda", [], ops, marks, len(ops))


def _step(recipe: Recipe) -> Trace:
    """The operations of one step, by layer."""
    shape = recipe.shape
    stretches: list[tuple[str, list[TracedOp]]] = []
    for i in range(shape.layers):
        stretches.append((f"forward blocks.{i}", [*_gather(recipe), *_layer_forward(recipe), *_swap(recipe, i, "copy_out")]))
    tokens = recipe.tokens / recipe.sp
    head = _op("aten::mm", "loss", flops=6.0 * shape.vocab * shape.width * tokens)
    stretches.append(("loss head", [head, _op("aten::exp", "loss", bytes=4 * 4.0 * tokens * shape.vocab)]))
    for i in reversed(range(shape.layers)):
        work = [*_gather(recipe), *_swap(recipe, i - 1, "copy_in"), *_recomputed(recipe), *_layer_backward(recipe)]
        stretches.append((f"backward blocks.{i}", [*work, *_scatter(recipe)]))
    own = shape.parameters / recipe.gpus
    stretches.append(("update", [_op("aten::_fused_adamw_", "update", bytes=28 * own if recipe.system != "alst" else 2 * own)]))
    return _as_trace(stretches)


def _gather(recipe: Recipe) -> Iterator[TracedOp]:
    """One layer's parameters: from the other ranks (ZeRO-3, FSDP2), or from host memory."""
    size = 2.0 * recipe.shape.layer_parameters
    if recipe.offload_parameters:
        yield _op("aten::copy_", stream="copy_in", message_bytes=size / recipe.gpus)
    if recipe.gpus > 1 and recipe.system != "memo":
        yield _op("fsdp::all_gather_copy_in", bytes=2 * size)
        yield _op("c10d::_allgather_base_", group_size=recipe.gpus, message_bytes=size)


def _scatter(recipe: Recipe) -> Iterator[TracedOp]:
    """One layer's gradients: summed over ranks, and to host memory for CPU-Adam."""
    size = 2.0 * recipe.shape.layer_parameters
    if recipe.gpus > 1 and recipe.system != "memo":
        yield _op("fsdp::chunk_cat", "backward", bytes=2 * size)
        yield _op("c10d::_reduce_scatter_base_", "backward", group_size=recipe.gpus, message_bytes=size)
    if recipe.system == "alst":
        yield _op("aten::copy_", "backward", stream="copy_out", message_bytes=size / recipe.gpus)


def _swap(recipe: Recipe, layer: int, way: Literal["copy_out", "copy_in"]) -> Iterator[TracedOp]:
    """MEMO: one layer's swapped tensors; the last two layers stay."""
    if recipe.system == "memo" and recipe.swap and 0 <= layer < recipe.shape.layers - 2:
        unit = 2.0 * recipe.tokens * recipe.shape.width / recipe.gpus
        kept = SKELETAL["input"] + SKELETAL["attention"] + alpha(recipe) * SKELETAL["others"]
        yield _op("aten::copy_", "forward" if way == "copy_out" else "backward", stream=way, message_bytes=kept * unit)


def _attention_flops(recipe: Recipe) -> float:
    """Of one rank's forward: two products over the visible half of the scores."""
    return 2.0 * recipe.tokens**2 * recipe.shape.q / recipe.sp


def _elementwise(recipe: Recipe) -> float:
    """Bytes of one layer's forward outside products and attention: three passes over what it keeps (assumption)."""
    sizes = _sizes(recipe)
    return 3 * (8 * sizes.hidden + 2 * sizes.q + 4 * sizes.ffn)


def _exchanges(recipe: Recipe, phase: Phase) -> Iterator[TracedOp]:
    """What the ranks of one sequence tell each other in one layer, forward."""
    sizes, n = _sizes(recipe), recipe.sp
    if n == 1:
        return
    if recipe.system == "alst":
        yield _op("c10d::alltoall_base_", phase, group_size=n, message_bytes=sizes.q + 2 * sizes.kv_attended)
        yield _op("c10d::alltoall_base_", phase, group_size=n, message_bytes=sizes.q)
    elif recipe.system == "trl":
        yield _op("c10d::allgather_", phase, group_size=n, message_bytes=2 * sizes.kv * n)
        if phase == "backward":  # keys' gradients travel on in float32, hop by hop
            yield _op("c10d::alltoall_base_", phase, group_size=n, message_bytes=n * 4 * sizes.kv)
    else:
        whole = 2.0 * recipe.tokens * recipe.shape.width
        for name in ("_allgather_base_", "_reduce_scatter_base_") * (2 if phase == "forward" else 3):
            yield _op(f"c10d::{name}", phase, group_size=n, message_bytes=whole)


def _layer_forward(recipe: Recipe) -> list[TracedOp]:
    shape, tokens = recipe.shape, recipe.tokens / recipe.sp
    products = _op("aten::mm", flops=2.0 * shape.layer_parameters * tokens)
    attention = _op("aten::_flash_attention_forward", flops=_attention_flops(recipe))
    return [*_exchanges(recipe, "forward"), products, attention, _op("aten::mul", bytes=_elementwise(recipe))]


def _recomputed(recipe: Recipe) -> list[TracedOp]:
    """Forward work done again: the whole layer; MEMO: the token-wise part of the tokens that were not swapped."""
    shape, tokens = recipe.shape, recipe.tokens / recipe.sp
    if recipe.system == "memo" and recipe.swap:
        again = 1 - alpha(recipe)
        return [
            _op("aten::mm", "backward", flops=again * 2.0 * shape.layer_parameters * tokens, recompute=True),
            _op("aten::mul", "backward", bytes=again * _elementwise(recipe), recompute=True),
        ]
    ops = _layer_forward(recipe)
    if recipe.tiled_mlp:  # recomputes its forward once more in its own backward
        ops.append(_op("aten::mm", flops=2.0 * shape.mlp_parameters * tokens))
    for op in ops:
        op.phase, op.recompute = "backward", True
    return ops


def _layer_backward(recipe: Recipe) -> list[TracedOp]:
    shape, tokens = recipe.shape, recipe.tokens / recipe.sp
    products = _op("aten::mm", "backward", flops=4.0 * shape.layer_parameters * tokens)
    attention = _op("aten::_flash_attention_backward", "backward", flops=2.5 * _attention_flops(recipe))
    return [*_exchanges(recipe, "backward"), products, attention, _op("aten::mul", "backward", bytes=2 * _elementwise(recipe))]
