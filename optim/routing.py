"""Which parameters are matrices of hidden layers and which are the rest, by module type and name; which of them are decayed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn as nn

HEADS = ("head", "lm_head", "output", "embed_out", "unembed")
"""Last part of the name of a linear layer that makes logits."""


@dataclass(frozen=True)
class Routed:
    """One trainable parameter; a tied one appears once, under its first name."""

    name: str
    parameter: nn.Parameter
    part: Literal["matrix", "rest"]
    decayed: bool
    """Weights of linear layers; not norms, biases, gates, convolutions and embeddings."""


def route(model: nn.Module) -> list[Routed]:
    """The trainable parameters of ``model`` in its order.

    A matrix is the weight of an ``nn.Linear`` that is neither tied to an embedding nor, by its name, makes logits. Everything else is the
    rest.
    """
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linear: set[int] = set()
    hidden: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module.weight) not in embedded:
            linear.add(id(module.weight))
            if name.rpartition(".")[2] not in HEADS:
                hidden.add(id(module.weight))
    return [
        Routed(name, parameter, "matrix" if id(parameter) in hidden else "rest", id(parameter) in linear)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
