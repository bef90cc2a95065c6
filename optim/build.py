"""Build the optimizer a configuration names. Try alone: ``build_optimizer(torch.nn.Linear(4, 4), OptimConfig())``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from optim.config import OptimConfig
from optim.param_groups import split_by_decay


def build_optimizer(model: nn.Module, config: OptimConfig, *, with_states: bool = True) -> torch.optim.Optimizer:
    """The optimizer of ``config`` over the trainable parameters of ``model``, sharded or not, with its states allocated (unless
    ``with_states`` is False: somebody else places them).

    Learning rates are set by the caller at each step (``optim.schedule.learning_rate``). Raises ValueError for an unknown preset.
    """
    if config.preset not in PRESETS:
        raise ValueError(f"optim.preset {config.preset!r} is unknown; known: {', '.join(sorted(PRESETS))}")
    decayed, kept = split_by_decay(model)
    groups = [
        {"params": list(decayed.values()), "weight_decay": config.weight_decay},
        {"params": list(kept.values()), "weight_decay": 0.0},
    ]
    optimizer = PRESETS[config.preset]([group for group in groups if group["params"]], config)
    if with_states:
        allocate_states(optimizer)
    return optimizer


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


PRESETS: dict[str, Callable[[list[dict[str, Any]], OptimConfig], torch.optim.Optimizer]] = {"adamw": _adamw}
"""``optim.preset`` -> optimizer over parameter groups."""


def allocate_states(optimizer: torch.optim.Optimizer) -> None:
    """Create the (zero) states now instead of in the first step: a checkpoint can be loaded into them, and a run that does
    not fit fails before its first step. Works for every optimizer whose step with zero gradient and zero rate changes no
    parameter."""
    saved = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, (lr, weight_decay) in zip(optimizer.param_groups, saved, strict=True):
        group["lr"], group["weight_decay"] = lr, weight_decay
        for parameter in group["params"]:
            for value in optimizer.state[parameter].values():
                value.zero_()
