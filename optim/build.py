"""Build the optimizer a configuration names. Try alone: ``build_optimizer(torch.nn.Linear(4, 4), preset="adamw_8bit")``."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from models.int8_weight import quantise_weights_
from models.parts import Part
from models.tables import columns_of
from optim.codecs import LEAST_ELEMENTS
from optim.config import OptimConfig, Weights
from optim.driver import ComposedOptimizer
from optim.fused import Kernel
from optim.lane import Lane
from optim.recipes import Recipe, recipe_of
from optim.routing import Routed, route
from optim.row_sparse import RowSparse
from optim.writers import EIGHT_BITS, EXACT, writer_for

if TYPE_CHECKING:
    from optim.plan import PlannedParameter


def build_optimizer(
    model: nn.Module, config: OptimConfig | None = None, *, with_states: bool = True, seed: int = 0, **settings: Any
) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters of ``model``, sharded or not, with its states allocated (torch's own: unless
    ``with_states`` is False, where somebody else places them).

    ``seed``: of the chance that rounds weights. ``settings``: of ``OptimConfig``, in place of those of ``config``. The caller may set each
    group's ``lr`` at each step (``optim.schedule.learning_rate`` times the group's ``lr_factor``). Raises ValueError for settings that are
    unknown or contradict one another (pydantic's ValidationError is one), a model without trainable parameters, and parameters that lie in
    a way that is not known.
    """
    config = config or OptimConfig()
    if settings:
        config = OptimConfig.model_validate({**config.model_dump(exclude_unset=True), **settings})
    routed = route(model)
    if not routed:
        raise ValueError("the model has no trainable parameter")
    groups, lanes = parameter_groups(model, routed, config), lanes_of(model, config, seed)
    if lanes is None:
        # One kernel on CUDA, in place: torch's default makes temporaries there as large as all parameters. Not on CPU, where the kernel
        # rounds the elements at a tensor's end otherwise than the rest, so that a sharded parameter would not get a whole one's bits.
        fused = all(one.parameter.device.type == "cuda" for one in routed)
        optimizer = AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
        optimizer.names = {one.parameter: one.name for one in routed}
        if with_states:
            allocate_states(optimizer)
        return optimizer
    return ComposedOptimizer(groups, lanes, config.lr)


class AdamW(torch.optim.AdamW):
    """torch's, which can say what it holds."""

    names: dict[nn.Parameter, str]

    def plan(self, *, strict: bool = False) -> list[PlannedParameter]:
        """What each parameter gets (``optim/plan.py``): always what was asked for."""
        from optim.plan import plan  # it builds on this module

        return plan(self, self.names, strict=strict)


def lanes_of(model: nn.Module, config: OptimConfig, seed: int = 0) -> list[Lane] | None:
    """How each trainable parameter is updated; None where torch's own AdamW does it."""
    _check_weights(route(model), config)
    if config.is_torch_adamw:
        tables = [one.name for one in route(model) if one.part == "table"]
        if tables:
            raise ValueError(
                f"optim.preset adamw is torch's and updates every row of {tables[0]}, a table of which a step touches few; "
                "set optim.preset adamw_8bit, or composed with optim.rest of your choice"
            )
        return None
    recipe = recipe_of(config)
    parts: dict[str, Part] = getattr(model, "parts", {})
    lanes = [_lane(one, recipe, config.kept_weights, seed, parts.get(one.name), config.kernel) for one in route(model)]
    if config.kernel == "fused" and all(lane.path == "eager" for lane in lanes):
        because = sorted({lane.eager_because for lane in lanes}, key=lambda why: why.startswith(("no kernel", "moments")))
        raise ValueError(f"optim.kernel is fused, but none can be used: {because[0]}; set optim.kernel auto")
    return lanes


