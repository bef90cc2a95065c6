"""Which parameters are matrices of hidden layers, tables, or the rest, by module type and name; which of them are decayed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn as nn

from models.tables import table_parameters

HEADS = ("head", "lm_head", "output", "embed_out", "unembed")
"""Last part of the name of a linear layer that makes logits."""


@dataclass(frozen=True)
class Routed:
    """One trainable parameter; a tied one appears once, under its first name."""

    name: str
    parameter: nn.Parameter
    part: Literal["matrix", "rest", "table"]
    decayed: bool
    """Weights of linear layers; not norms, biases, gates, convolutions and embeddings."""
    makes_logits: bool = False
    """Matrix of an output layer, by its name, that no embedding shares."""


def route(model: nn.Module) -> list[Routed]:
    """The trainable parameters of ``model`` in its order.

    A matrix is the weight of an ``nn.Linear`` that is neither tied to an embedding nor, by its name, makes logits. A table is a parameter
    that its module names in ``row_sparse`` (``models/tables.py``). Everything else is the rest.
    """
    tables = {id(parameter) for parameter in table_parameters(model)}
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linear: set[int] = set()
    hidden: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module.weight) not in embedded:
            linear.add(id(module.weight))
            if name.rpartition(".")[2] not in HEADS:
                hidden.add(id(module.weight))
    return [
        Routed(
            name,
            parameter,
            "table" if id(parameter) in tables else "matrix" if id(parameter) in hidden else "rest",
            id(parameter) in linear - tables,
            name.rpartition(".")[0].rpartition(".")[2] in HEADS and parameter.ndim == 2 and id(parameter) not in embedded,
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
