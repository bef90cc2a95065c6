"""What ``parallel.sequence: auto`` (and for ring_x_ulysses and double_ring a degree that is null) means once the mesh is known.
Imports no torch.

The candidates that the configuration allows go to ``memory_mgmt/cost_schemes.py``; the first reason line names the choice.
"""

from __future__ import annotations

from pydantic import ValidationError

from memory_mgmt.cost_model import Topology
from memory_mgmt.cost_schemes import SchemeChoice, SequenceProblem, choose_scheme
from models.errors import UserError
from parallel.config import AUTO, INNER_DEGREES, SequenceScheme
from trainer.choosing_memory_exchange import exchange_is_open, with_exchange
from trainer.config import VALUE_BYTES, RunConfig
from trainer.planning import rates_of, target_for


def scheme_is_open(config: RunConfig) -> bool:
    """Whether the scheme is to be chosen, now that the ranks of a sequence and the heads of each are known."""
    return config.parallel.scheme_is_auto and AUTO not in (config.parallel.cp, config.parallel.tp)


def schemes_are_open(config: RunConfig) -> bool:
    """Whether attention's scheme or the memories' exchange is to be chosen, now that the mesh is known."""
    return scheme_is_open(config) or exchange_is_open(config)


def with_schemes(config: RunConfig, device_name: str | None) -> tuple[RunConfig, list[str]]:
    """``config`` with a scheme for attention and an exchange for memories, and why. Raises UserError as `with_scheme`."""
    config, reasons = with_scheme(config, device_name)
    config, more = with_exchange(config, device_name)
    return config, reasons + more


def with_scheme(config: RunConfig, device_name: str | None) -> tuple[RunConfig, list[str]]:
    """``config`` with a scheme and, for ring_x_ulysses, its degree; and why. As it is where nothing is open.

    Raises UserError where no scheme is possible, or the device's rates are not known.
    """
    if not scheme_is_open(config):
        return config, []
    if config.parallel.cp == 1:
        return _settled(config, "ring"), ["parallel.sequence: ring, nothing to exchange (parallel.cp 1)"]
    if "full" not in config.model.layer_kinds and config.parallel.sequence == "auto" and _fits_halo(config):
        return _settled(config, "ring"), ["parallel.sequence: ring, no attention layer looks back further than a shard"]
    possible, refused = _possible(config)
    if not possible:
        raise UserError(f"parallel.sequence: no scheme is possible\n  {refused}")
    choice = _choice(config, device_name, possible)
    return _settled(config, choice.chosen.scheme, choice.chosen.ulysses), list(choice.reasons)


def _fits_halo(config: RunConfig) -> bool:
    return config.model.window - 1 <= config.data.seq_len // config.parallel.cp


def _choice(config: RunConfig, device_name: str | None, possible: list[tuple[SequenceScheme, int]]) -> SchemeChoice:
    target = target_for(_settled(config, "ring"), device_name)
    rates = rates_of(target.device, config.train.deterministic)
    if rates is None:
        raise UserError(
            f"parallel.sequence: auto needs the rates of {target.device.name}; measure them there with longstride plan --calibrate, or "
            "set parallel.sequence"
        )
    parallel, model = config.parallel, config.model
    rows = config.train.micro_batch_size
    problem = SequenceProblem(
        n_heads=model.n_heads // parallel.tp,
        n_kv_heads=model.kv_heads // parallel.tp,
        head_dim=model.attention_head_dim,
        tokens=rows * config.data.seq_len // parallel.cp,
        rows=rows,
        value_bytes=VALUE_BYTES[config.train.precision],
        precision=config.train.precision,
        topology=Topology(min(target.ranks_per_node, target.ranks), parallel.cp, parallel.dp_shard, parallel.dp_replicate, tp=parallel.tp),
        rates=rates,
        gradient_dtype=parallel.kv_gradient_dtype,
        kv_bytes=None if parallel.kv_dtype == "compute" else VALUE_BYTES[parallel.kv_dtype],
    )
    if config.parallel.sequence == "auto" and not problem.topology.crosses_nodes(parallel.cp):
        possible = [each for each in possible if each[0] != "double_ring"]  # one ring is as good where all links are equal
    return choose_scheme(problem, possible)


def _possible(config: RunConfig) -> tuple[list[tuple[SequenceScheme, int]], str]:
    """(scheme, degree among neighbours) of all that the configuration allows, and the last refusal."""
    cp, refused = config.parallel.cp, ""
    inner = [n for n in range(2, cp) if cp % n == 0]
    hybrids: list[tuple[SequenceScheme, int]] = [("ring_x_ulysses", n) for n in inner]
    doubles: list[tuple[SequenceScheme, int]] = [("double_ring", n) for n in inner]
    nested: list[tuple[SequenceScheme, int]] = [*hybrids, *doubles]
    every: list[tuple[SequenceScheme, int]] = [("ring", 1), ("allgather_kv", 1), ("ulysses", cp), *nested]
    asked: list[tuple[SequenceScheme, int]] = [(scheme, n) for scheme, n in nested if scheme == config.parallel.sequence]
    found = []
    for scheme, ulysses in every if config.parallel.sequence == "auto" else asked:
        try:
            RunConfig.model_validate(dict(_settled(config, scheme, ulysses)))
            found.append((scheme, ulysses))
        except ValidationError as error:
            refused = error.errors()[0]["msg"].removeprefix("Value error, ")
    return found, refused


def _settled(config: RunConfig, scheme: SequenceScheme, ulysses: int = 1) -> RunConfig:
    degrees = {key: ulysses if scheme == nested else None for nested, key in INNER_DEGREES.items()}
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"sequence": scheme, **degrees})})