def _lane(routed: Routed, recipe: Recipe, weights: Weights | None, seed: int, part: Part | None, kernel: Kernel) -> Lane:
    if routed.part == "table":
        if columns_of(routed.parameter) is not None and recipe.rest_storage not in ("fp32", "bf16"):
            # Blocks of few bits lie along rows, which ranks share; of bf16 every element is by itself.
            return Lane(routed.name, routed.parameter, RowSparse(recipe.rest), "bf16", weights, seed, recipe.rest_storage)
        return Lane(routed.name, routed.parameter, RowSparse(recipe.rest), recipe.rest_storage, weights, seed)
    if routed.part == "matrix" or (recipe.matrix_everywhere and routed.parameter.ndim == 2):
        return Lane(routed.name, routed.parameter, recipe.matrix, recipe.matrix_storage, weights, seed, part=part, kernel=kernel)
    return Lane(routed.name, routed.parameter, recipe.rest, recipe.rest_storage, weights, seed, part=part, kernel=kernel)


def _check_weights(routed: Sequence[Routed], config: OptimConfig) -> None:
    """Every parameter has a writer, and ``optim.weights`` is about some of them. float32 ones beside bfloat16 ones stay exact."""
    weights = config.kept_weights
    written = [writer_for(one.parameter, weights, one.name) for one in routed]
    if weights == "int8_stochastic" and EIGHT_BITS not in written:
        raise ValueError(
            "optim.weights is int8_stochastic, but no parameter is in eight bits; call optim.build.quantise_matrices_(model) before it is "
            "sharded, or choose other weights"
        )
    if weights != "fp32" and all(writer is EXACT for writer in written):
        raise ValueError(f"optim.weights is {weights}, but no parameter is bfloat16; build the model in bfloat16 or choose fp32")


def quantise_matrices_(model: nn.Module) -> None:
    """Keep the matrices of hidden layers of ``model`` (``optim.routing``) in eight bits from now on, where their rows allow it and they are
    not small. Before the model is sharded."""
    hidden = {id(one.parameter) for one in route(model) if one.part == "matrix" and one.parameter.numel() >= LEAST_ELEMENTS}
    quantise_weights_(module for module in model.modules() if isinstance(module, nn.Linear) and id(module.weight) in hidden)


def parameter_groups(model: nn.Module, routed: Sequence[Routed], config: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups: decayed first, each with its own weight decay and learning rate; empty ones are left out. ``lr_factor`` is for a
    caller that sets rates by a schedule of ``config.lr``; ``fixed_lr`` in its place is a rate that follows none. Raises ValueError for a
    group of the configuration that matches no name."""
    narrow = 1.0 if config.mup_base_width is None else config.mup_base_width / _width(model)
    groups: dict[tuple[bool, float, float, bool], list[nn.Parameter]] = {}
    matched: set[str] = set()
    for one in sorted(routed, key=lambda one: not one.decayed):
        own = next((group for group in config.groups if fnmatchcase(one.name, group.match)), None)
        rate = config.lr if one.part == "matrix" or config.rest_lr is None else config.rest_lr
        decay = config.weight_decay if one.decayed else 0.0
        if own is not None:
            matched.add(own.match)
            rate = rate if own.lr is None else own.lr
            decay = decay if own.weight_decay is None else own.weight_decay
        factor = rate / config.lr * (narrow if one.decayed or one.makes_logits else 1.0)
        fixed = own is not None and own.schedule == "none"
        groups.setdefault((one.decayed, decay, factor, fixed), []).append(one.parameter)
    for group in config.groups:
        if group.match not in matched:
            names = ", ".join(one.name for one in routed[:4])
            raise ValueError(
                f"optim.groups: {group.match!r} matches no parameter, or none that a group before it leaves; names are {names}, ..."
            )
    return [
        {"params": parameters, "weight_decay": decay, "lr": config.lr * factor}
        | ({"fixed_lr": config.lr * factor} if fixed else {"lr_factor": factor})
        for (_, decay, factor, fixed), parameters in groups.items()
    ]


def _width(model: nn.Module) -> int:
    """Of the residual stream, as the model's embedding has it. Raises ValueError where there is not one such width."""
    widths = {module.embedding_dim for module in model.modules() if isinstance(module, nn.Embedding)}
    if len(widths) != 1:
        raise ValueError(f"optim.mup_base_width needs a model with embeddings of one width; found {sorted(widths) or 'none'}")
    return widths.pop()


def allocate_states(optimizer: torch.optim.Optimizer) -> None:
    """Create the (zero) states of torch's AdamW now instead of in the first step: a checkpoint can be loaded into them, and a run that
    does not fit fails before its first step."""
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
