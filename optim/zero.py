"""Elementwise presets under DeepSpeed's ZeRO-1, 2 and 3, which hands its client optimizer flat float32 partitions instead of parameters.

    optimizer = build_zero_optimizer(model, preset="adamw_8bit", lr=3e-4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={..., "zero_allow_untested_optimizer": True})

The numbers are those of the same preset elsewhere as far as float32 states go; blocks of few bits run across the flat partition, so their
scales, unlike under FSDP2, depend on how many ranks share it. What is kept in float32 elsewhere (one-dimensional and small tensors) has
groups of its own and is kept so here. A partition has no rows and no shape: presets for matrices are refused. Imports no deepspeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from optim.build import parameter_groups
from optim.codecs import Codec, codec_for, codec_named
from optim.config import OptimConfig
from optim.elementwise import ElementwiseAdam, Rule, Storage
from optim.pieces import piece_elements, row_chunks
from optim.recipes import recipe_of
from optim.routing import route
from optim.rules import Adam

PRESETS = ("adamw", "adamw_8bit", "adamw_4bit", "sgd")
ROW = 128
"""Elements of a partition that are taken as a row: a multiple of every codec's block."""


def build_zero_optimizer(model: nn.Module, config: OptimConfig | None = None, **settings: Any) -> ZeroOptimizer:
    """The client optimizer of ``deepspeed.initialize`` over the trainable parameters of ``model``; ``settings`` of ``OptimConfig``.

    Raises ValueError for a preset that needs matrices and a model with tables, by name, and as ``optim.build.build_optimizer`` does.
    """
    config = config or OptimConfig()
    if settings:
        config = OptimConfig.model_validate({**config.model_dump(exclude_unset=True), **settings})
    if config.preset not in PRESETS:
        raise ValueError(
            f"optim.preset {config.preset} updates whole matrices, and DeepSpeed's ZeRO hands the optimizer flat pieces of them: "
            f"shard with FSDP2 (optim.build.build_optimizer), or take preset {', '.join(PRESETS)}"
        )
    if config.bfloat16_weights:
        raise ValueError(
            f"optim.weights {config.kept_weights} is not for DeepSpeed's ZeRO, which keeps float32 copies of its own: leave it null "
            "(DeepSpeed's bf16 says in what the model computes)"
        )
    routed = route(model)
    if not routed:
        raise ValueError("the model has no trainable parameter")
    tables = [one.name for one in routed if one.part == "table"]
    if tables:
        raise ValueError(f"{tables[0]} is a table, updated by its touched rows, and DeepSpeed's ZeRO hands over no rows: shard with FSDP2")
    rule, storage = _rule_of(config)
    groups = []
    for group in parameter_groups(model, routed, config):
        for few_bits in (True, False):
            members = [parameter for parameter in group["params"] if _pays(parameter, storage) == few_bits]
            if members:
                groups.append({**group, "params": members, "storage": storage if few_bits else "fp32"})
    return ZeroOptimizer(groups, rule, config.lr)


def _rule_of(config: OptimConfig) -> tuple[Rule, Storage]:
    if config.preset == "adamw":
        return ElementwiseAdam(Adam(config.betas, config.eps, "torch")), "fp32"
    recipe = recipe_of(config)
    return recipe.rest, recipe.rest_storage


def _pays(parameter: nn.Parameter, storage: Storage) -> bool:
    """Whether few bits pay, by the whole shape, which ZeRO-3 has in ``ds_shape``."""
    return codec_for(storage, tuple(getattr(parameter, "ds_shape", parameter.shape))).name == storage


class ZeroOptimizer(torch.optim.Optimizer):
    """Updates whatever float32 tensors its groups hold at a step, element by element; states come with a tensor's first step."""

    def __init__(self, groups: list[dict[str, Any]], rule: Rule, lr: float) -> None:
        self.rule = rule
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "storage": "fp32"})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every tensor that has a gradient; ``closure`` may compute it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self._update(flat, flat.grad.reshape(-1), group)
        return loss

    def _update(self, flat: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        shape = (-(-flat.numel() // ROW), ROW)
        kept = dict(self._kept(shape, group["storage"]))
        state = self.state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name, codec in kept.items():
                for part, (part_shape, dtype) in codec.parts(shape).items():
                    state[f"{name}.{part}"] = torch.zeros(part_shape, dtype=dtype, device=flat.device)
        state["step"] += 1
        step, values = int(state["step"]), flat.view(-1)
        for rows in row_chunks(shape[0], ROW, piece_elements(flat.device), flat):
            inside = slice(rows.start * ROW, min(rows.stop * ROW, flat.numel()))
            some = gradient[inside].float()
            padded = torch.zeros(rows.stop - rows.start, ROW, device=flat.device)
            padded.view(-1)[: len(some)] = some
            parts = {name: {part: state[f"{name}.{part}"][rows] for part in codec.parts(shape)} for name, codec in kept.items()}
            states = {name: codec.decode(parts[name], tuple(padded.shape)) for name, codec in kept.items()}
            update = self.rule.update(padded, states, step)
            for name, codec in kept.items():
                codec.encode_(states[name], parts[name])
            values[inside].mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.view(-1)[: len(some)], alpha=group["lr"])

    def _kept(self, shape: tuple[int, int], storage: Storage) -> Iterator[tuple[str, Codec]]:
        for name, spec in self.rule.states(shape).items():
            yield name, codec_named("fp32" if spec.codec == "exact" else storage, spec.codec != "variance")

    def state_bytes(self, elements: int, storage: Storage) -> int:
        """Planned for a partition of ``elements``."""
        shape = (-(-elements // ROW), ROW)
        return sum(codec.bytes(shape) for _, codec in self._kept(shape, storage)) + torch.float32.itemsize

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every torch optimizer; codes keep their dtypes, which torch would make the parameter's."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for flat in group["params"]:
                state = self.state[flat]
                shape = (-(-flat.numel() // ROW), ROW)
                for name, codec in self._kept(shape, group["storage"]) if state else ():
                    for part, (_, dtype) in codec.parts(shape).items():
                        state[f"{name}.{part}"] = state[f"{name}.{part}"].to(dtype)
