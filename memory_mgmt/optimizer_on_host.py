"""The optimizer that a configuration names, with its states in host memory: torch's AdamW, or any preset of ``optim/``."""

from __future__ import annotations

from torch import nn

from memory_mgmt.offload import HostStore
from memory_mgmt.optimizer_lanes import OffloadedLanes
from memory_mgmt.optimizer_offload import OffloadedOptimizer
from memory_mgmt.parameter_offload import OffloadedParameters
from optim.build import build_optimizer, lanes_of, parameter_groups
from optim.config import OptimConfig
from optim.routing import route

OnHost = OffloadedOptimizer | OffloadedLanes


def build_on_host(
    model: nn.Module, config: OptimConfig, seed: int, store: HostStore, parameters: OffloadedParameters | None = None
) -> OnHost:
    """``optim.build.build_optimizer`` with all states in ``store``, where they are never on the device at once; ``parameters``: those of
    the model where they are in host memory too (torch's AdamW only). Raises UserError when the store's budget is too small."""
    lanes = lanes_of(model, config, seed)
    if lanes is not None:
        return OffloadedLanes(parameter_groups(model, route(model), config), lanes, config.lr, store)
    plain = build_optimizer(model, config, with_states=False)
    return OffloadedOptimizer(plain, dict(model.named_parameters()), store, parameters=parameters)
