"""Parameters, gradients and optimizer states sharded over dp_shard x cp with FSDP2, replicated over dp_replicate.

Gradients are *summed* over ranks, never averaged: the loss is already divided by the global number of valid tokens. Those of bfloat16
parameters are reduced in float32 and rounded once.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from parallel.mesh import Mesh


def shard_parameters(model: nn.Module, blocks: nn.ModuleList, mesh: Mesh) -> None:
    """Apply FSDP2 in place: one unit per block, one for the rest (embedding, final norm, head).

    With ``dp_replicate`` 1 the one-axis shard mesh is used, else the two-axis (hybrid) mesh. Raises RuntimeError when a
    parameter is left unsharded, which would otherwise train silently wrong.
    """
    fsdp_mesh = mesh.fsdp if mesh.dims.dp_replicate > 1 else mesh.fsdp["dp_shard_cp"]
    narrow = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if narrow else None)
    for unit in [*blocks, model]:
        fully_shard(unit, mesh=fsdp_mesh, reshard_after_forward=unit is not model, mp_policy=policy)
        sharded = cast(FSDPModule, unit)
        sharded.set_gradient_divide_factor(1.0)
        # Sum instead of average-with-prescale: gloo knows neither AVG nor PREMUL_SUM for every dtype.
        sharded.set_force_sum_reduction_for_comms(True)
    plain = [name for name, parameter in model.named_parameters() if not hasattr(parameter, "device_mesh")]
    if plain:
        raise RuntimeError(f"FSDP left parameters unsharded: {', '.join(plain[:5])}")
