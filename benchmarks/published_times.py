"""The step time of other systems' methods: their operations as a trace, priced by ``memory_mgmt.cost_model``.

Rates are those of the device table, the same for all cases. Assumed: elementwise work goes three times over what a layer keeps, twice
as much in backward; activations copied to host memory block (ALST, TRL) or follow MEMO's two rounding buffers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, not as a module

from published_recipes import SKELETAL, Recipe, sizes_of

from memory_mgmt.cost_model import Rates, Topology, copy_seconds, predict_step
from memory_mgmt.devices import DEVICES, Device
from memory_mgmt.trace import Phase, Trace, TracedOp

CPU_ADAM_BYTES = 34
"""Host traffic per parameter of CPU-Adam: weight, two moments and gradient read, weight, moments and the bf16 copy written."""


def step_seconds(recipe: Recipe) -> float:
    """Seconds of one optimizer step by the cost model, and what it does not schedule: copies that block, and Adam on the CPU."""
    rates, topology = _rates(recipe), _topology(recipe)
    flops = recipe.shape.model_flops(recipe.tokens)
    predicted = predict_step(_step(recipe), rates, topology, tokens_per_step=recipe.tokens, model_flops_per_step=flops)
    seconds = predicted.step_seconds
    if recipe.offload_checkpoints:  # save_on_cpu and ALST's checkpoint copy on the computing stream
        moved = int(sizes_of(recipe).hidden)
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
    sizes = sizes_of(recipe)
    return 3 * (8 * sizes.hidden + 2 * sizes.q + 4 * sizes.ffn)


def _exchanges(recipe: Recipe, phase: Phase) -> Iterator[TracedOp]:
    """What the ranks of one sequence tell each other in one layer, forward."""
    sizes, n = sizes_of(recipe), recipe.sp
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
