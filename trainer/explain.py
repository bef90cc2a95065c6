"""Which attention scheme and which kernels, of attention and of memories, a run would use, and why the others are passed over:
``longstride train CONFIG --explain`` for this machine, ``longstride plan CONFIG --device h100 --explain`` for one that is not there.

Nothing is started. The choice itself is ``models/kernels.py``'s; this names the blocks that a configuration's layers are made of.
"""

from __future__ import annotations

import torch

from memory_mgmt.devices import Device
from models.block import CAUSAL, NONE, BlockMask
from models.kernels import IMPLEMENTATIONS, capability_of, explain
from trainer.compile_rules import compile_lines
from trainer.config import RunConfig
from trainer.memory_kernels import memory_lines
from trainer.planning import target_for

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
_DENSE = BlockMask.dense(torch.ones(1, 1, dtype=torch.bool))


def explain_run(config: RunConfig, device_name: str | None = None) -> list[str]:
    """The lines for a configuration whose degrees are settled, on ``device_name`` (None: this machine's device)."""
    kinds, parallel = config.model.layer_kinds, config.parallel
    attention = [kind for kind in ("full", "swa") if kind in kinds]
    if not attention:
        return ["attention: no layer has any", *compile_lines(config), *memory_lines(config, target_for(config, device_name).device)]
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in attention)
    lines = [f"attention layers: {counted}; {config.model.n_heads} query heads, {config.model.kv_heads} key/value heads"]
    if parallel.cp == 1:
        lines.append("sequence: whole on one rank (parallel.cp 1)")
    else:
        near = " (a window that a shard holds: the keys before it)" if "swa" in attention else ""
        lines.append(f"sequence: {parallel.sequence} over {parallel.cp} ranks{near}, layout {config.layout}")
    if parallel.cp > 1 and "memory" in kinds:
        lines.append(f"memory layers: {parallel.memory_exchange} over {parallel.cp} ranks")
    if parallel.kv_residence == "host":
        lines.append(f"keys and values of full attention: in host memory, {parallel.kv_chunk or 65536} tokens on the device at a time")
    if parallel.kv_dtype not in ("compute", config.train.precision):
        lines.append(f"keys and values: rounded to {parallel.kv_dtype} once, on one rank too, and sent so")
    if parallel.tp > 1:
        heads = f"{config.model.n_heads // parallel.tp} query and {config.model.kv_heads // parallel.tp} key/value heads"
        lines.append(f"tensor parallelism: {parallel.tp} ranks with {heads} each")
    lines += compile_lines(config)
    device = target_for(config, device_name).device
    return [*lines, *_kernels(config, device, "swa" in attention), *memory_lines(config, device)]


def _kernels(config: RunConfig, planned: Device, has_window: bool) -> list[str]:
    device = torch.device("cuda" if planned.is_cuda else "cpu")
    dtype, head_dim, deterministic = _DTYPES[config.train.precision], config.model.attention_head_dim, config.train.deterministic
    capability = planned.capability or capability_of(device)
    where = f"cuda, compute capability {capability[0]}.{capability[1]}" if capability else device.type
    lines = [f"kernels on {where}, {config.train.precision}, heads of {head_dim}, {'' if deterministic else 'not '}deterministic:"]
    blocks = [("a document with itself", CAUSAL), ("with what lies in an earlier shard", NONE), ("short documents together", _DENSE)]
    for what, mask in [*blocks, *([("a sliding window", BlockMask.band(0, 1))] if has_window else [])]:
        line = explain(device.type, dtype, head_dim, mask, capability=capability, deterministic=deterministic)
        chosen, *passed_over = line.split(": ", 1)[1].split("; ")
        lines.append(f"  {what} ({mask.kind.value}): {chosen}")
        lines += [f"      {reason}" for reason in passed_over]
    names = ", ".join(implementation.name for implementation in IMPLEMENTATIONS)
    return [*lines, f"known kernels, in the order in which they are tried: {names}"]
