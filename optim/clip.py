"""Clipping by the global gradient norm, exact however the gradients are sharded."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import cast

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor

from models.repeat import turns
from models.tables import columns_of


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of ``tensor`` this rank holds."""
    return cast(DTensor, tensor).to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[nn.Parameter],
    max_norm: float | None,
    shard_group: dist.ProcessGroup | None,
    counted_elsewhere: Collection[nn.Parameter] = (),
) -> torch.Tensor:
    """Scale gradients in place so that their global L2 norm is at most ``max_norm`` (None: only measure).

    ``shard_group``: the ranks over which each gradient is sharded (None: not sharded). ``counted_elsewhere``: of what lies more than once
    on these ranks, all that another one counts; not every parameter. Squares are summed in float64, so
    the norm does not depend on how the elements are dealt to ranks beyond 1e-15. Returns the norm before scaling, a
    float64 scalar; it is the same on every rank.
    """
    found = [(p, elements(p)) for p in parameters if p.grad is not None]
    gradients = [gradient for _, gradient in found]
    if not gradients:
        raise ValueError("no parameter has a gradient")
    elsewhere = {id(p) for p in counted_elsewhere}
    total = torch.stack([square_sum(gradient) for p, gradient in found if id(p) not in elsewhere]).sum()
    if shard_group is not None:
        dist.all_reduce(total, group=shard_group)
    norm = total.sqrt()
    if max_norm is not None:
        scale = torch.clamp(max_norm / (norm + 1e-12), max=1.0)
        torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))  # pyright: ignore[reportPrivateImportUsage]
    return norm


def elements(parameter: torch.Tensor) -> torch.Tensor:
    """Of its gradient on this rank; of a sparse one those that are stored, each once."""
    assert parameter.grad is not None
    if not parameter.grad.is_sparse:
        return local_part(parameter.grad)
    if columns_of(parameter) is None:
        parameter.grad = parameter.grad.coalesce()
    return parameter.grad._values()


_AT_ONCE = 1 << 20
"""Elements whose squares are summed in one go: the sum in float64 makes a float64 copy of what it reads."""


def square_sum(gradient: torch.Tensor) -> torch.Tensor:
    """Sum of squares in float64, a float64 scalar."""
    flat = gradient.reshape(-1)  # gradients are contiguous: a view
    parts = flat.split(_AT_ONCE)
    if len(parts) < 2:
        return torch.linalg.vector_norm(flat, dtype=torch.float64).square()
    norms = flat.new_empty(len(parts), dtype=torch.float64)
    for i in turns(range(len(parts)), flat, lambda i: len(parts[i])):
        torch.linalg.vector_norm(parts[i], dtype=torch.float64, out=norms[i])
    return norms.square_().sum()
