"""Parameters, gradients and optimizer states sharded over dp_shard x cp with FSDP2, replicated over dp_replicate. Of tensor-parallel
ranks each shards its own part of them (``parallel/tensor_parallel.py``), with those that hold the same part.

Gradients are *summed* over ranks, never averaged: the loss is already divided by the global number of valid tokens. Those of parameters
that are stored in bfloat16 are reduced in float32 and rounded once.

Under bf16 autocast a weight that is only read by products travels as bf16, which is what those products read anyway: half the traffic,
half the memory of what is gathered, and the same bits. Its gradient stays float32 from the product through the reduction.
Everything that is read in float32 travels as float32: norms, gates and decays of memory layers, an embedding whose rows enter a float32
stream, and tied with it the head (docs/decisions/0012).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from models.linear import Linear
from models.transformer import LossHead, Transformer
from parallel.mesh import Mesh


def shard_parameters(model: Transformer, mesh: Mesh, gather_dtype: torch.dtype | None = None) -> None:
    """Apply FSDP2 in place: one unit per block, one each for embedding and head unless they are tied, one for the rest.

    ``gather_dtype``: in which the weights of products are gathered (None: as they are stored). With ``dp_replicate`` 1 the one-axis shard
    mesh is used, else the two-axis (hybrid) mesh. Raises RuntimeError when a parameter is left unsharded, which would otherwise train
    silently wrong.
    """
    narrow = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if narrow else None, cast_forward_inputs=False)
    # A head of its own is there for the loss only, and its gradient is reduced before the blocks' backward begins.
    tables = {cast(nn.Parameter, table.weight) for table in model.value_tables}  # shared by columns (parallel/columns.py)
    ends = [] if model.head is None else [model.embed, model.head]
    for unit in [*model.blocks, *ends, model]:
        # The head's backward follows its forward at once.
        fully_shard(
            unit,
            mesh=mesh.parameters,
            reshard_after_forward=unit is not model and unit is not model.head,
            mp_policy=policy,
            ignored_params=tables,
        )
        sharded = cast(FSDPModule, unit)
        sharded.set_gradient_divide_factor(1.0)
        # Sum instead of average-with-prescale: gloo knows neither AVG nor PREMUL_SUM for every dtype.
        sharded.set_force_sum_reduction_for_comms(True)
        if gather_dtype is not None and not narrow:
            _gather_in(sharded, gather_dtype)
    if ends:
        cast(FSDPModule, model.embed).set_unshard_in_backward(False)  # the gradient of a look-up needs no weights
    plain = [name for name, parameter in model.named_parameters() if not hasattr(parameter, "device_mesh") and parameter not in tables]
    if plain:
        raise RuntimeError(f"FSDP left parameters unsharded: {', '.join(plain[:5])}")


def reshard(model: nn.Module) -> None:
    """Give up all gathered parameters, as after a forward pass whose backward pass does not come."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def held_together(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Around several forward and backward passes that are one to other ranks: parameters are gathered once and stay, gradients add up
    whole. What it gives is called before the last backward pass, which reduces them and gives the parameters up.

    A model that FSDP2 does not shard is left alone."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for unit in units for group in parameter_groups(unit)]
    after = [group.post_forward_mesh_info for group in groups]

    def reduce(now: bool) -> None:
        for unit in units:
            unit.set_requires_gradient_sync(now, recurse=False)
            unit.set_reshard_after_backward(now, recurse=False)

    reduce(False)
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield lambda: reduce(True)
    finally:
        reduce(True)
        for group, info in zip(groups, after, strict=True):
            group.post_forward_mesh_info = info


def parameter_groups(unit: nn.Module | FSDPModule) -> list[Any]:
    """What FSDP2 gathers and reduces together of ``unit``: a list in torch 2.13, one or none in 2.11."""
    state = cast(Any, unit)._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def add_up_in_float32(model: nn.Module) -> None:
    """From now on gradients of bfloat16 parameters are kept in float32, sharded or not: those of several passes add up there, each with the
    8 bits that its products give. 4 bytes per element instead of 2. To be called once the parameters are where they stay."""
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.grad_dtype = torch.float32
    for unit in [module for module in model.modules() if isinstance(module, FSDPModule)]:
        for group in parameter_groups(unit):
            group._init_mp_dtypes = partial(_unrounded, group, group._init_mp_dtypes)
        cast(nn.Module, unit).register_forward_pre_hook(_gradients_in_float32)


def _unrounded(group: Any, init: Callable[[], None]) -> None:
    """FSDP2 reduces in float32 and rounds the sum to what it takes for the parameters' own dtype, which it sets before the first pass."""
    init()
    if group._orig_dtype == torch.bfloat16:
        group._orig_dtype = torch.float32


def _gradients_in_float32(unit: nn.Module, _args: Any) -> None:
    """Runs once the unit's parameters are gathered: what comes in float32, as the head's gradient does, is reduced unrounded."""
    for group in parameter_groups(unit):
        for parameter in group.fsdp_params:
            gathered = parameter._unsharded_param
            if gathered.dtype == torch.bfloat16 and gathered.grad_dtype != torch.float32:
                gathered.grad_dtype = torch.float32


def _policy(dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    # Autocast decides what a module computes in, not FSDP.
    return MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=False)


def _gather_in(unit: FSDPModule, dtype: torch.dtype) -> None:
    """Gather the unit's weights of products in ``dtype``; their gradients keep the dtype that they are stored in."""
    for group in parameter_groups(unit):
        for parameter in group.fsdp_params:
            packed = hasattr(parameter._sharded_local_tensor, "fsdp_pre_all_gather")  # travels in eight bits
            if isinstance(parameter._module_info.module, (Linear, LossHead)) and not packed:
                # One policy is all that a unit has; a unit of two would need two collectives.
                parameter.init_dtype_attrs = partial(_ignoring, _policy(dtype), parameter.init_dtype_attrs)
    cast(nn.Module, unit).register_forward_pre_hook(_keep_gradients_wide)


def _ignoring(policy: MixedPrecisionPolicy, function: Callable[[MixedPrecisionPolicy], None], _unit_s: MixedPrecisionPolicy) -> None:
    function(policy)


def _keep_gradients_wide(unit: nn.Module, _args: Any) -> None:
    """Runs once the unit's parameters are gathered. What FSDP2 reduces must be of one dtype, and is of the one that is stored."""
    for group in parameter_groups(unit):
        for parameter in group.fsdp_params:
            gathered = parameter._unsharded_param
            if parameter.param_dtype is not None and gathered.grad_dtype != parameter.orig_dtype:
                gathered.grad_dtype = parameter.orig_dtype
