"""What the configuration leaves ``auto``: degrees of the mesh and the optimizer preset, by the traced step of each choice; the scheme of
sequence parallelism, of each choice of degrees, by ``trainer/choosing_scheme.py``.

Imports no torch.

The first preset of ``optim.allowed`` with a mesh that fits is taken, and of its meshes the one with the fastest step. Degrees never
change the experiment: the sequences of a step stay what ``auto`` degrees of 1 would make them, so more data-parallel ranks do fewer
passes each. ``parallel.tp`` that is auto is a divisor of a node's devices: its messages are waited for, several per layer. Try alone:
``longstride plan debug_cpu parallel.cp=auto parallel.dp_shard=auto parallel.ranks=4``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from memory_mgmt.activations import KNOWN_MEMORIES
from memory_mgmt.planner import solve
from memory_mgmt.problem import baseline_policy, problem_of_trace
from models.config import MemoryModuleConfig
from models.errors import UserError
from optim.config import Preset
from parallel.config import AUTO, INNER_DEGREES
from trainer.choosing_offload import places
from trainer.choosing_scheme import schemes_are_open, with_schemes
from trainer.config import RunConfig
from trainer.planning import Target, bare_plan, plan_target, predict, setting_for, target_for
from trainer.sweep_traces import trace_ahead_of
from trainer.tracing import TraceRequest, trace_step

TIME_LIMIT = 120.0
"""Seconds after which no further degrees are tried; those without room in any policy are tried last."""
_SOLVE_SECONDS = 2.0
_TOGETHER = 8
"""Steps traced before the time is looked at again; a process traces several of them, which saves the others its start."""


@dataclass(frozen=True)
class Tried:
    """One choice: seconds of its step and bytes of its peak, as far as they are known."""

    config: RunConfig
    words: str
    """The choice: degrees, and the preset where that is ``auto``."""
    status: str
    """``fits``, ``does not fit``, ``refused: ...`` or ``not tried``."""
    seconds: float = math.inf
    peak_bytes: int = 0


@dataclass(frozen=True)
class Settled:
    """A configuration without ``auto``, and what it was chosen from (nothing where there was no choice to make)."""

    config: RunConfig
    tried: tuple[Tried, ...] = ()
    scheme: tuple[str, ...] = ()
    """Why this scheme of sequence parallelism, and this exchange of memories; nothing where they were given."""

    def lines(self) -> list[str]:
        """The choice in words, then all that were tried."""
        if not self.tried:
            return list(self.scheme)
        chosen = next(one.words for one in self.tried if one.config is self.config)
        lines = [f"chosen: {chosen}, of {len(self.tried)} possible"]
        for one in self.tried:
            time_and_peak = f"{one.seconds:.4g} s, {one.peak_bytes / 2**30:.2f} GiB" if one.peak_bytes else ""
            lines.append(f"  {one.words:<38} {one.status:<14} {time_and_peak}".rstrip())
        return [*lines, *self.scheme]


def open_settings(config: RunConfig) -> list[str]:
    """Keys that ``settled`` has to choose."""
    preset = ["optim.preset"] if config.optim.preset == "auto" else []
    scheme = "sequence" if config.parallel.sequence == "auto" else INNER_DEGREES.get(config.parallel.sequence, "ulysses")
    open_scheme = [f"parallel.{scheme}"] if config.parallel.scheme_is_auto else []
    open_scheme += ["parallel.memory_exchange"] if config.parallel.memory_exchange == "auto" else []
    return [f"parallel.{name}" for name in config.parallel.chosen_by_plan] + open_scheme + preset


def settled(config: RunConfig, device_name: str | None = None, ranks: int | None = None) -> Settled:
    """``config`` with every ``auto`` of ``open_settings`` chosen, for ``ranks`` ranks (None: ``parallel.ranks``) of ``device_name`` (None:
    this machine's device).

    Where nothing fits, the choice that needs least. Raises UserError where the number of ranks is not known or contradicts
    ``parallel.ranks``, and where no choice of degrees is possible, with the reason of each.
    """
    keys = open_settings(config)
    if not keys:
        return Settled(config)
    if config.memory.plan == "estimate":
        raise UserError(f"{keys[0]}: auto needs traced steps; leave memory.plan at trace")
    if schemes_are_open(config):
        config, reasons = with_schemes(config, device_name)
        return replace(settled(config, device_name, ranks), scheme=tuple(reasons))
    possible, refused = _possible(config, _ranks_of(config, ranks), device_name) if config.parallel.chosen_by_plan else ([config], [])
    if not possible:
        reasons = "".join(f"\n  {one.words}: {one.status.removeprefix('refused: ')}" for one in refused[:6])
        raise UserError(f"{keys[0]}: no degrees for {_ranks_of(config, ranks)} ranks are possible{reasons}")
    presets = config.optim.allowed if config.optim.preset == "auto" else (config.optim.preset,)
    tried: list[Tried] = []
    for preset in presets:
        choices = possible
        if config.optim.preset == "auto":
            choices, more = _with_preset(possible, preset, config)
            refused += more
        if len(choices) == len(presets) == 1:
            return Settled(choices[0], scheme=_scheme_reasons(config, choices[0], device_name))
        some = _try_all([target_for(one, device_name) for one in choices], config)
        tried += sorted(some, key=_rank)
        for one in tried[len(tried) - len(some) :]:
            # What the planner's problem did not see may make the fastest policy too large: only a traced plan promises.
            if one.status == "fits" and plan_target(target_for(one.config, device_name)).fits:
                return Settled(one.config, (*tried, *refused), _scheme_reasons(config, one.config, device_name))
    if not tried:
        raise UserError(f"{keys[0]}: no choice is possible\n  {refused[0].words}: {refused[0].status.removeprefix('refused: ')}")
    leanest = min(tried, key=lambda one: one.peak_bytes or math.inf)
    return Settled(leanest.config, (*tried, *refused), _scheme_reasons(config, leanest.config, device_name))


def _scheme_reasons(asked: RunConfig, chosen: RunConfig, device_name: str | None) -> tuple[str, ...]:
    """Why the chosen degrees have their scheme and exchange, where ``asked`` leaves one open."""
    if not asked.parallel.scheme_is_auto and asked.parallel.memory_exchange != "auto":
        return ()
    again: dict[str, str | None] = {"memory_exchange": asked.parallel.memory_exchange}
    if asked.parallel.scheme_is_auto:
        again |= {"sequence": asked.parallel.sequence, "ulysses": None, "ring_inner": None}
    open_again = chosen.parallel.model_copy(update=again)
    return tuple(with_schemes(chosen.model_copy(update={"parallel": open_again}), device_name)[1])


def _with_preset(configs: Sequence[RunConfig], preset: Preset, asked: RunConfig) -> tuple[list[RunConfig], list[Tried]]:
    """The configurations with ``preset``, and those that refuse it with the reason."""
    possible, refused = [], []
    for config in configs:
        chosen = config.model_copy(update={"optim": config.optim.with_preset(preset)})
        try:
            possible.append(RunConfig.model_validate(dict(chosen)))
        except ValidationError as error:
            refused.append(Tried(chosen, _words(chosen, asked), f"refused: {_reason(error)}"))
    return possible, refused


def _reason(error: ValidationError) -> str:
    return error.errors()[0]["msg"].removeprefix("Value error, ")


def _words(config: RunConfig, asked: RunConfig) -> str:
    """What was chosen where ``asked`` says auto."""
    degrees = [degrees_of(config)] if asked.parallel.chosen_by_plan else []
    return ", ".join([*degrees, *([config.optim.preset] if asked.optim.preset == "auto" else [])])


def degrees_of(config: RunConfig) -> str:
    """``dp_shard 2 x cp 4``; degrees of 1 are left out except ``cp``."""
    parallel = config.parallel
    degrees = {"dp_replicate": parallel.dp_replicate, "dp_shard": parallel.dp_shard, "cp": parallel.cp, "tp": parallel.tp}
    return " x ".join(f"{name} {degree or 'auto'}" for name, degree in degrees.items() if degree != 1 or name == "cp")


def _ranks_of(config: RunConfig, started: int | None) -> int:
    asked = config.parallel.ranks
    if asked is None and started is None:
        raise UserError(f"parallel.{config.parallel.chosen_by_plan[0]}: auto needs the number of ranks; set parallel.ranks or --nproc")
    if asked is not None and started is not None and asked != started:
        raise UserError(f"parallel.ranks: {asked}, but {started} were started; leave it null or start {asked}")
    return asked or started or 1


def _possible(config: RunConfig, ranks: int, device_name: str | None) -> tuple[list[RunConfig], list[Tried]]:
    """Configurations of every choice that the settings allow, and those they refuse with the reason."""
    possible, refused = [], []
    sequences = config.global_batch_sequences
    on_node = _on_node(config, ranks, device_name)
    for replicate, shard, cp, tp in _factors(config, ranks):
        degrees = {"dp_replicate": replicate, "dp_shard": shard, "cp": cp, "tp": tp, "ranks": None}
        parallel = config.parallel.model_copy(update=degrees)
        passes, rest = divmod(sequences, replicate * shard * config.train.micro_batch_size)
        train = config.train.model_copy(update={"grad_accum": max(1, passes)})
        chosen = config.model_copy(update={"parallel": parallel, "train": train})
        words = _words(chosen, config)
        if rest or not passes:
            reason = f"{sequences} sequences per step are not divisible among {replicate * shard} x {config.train.micro_batch_size}"
            refused.append(Tried(chosen, words, f"refused: {reason}"))
            continue
        if config.parallel.tp == AUTO and on_node % tp:
            refused.append(Tried(chosen, words, f"refused: parallel.tp {tp} would cross nodes of {on_node} ranks"))
            continue
        try:
            choice = RunConfig.model_validate(dict(with_schemes(RunConfig.model_validate(dict(chosen)), device_name)[0]))
            target_for(choice, device_name)  # refuses a vocabulary that tensor-parallel ranks cannot share
            possible.append(choice)
        except ValidationError as error:
            refused.append(Tried(chosen, words, f"refused: {_reason(error)}"))
        except UserError as error:
            refused.append(Tried(chosen, words, f"refused: {error}"))
    return possible, refused


def _on_node(config: RunConfig, ranks: int, device_name: str | None) -> int:
    """Of ``ranks`` ranks those of one node."""
    alone = config.parallel.model_copy(update={"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, "ranks": None})
    node = target_for(config.model_copy(update={"parallel": alone}), device_name).device.node
    return min(ranks, node.devices) if node is not None else ranks


def _factors(config: RunConfig, ranks: int) -> Iterator[tuple[int, int, int, int]]:
    """(dp_replicate, dp_shard, cp, tp) with ``ranks`` as product and the given degrees as they are."""
    parallel = config.parallel
    if parallel.tp != AUTO and ranks % parallel.tp:
        raise UserError(f"parallel.tp {parallel.tp} does not divide {ranks} ranks; set it to a divisor, or start a multiple of it")
    for tp in _divisors(ranks, parallel.tp):
        for cp in _divisors(ranks // tp, parallel.cp):
            for shard in _divisors(ranks // tp // cp, parallel.dp_shard):
                replicate = ranks // tp // cp // shard
                if parallel.dp_replicate in (0, replicate):
                    yield replicate, shard, cp, tp


def _divisors(number: int, given: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0 and given in (0, n)]


def _try_all(targets: Sequence[Target], asked: RunConfig) -> list[Tried]:
    """Every target's step, the promising first: short sequences' parts need little traffic, so the least cp whose leanest step fits."""
    order = sorted(targets, key=_promise)
    deadline = time.monotonic() + TIME_LIMIT
    tried = []
    for start in range(0, len(order), _TOGETHER):
        some = order[start : start + _TOGETHER]
        if time.monotonic() < deadline:
            trace_ahead_of([_first_request(placed) for target in some for placed in _placed(target)])
            tried += [_try(target, _words(target.config, asked)) for target in some]
        else:
            tried += [Tried(target.config, _words(target.config, asked), "not tried") for target in some]
    return tried


def _promise(target: Target) -> tuple[bool, int, int, int]:
    """What is tried first is least."""
    parallel = target.config.parallel
    return not _may_fit(target), parallel.cp * parallel.tp, parallel.tp, -parallel.dp_replicate


def _may_fit(target: Target) -> bool:
    """By formulas, with everything recomputed: a guess that only orders the tries."""
    leanest = target.config.memory.model_copy(update={"recompute": "block", "plan": "estimate", "offload": "inputs", "quantise": "none"})
    # Other presets ask a process of their own, an update in the backward pass and weights of few bits are traced or not known, and
    # formulas know the ring.
    optim = target.config.optim.model_copy(update={"preset": "adamw", "fuse_backward": False, "weights": None})
    plain = {"sequence": "ring", "ulysses": None, "ring_inner": None, "head_chunk": None, "memory_exchange": "states"}
    ring = target.config.parallel.model_copy(update=plain)
    model = target.config.model
    if model.memory.kind not in KNOWN_MEMORIES or model.memory.attach != "mixer":
        model = model.model_copy(update={"memory": MemoryModuleConfig()})
    known = {"model": model, "memory": leanest, "optim": optim, "parallel": ring}
    return plan_target(target.with_config(target.config.model_copy(update=known))).fits


def _first_request(target: Target) -> TraceRequest:
    """The step that a target is judged by first."""
    if target.config.memory.recompute == "auto":
        return target.request(baseline_policy(setting_for(target)))
    return target.request()


def _placed(target: Target) -> list[Target]:
    """The target with each place that its optimizer's states and parameters may be in."""
    return [target.with_config(config) for config in places(target.config, *target.room)[: None if target.device.is_cuda else 1]]


def _try(target: Target, words: str) -> Tried:
    """The better of its places; which one it is, the plan of the chosen degrees says."""
    best = min((_try_placed(placed, words) for placed in _placed(target)), key=_rank)
    return replace(best, config=target.config)


def _rank(one: Tried) -> tuple[bool, float]:
    """What wins is first: the fastest that fits, else the one that needs least."""
    return one.status != "fits", one.seconds if one.status == "fits" else one.peak_bytes or math.inf


def _try_placed(target: Target, words: str) -> Tried:
    trace = trace_step(_first_request(target))
    if target.config.memory.recompute != "auto":
        plan, prediction = bare_plan(target, trace), predict(target, trace)
        seconds = prediction.step_seconds if prediction is not None else math.inf
        return Tried(target.config, words, "fits" if plan.fits else "does not fit", seconds, plan.peak_bytes)
    setting = setting_for(target)
    problem = problem_of_trace(trace, baseline_policy(setting), setting)
    # The context, NCCL's buffers, what is reserved and not used. The problem over-counts: what only fits without them is tried too.
    beside = bare_plan(target, trace).peak_bytes - trace.peak()[0]
    counted = replace(problem, budget_bytes=problem.budget_bytes - beside)
    choice = solve(counted, _SOLVE_SECONDS, with_worth=False) or solve(problem, _SOLVE_SECONDS, with_worth=False)
    if choice is None:
        return Tried(target.config, words, "does not fit")
    seconds = choice.seconds * target.config.train.grad_accum / setting.passes
    return Tried(target.config, words, "fits", seconds, choice.peak_bytes + beside)
