"""Shares that can be executed: whole multiples of a tile of tokens. Imports no torch."""

from __future__ import annotations

import math

from memory_mgmt.planner_problem import ClassCost, Problem
from memory_mgmt.policy import CLASSES, LayerPolicy, Split

_TOUCH = 1e-6
"""A share this close to a multiple of the step is that multiple."""


def rounded(layers: tuple[LayerPolicy, ...], problem: Problem) -> tuple[LayerPolicy, ...]:
    """``layers`` with every share a multiple of ``share_tokens`` or of the tile, as the execution cuts them. Neither kept nor
    swapped shares nor those in eight bits grow where the rest can be recomputed; else what is not kept is swapped, or where
    nothing is, in eight bits. ``problem`` has one tiling left."""
    if problem.tokens <= 0:
        return layers
    made: dict[tuple[LayerPolicy, object], LayerPolicy] = {}
    result = []
    for splits, cost in zip(layers, problem.layers, strict=True):
        if (splits, cost) not in made:
            steps = dict.fromkeys(CLASSES, max(problem.share_tokens, problem.ffn_tiles[0]))
            if cost.kind == "memory":
                # Memory layers are cut at their own tiles, or at eighths (memory_mgmt/mixer_saving.py).
                steps["mixer"] = problem.memory_tiles[0] or math.ceil(problem.tokens / 8)
            made[splits, cost] = LayerPolicy(
                **{name: _rounded(splits.of(name), cost.of(name), problem.tokens, max(1, steps[name])) for name in CLASSES}
            )
        result.append(made[splits, cost])
    return tuple(result)


def _rounded(split: Split, cost: ClassCost, tokens: int, step: int) -> Split:
    def down(share: float) -> float:
        return 1.0 if share >= 1 - _TOUCH else min(1.0, math.floor(share * tokens / step + _TOUCH) * step / tokens)

    keep, swap, quantise = down(split.keep), down(split.swap), down(split.quantise)
    if 1.0 - keep - swap - quantise < _TOUCH:
        return Split(1.0 - swap - quantise, swap, 0.0, quantise)
    if cost.may_recompute and split.recompute > _TOUCH:
        return Split(keep, swap, 1.0 - keep - swap - quantise, quantise)
    # Nothing of it is recomputed: what does not fit a whole step goes with the shares that remain.
    if split.swap > 0:
        return Split(keep, 1.0 - keep - quantise, 0.0, quantise)
    return Split(keep, 0.0, 0.0, 1.0 - keep) if split.quantise > 0 else Split(1.0, 0.0, 0.0)
