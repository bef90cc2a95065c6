"""What ``parallel.memory_exchange: auto`` means once the mesh is known. Imports no torch.

The exchanges that the settings allow go to ``memory_mgmt/cost_memory_exchange.py``; the first reason line names the choice.
"""

from __future__ import annotations

from collections.abc import Sequence

from memory_mgmt.cost_memory_exchange import ExchangeChoice, MemoryProblem, choose_exchange
from memory_mgmt.cost_model import Topology
from models.errors import UserError
from models.memory.counts import memory_counts
from models.memory.exchange_shapes import exchange_shapes
from parallel.config import AUTO, MemoryExchange
from trainer import exchange_rules
from trainer.config import RunConfig
from trainer.planning import rates_of, target_for

_VALUE_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
_EVERY: tuple[MemoryExchange, ...] = ("states", "ring", "ulysses")


def exchange_is_open(config: RunConfig) -> bool:
    """Whether the exchange is to be chosen, now that the ranks of a sequence are known."""
    return config.parallel.memory_exchange == "auto" and AUTO not in (config.parallel.cp, config.parallel.tp)


def with_exchange(config: RunConfig, device_name: str | None) -> tuple[RunConfig, list[str]]:
    """``config`` with an exchange of its memories, and why. As it is where nothing is open.

    Raises UserError where the device's rates are not known."""
    if not exchange_is_open(config):
        return config, []
    ranks = config.parallel.cp * config.parallel.tp
    if ranks == 1 or "memory" not in config.model.layer_kinds or config.model.memory.around_stack:
        return _settled(config, "states"), ["parallel.memory_exchange: states, no memory layer has anything to exchange"]
    possible: list[MemoryExchange] = [exchange for exchange in _EVERY if exchange_rules.refusal(_settled(config, exchange)) is None]
    if possible == ["states"]:
        only = f"the only one of model.memory.kind {config.model.memory.kind} over {ranks} ranks"
        return _settled(config, "states"), [f"parallel.memory_exchange: states, {only}"]
    choice = _choice(config, device_name, ranks, possible)
    return _settled(config, choice.chosen.exchange), list(choice.reasons)


def _choice(config: RunConfig, device_name: str | None, ranks: int, possible: Sequence[MemoryExchange]) -> ExchangeChoice:
    target = target_for(_settled(config, "states"), device_name)
    rates = rates_of(target.device, config.train.deterministic)
    if rates is None:
        raise UserError(
            f"parallel.memory_exchange: auto needs the rates of {target.device.name}; measure them there with longstride plan --calibrate, "
            "or set parallel.memory_exchange"
        )
    shapes = exchange_shapes(config.model, ranks)
    assert shapes is not None, "families with one exchange are settled before"
    parallel, rows = config.parallel, config.train.micro_batch_size
    counts = memory_counts(config.model, config.data.seq_len)
    problem = MemoryProblem(
        shapes=shapes,
        ranks=ranks,
        ranges=2 if config.layout == "zigzag" else 1,
        tokens=rows * config.data.seq_len // ranks,
        rows=rows,
        value_bytes=_VALUE_BYTES[config.train.precision],
        precision=config.train.precision,
        topology=Topology(min(target.ranks_per_node, target.ranks), parallel.cp, parallel.dp_shard, parallel.dp_replicate, tp=parallel.tp),
        rates=rates,
        projection_flops=6.0 * counts.matmul,
        mixing_flops=counts.mixing,
    )
    return choose_exchange(problem, possible)


def _settled(config: RunConfig, exchange: MemoryExchange) -> RunConfig:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"memory_exchange": exchange})})
