"""MEMO's rule as a baseline: every layer swaps its input and its attention output, and of the rest the first share alpha of tokens;
the other tokens are recomputed, and the last two layers are never touched (arXiv 2407.12117, section 4.1). Imports no torch.
"""

from __future__ import annotations

from memory_mgmt.planner_problem import LayerCost, Problem
from memory_mgmt.policy import KEEP, SWAP, LayerPolicy, Policy, Split

_ALWAYS = ("input", "mixer")
_OTHERS = ("projections", "feed_forward")


def memo_alpha(problem: Problem) -> float:
    """MEMO's one share: the largest whose copies hide behind one layer's forward and fit into host memory; within [0, 1]."""
    swapped = problem.layers[: problem.n_swappable]
    if not swapped:
        return 0.0
    others = [sum(layer.of(name).bytes for name in _OTHERS) for layer in swapped]
    always = [sum(layer.of(name).bytes for name in _ALWAYS) for layer in swapped]
    hidden = [
        (layer.forward_seconds * problem.bandwidth_out / problem.swap_ratio - first) / rest
        for layer, first, rest in zip(swapped, always, others, strict=True)
        if rest
    ]
    by_host = (problem.host_bytes / problem.swap_ratio - sum(always)) / sum(others) if sum(others) else 1.0
    return max(0.0, min(1.0, by_host, *hidden))


def solve_memo(problem: Problem) -> Policy:
    """The policy of MEMO's rule on ``problem``, with its first tile candidates. It may not fit: ``evaluate`` says."""
    alpha = memo_alpha(problem)
    n = problem.n_swappable
    layers = tuple(_layer(layer, alpha) if i < n else LayerPolicy() for i, layer in enumerate(problem.layers))
    loss = min(problem.loss_tiles, key=lambda tile: tile.seconds)
    return Policy(layers, 1, loss.tokens, problem.ffn_tiles[0], problem.memory_tiles[0], {"alpha": alpha})


def _layer(layer: LayerCost, alpha: float) -> LayerPolicy:
    splits = {name: SWAP for name in _ALWAYS if layer.of(name).bytes}
    splits |= {name: Split(0.0, alpha, 1.0 - alpha) for name in _OTHERS if layer.of(name).bytes}
    return LayerPolicy(**{"input": KEEP, **splits})
