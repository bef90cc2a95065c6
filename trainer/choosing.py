"""What ``memory.recompute: auto`` means for a configuration: a policy that fits, chosen by the planner and checked by tracing it.

A baseline step is traced, the planner's problem is read off it, the chosen policy is traced in turn, and what the problem got wrong is
given back to it as more or less budget. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from memory_mgmt.activations import Shapes
from memory_mgmt.cost_model import Rates, Topology
from memory_mgmt.planner import Choice, solve
from memory_mgmt.planner_search import smallest_budget
from memory_mgmt.policy import Policy
from memory_mgmt.problem import Setting, baseline_policy, problem_of_trace
from memory_mgmt.trace import Trace
from parallel.dims import ParallelDims
from trainer.config import RunConfig

TRIES = 4
HOST_MARGIN = 0.98
"""Of a rank's host memory that the planner may fill: parked tensors are rounded up to pages and slabs."""
_CLOSE = 0.01
"""A traced peak within this share below the budget is good enough."""
_SOLVE_SECONDS = 10.0
_LITTLE, _NEAR = 5e-3, 0.05
"""Where a policy takes at most this share of the step longer than one that keeps everything, this much below the budget is good enough:
another trace takes as long as all the rest of a plan. Not more: by the trace other tiles can be worth more than the planner knows."""
_SHY = 2e-3
"""Share of the budget that is left after a try that exceeded it."""
_WORTH_A_TRACE = 1e-4
"""Share of the step that other shares in the same tiles and groups must save before they are traced."""


@dataclass(frozen=True)
class Chosen:
    """A policy, its traced step, and the planner's account of it (None: it is the leanest, and still does not fit)."""

    policy: Policy
    trace: Trace
    choice: Choice | None


def setting_of(
    config: RunConfig, vocab_size: int, rates: Rates, dims: ParallelDims, ranks_per_node: int, budget: int, host: int, cuda: bool
) -> Setting:
    """The problem's circumstances. ``budget`` and ``host``: bytes of this rank for traced tensors and for offload."""
    shapes = Shapes(
        config=config.model,
        rows=config.train.micro_batch_size,
        # Of a tensor-parallel rank: a part of the tokens with all heads and columns, or all of them with a part, are as many bytes.
        tokens=config.data.seq_len // (config.parallel.cp * config.parallel.tp),
        precision=config.train.precision,
        residual=config.train.residual,
        cp=config.parallel.cp,
        ranges=2 if config.layout != "contiguous" and config.parallel.cp > 1 else 1,
        cuda=cuda,
    )
    return Setting(
        model=config.model,
        shapes=shapes,
        vocab_size=vocab_size // config.parallel.tp,
        rates=rates,
        topology=Topology.of(dims, ranks_per_node),
        budget_bytes=budget,
        host_bytes=int(HOST_MARGIN * host),
        host_limit_bytes=host,
        step_tokens=config.global_batch_sequences * config.data.seq_len,
        passes=min(config.train.grad_accum, 2),
        quantise=() if config.memory.quantise == "none" else (config.memory.quantise,),
    )


def _much_the_same(choice: Choice, known: Choice) -> bool:
    """Whether a choice differs from one that is known to fit, and that loses little to keeping everything, in shares alone, and they save
    next to nothing."""
    if known.extra_seconds > _LITTLE * known.seconds:
        return False
    one, other = choice.policy, known.policy
    tiles = [(p.group_blocks, p.loss_tile_tokens, p.ffn_tile_tokens, p.memory_tile_tokens) for p in (one, other)]
    return tiles[0] == tiles[1] and choice.seconds > (1 - _WORTH_A_TRACE) * known.seconds


def choose_policy(setting: Setting, trace_policy: Callable[[Policy], Trace], counted: Callable[[Trace], int]) -> Chosen:
    """The fastest policy whose step needs at most ``setting.budget_bytes``, or where none does, the one that needs least.

    ``trace_policy`` traces a step; ``counted(trace)`` is what of it counts against the budget, in bytes.
    """
    baseline = baseline_policy(setting)
    problem = problem_of_trace(trace_policy(baseline), baseline, setting)
    best: Chosen | None = None
    allowed = setting.budget_bytes
    for _ in range(TRIES):
        choice = solve(replace(problem, budget_bytes=allowed), _SOLVE_SECONDS)
        if choice is None:  # less than the least that the problem knows of: that one is the last try
            if best is not None:
                break
            choice = smallest_budget(problem).choice
        if best is not None and best.choice is not None and (choice.policy == best.policy or _much_the_same(choice, best.choice)):
            break  # another budget, and nothing else to try
        found = Chosen(choice.policy, trace_policy(choice.policy), choice)
        peak, over_host = counted(found.trace), found.trace.peak("host")[0] - setting.host_limit_bytes
        if over_host > 0 and problem.host_bytes:
            problem = replace(problem, host_bytes=max(0, problem.host_bytes - over_host))
            continue
        if peak <= setting.budget_bytes:
            if best is None or best.choice is None or choice.seconds < best.choice.seconds:
                best = found
            close = _NEAR if choice.extra_seconds <= _LITTLE * choice.seconds else _CLOSE
            if choice.extra_seconds <= 0 or peak >= (1 - close) * setting.budget_bytes:
                break
        elif choice.peak_bytes > allowed:
            return best or replace(found, choice=None)
        # What the problem did not see counts against its budget, what it saw too much of is given back.
        corrected = setting.budget_bytes - (peak - choice.peak_bytes)
        if peak > setting.budget_bytes:  # other shares round to other tiles: a hair too much again would be a trace for nothing
            corrected -= int(_SHY * setting.budget_bytes)
        if corrected == allowed:
            break
        allowed = corrected
    return best or Chosen(found.policy, found.trace, None)
