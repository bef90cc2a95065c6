"""Shares that can be executed: whole multiples of a tile of tokens. Imports no torch."""

from __future__ import annotations

import math

from memory_mgmt.planner_problem import ClassCost, Problem
from memory_mgmt.policy import CLASSES, LayerPolicy, Split

_TOUCH = 1e-6
"""A share this close to a multiple of the step is that multiple."""


def rounded(layers: tuple[LayerPolicy, ...], problem: Problem) -> tuple[LayerPolicy, ...]:
    """``layers`` with every share a multiple of ``share_tokens`` or of the tile, as the execution cuts them. Neither kept nor
    swapped shares grow where the rest can be recomputed; else what is not kept is swapped. ``problem`` has one tiling left."""
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

    keep, swap = down(split.keep), down(split.swap)
    if 1.0 - keep - swap < _TOUCH:
        return Split(1.0 - swap, swap, 0.0)
    if cost.may_recompute and split.recompute > _TOUCH:
        return Split(keep, swap, 1.0 - keep - swap)
    # Nothing of it is recomputed: what does not fit a whole step goes with the larger of the two shares that remain.
    return Split(keep, 1.0 - keep, 0.0) if split.swap > 0 else Split(1.0, 0.0, 0.0)
