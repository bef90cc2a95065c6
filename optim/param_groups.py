"""Which parameters are decayed: matrices of linear layers; not norms, biases, gates, convolutions or embeddings."""

from __future__ import annotations

import torch.nn as nn


def split_by_decay(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Trainable parameters by fully qualified name, (decayed, not decayed); a tied parameter appears once."""
    linear_weights = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: dict[str, nn.Parameter] = {}
    kept: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = id(parameter) in linear_weights and id(parameter) not in embeddings
            (decayed if is_matrix else kept)[name] = parameter
    return decayed, kept
