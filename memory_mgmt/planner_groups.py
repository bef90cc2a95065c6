"""Checkpoint groups as layers: a problem whose units are groups of k blocks, so that one formulation serves every k.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from memory_mgmt.planner_problem import NOTHING, ClassCost, LayerCost, Problem, Stage
from memory_mgmt.policy import RECOMPUTE, LayerPolicy


def grouped(problem: Problem, k: int) -> Problem:
    """``problem`` (one tiling left) with every k blocks merged into one layer that has only an input to keep or swap; everything
    else is recomputed, and its bytes and seconds are part of the merged layer's fixed costs. k = 1: the problem itself."""
    if k == 1:
        return replace(problem, group_blocks=(1,))
    n = len(problem.layers)
    made: dict[tuple[LayerCost, ...], LayerCost] = {}
    units = []
    for first in range(0, n, k):
        members = problem.layers[first : first + k]
        if members not in made:
            made[members] = _merged(members, problem.group_inside)
        units.append(made[members])
    swappable = max(0, n - problem.unswapped_last) // k
    return replace(problem, layers=tuple(units), group_blocks=(1,), unswapped_last=len(units) - swappable)


def spread(inputs: Sequence[LayerPolicy], n_layers: int, k: int) -> tuple[LayerPolicy, ...]:
    """The policies of single layers behind the policies of merged ones."""
    inner = LayerPolicy(RECOMPUTE, RECOMPUTE, RECOMPUTE, RECOMPUTE)
    return tuple(LayerPolicy(inputs[i // k].input, RECOMPUTE, RECOMPUTE, RECOMPUTE) if i % k == 0 else inner for i in range(n_layers))


def _there(*costs: ClassCost) -> int:
    """Bytes of classes that are recomputed in full."""
    return sum(cost.bytes if cost.tiled_bytes is None else cost.tiled_bytes for cost in costs)


def _working(layer: LayerCost, *, backward: bool) -> int:
    """The most that a fully recomputed layer holds beside its input, in forward or in backward."""
    stages = (layer.entrance_stages[0], layer.mixer_stages[0], layer.ffn_stages[0])
    entrance, mixer, ffn = (stage.backward_bytes if backward else stage.forward_bytes for stage in stages)
    return max(
        entrance + (0 if backward else _there(layer.projections)),
        mixer + _there(layer.projections, layer.mixer),
        ffn + _there(layer.projections, layer.mixer, layer.feed_forward),
    )


def _merged(members: tuple[LayerCost, ...], inside: str) -> LayerCost:
    """One group as one layer. Working bytes are counted beside the first block's input and the gradients of the whole group."""
    stays = inside == "all"
    all_gradients = sum(layer.gradient_bytes for layer in members)
    forward = backward = held = 0
    for j, layer in enumerate(members):
        own_input = layer.input.bytes if j else 0
        held += own_input
        not_yet = sum(earlier.gradient_bytes for earlier in members[:j])
        forward = max(forward, own_input + _working(layer, backward=False))
        backward = max(backward, held + _working(layer, backward=False) - all_gradients, held + _working(layer, backward=True) - not_yet)
        held += _there(layer.projections, layer.mixer, layer.feed_forward) if stays else 0
    recompute = sum(layer.recompute_seconds for layer in members) + sum(layer.input.recompute_seconds for layer in members[1:])
    if not stays:
        recompute += sum(layer.recompute_seconds for layer in members[:-1])
    tiles = sum(layer.tile_seconds for layer in members)
    return LayerCost(
        kind="group",
        input=members[0].input,
        projections=NOTHING,
        mixer=NOTHING,
        feed_forward=NOTHING,
        forward_seconds=sum(layer.forward_seconds for layer in members),
        backward_seconds=sum(layer.backward_seconds for layer in members) + recompute + tiles,
        ffn_stages=(Stage(forward, backward),),
        fetch_seconds=(2 - 1 / len(members)) * sum(layer.fetch_seconds for layer in members),
        gradient_bytes=all_gradients,
    )
