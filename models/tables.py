"""Which parameters are tables: many rows, of which a step reads few, so that few rows of the gradient are not zero.

A module says so by ``row_sparse``, the names of those of its parameters, as a product-key memory does of its values:

    class Values(nn.Module):
        row_sparse = ("weight",)

nn.Embedding and nn.EmbeddingBag say so by ``sparse=True``, which also makes their gradients sparse tensors; FSDP2 wants dense ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """Which columns of a table this rank holds: ``count`` from ``first`` on, of ``total``."""

    total: int
    first: int
    count: int
    mesh: Any = None
    """The ``DeviceMesh`` (copies, ranks that share them) over which they are dealt out; None: all are here."""


def columns_of(parameter: Tensor) -> Columns | None:
    """Which columns this rank holds of a table that ranks share by columns (``models/value_table.py``); its sparse gradient holds the rows
    that were read, each once. None of anything else."""
    return getattr(parameter, "columns", None)


def table_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The tables of ``model``. Raises ValueError where a module names a parameter that it does not have, or that has no rows."""
    found: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        names = getattr(module, "row_sparse", ())
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            names = (*names, "weight")
        for name in names:
            parameter = module._parameters.get(name)
            if parameter is None or parameter.ndim < 2:
                raise ValueError(f"{path or type(module).__name__}.row_sparse names {name!r}, which is no parameter of two dims")
            found.add(parameter)
    return found
