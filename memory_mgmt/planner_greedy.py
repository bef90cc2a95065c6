"""The choice by seconds per byte freed, without a solver: what is dear to recompute is swapped as long as copies are hidden, what is
cheap is recomputed or, where that is allowed, kept in eight bits, and copies that are not hidden are paid for only where those cost more.
Imports no torch.

Layers that are alike get the same shares. How many bytes must go is found by trying: the simulated excess is added to the need until
nothing exceeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from memory_mgmt.planner_problem import LayerCost, LossTile, Problem
from memory_mgmt.planner_simulate import Evaluation, evaluate
from memory_mgmt.policy import CLASSES, ActivationClass, LayerPolicy, Policy, Split

_ROUNDS = 40


@dataclass
class _Item:
    """One class of all layers that are alike; shares are of the whole run."""

    run: int
    name: ActivationClass
    bytes: float
    seconds_per_byte: float
    """To recompute; infinite where that is not allowed."""
    may_swap: bool
    whole: bool
    packed: float = 1.0
    """Bytes of an eight-bit copy per byte; at least 1 where none is allowed."""
    packing_seconds: float = math.inf
    """To make and to read the copy, per byte that it frees."""
    swap: float = 0.0
    recompute: float = 0.0
    quantise: float = 0.0

    @property
    def left(self) -> float:
        """Bytes still kept as they are."""
        return self.bytes - self.swap - self.recompute - self.quantise


@dataclass
class _Run:
    """Layers with equal costs and equal rights."""

    cost: LayerCost
    layers: list[int]
    hidden: float
    """Bytes that its layers may swap together without being waited for; 0 where they may not be swapped."""
    swappable: bool
    spared: bool
    """Kept as it is."""


def solve_greedy(problem: Problem) -> Policy | None:
    """A policy that fits ``problem`` (one tiling, groups of one block), or None when the greedy finds none.

    Tries every loss tile; the last layer, whose activations are all there at the peak anyway, is left alone if that fits.
    """
    best: tuple[Evaluation, Policy] | None = None
    without_loss = problem.base_seconds - min(tile.seconds for tile in problem.loss_tiles)
    for tile in sorted(problem.loss_tiles, key=lambda tile: tile.seconds):
        if best is not None and without_loss + tile.seconds >= best[0].seconds:
            break
        for spare_last in (True, False):
            found = _with_loss_tile(problem, tile, spare_last)
            if found and (best is None or found[0].seconds < best[0].seconds):
                best = found
    return best[1] if best else None


def _with_loss_tile(problem: Problem, tile: LossTile, spare_last: bool) -> tuple[Evaluation, Policy] | None:
    runs = _runs(problem, spare_last)
    need = 0.0
    for _ in range(_ROUNDS):
        items = _items(runs)
        unmet = _free(problem, runs, items, need)
        policy = _policy(problem, runs, items, tile)
        found = evaluate(problem, policy)
        if not found.violations:
            return found, policy
        excess = found.peak_bytes - problem.budget_bytes
        if unmet or excess <= 0:
            return None
        need += 1.0 + 1.001 * excess
    return None


def _runs(problem: Problem, spare_last: bool) -> list[_Run]:
    n = len(problem.layers)
    members: dict[tuple[LayerCost, bool, bool], list[int]] = {}
    for i, layer in enumerate(problem.layers):
        members.setdefault((layer, i < problem.n_swappable, spare_last and i == n - 1), []).append(i)
    return [
        _Run(cost, layers, sum(_hidden(problem, i) for i in layers) if swappable else 0.0, swappable, spared)
        for (cost, swappable, spared), layers in members.items()
    ]


def _hidden(problem: Problem, i: int) -> float:
    """Bytes whose copies hide behind the next layer's forward on the way out and its backward on the way in."""
    if i + 1 == len(problem.layers) or not problem.overlap:
        return 0.0
    after = problem.layers[i + 1]
    free = max(0.0, after.backward_seconds - problem.layers[i].fetch_seconds)
    return min(after.forward_seconds * problem.bandwidth_out, free * problem.bandwidth_in) / problem.swap_ratio


def _items(runs: list[_Run]) -> list[_Item]:
    items = []
    for r, run in enumerate(runs):
        for name in CLASSES:
            cost = run.cost.of(name)
            if not cost.bytes:
                continue
            allowed = cost.may_recompute and name != "input"
            price = cost.recompute_seconds / cost.bytes if allowed and not run.spared else math.inf
            item = _Item(r, name, cost.bytes * len(run.layers), price, cost.may_swap and run.swappable, cost.whole_recompute)
            if cost.quantised_bytes is not None and cost.quantised_bytes < cost.bytes and not run.spared:
                item.packed = cost.quantised_bytes / cost.bytes
                item.packing_seconds = (cost.quantise_seconds + cost.dequantise_seconds) / (cost.bytes - cost.quantised_bytes)
            if not cost.may_keep:
                item.recompute = item.bytes
            items.append(item)
    return items


def _free(problem: Problem, runs: list[_Run], items: list[_Item], need: float) -> float:
    """Swap, recompute and pack into eight bits until ``need`` bytes are freed; the bytes that could not be."""
    hidden = [run.hidden for run in runs]
    host = problem.host_bytes / problem.swap_ratio

    def swap(item: _Item, limit: float) -> None:
        nonlocal need, host
        take = min(item.left, limit, host, need)
        item.swap += take
        host -= take
        need -= take
        hidden[item.run] -= take

    def recompute(item: _Item) -> None:
        nonlocal need
        take = min(item.left, need)
        item.recompute += take
        need -= take
        if item.packed < 1.0:  # what was packed before can still go altogether
            take = min(item.quantise, need / item.packed)
            item.quantise -= take
            item.recompute += take
            need -= take * item.packed

    def pack(item: _Item) -> None:
        nonlocal need
        take = min(item.left, need / (1 - item.packed))
        item.quantise += take
        need -= take * (1 - item.packed)

    dear = sorted((item for item in items if item.may_swap), key=lambda item: -item.seconds_per_byte)
    for item in dear:
        swap(item, max(0.0, hidden[item.run]))
    waited = problem.swap_ratio * (1 / problem.bandwidth_out + 1 / problem.bandwidth_in)
    ways = [(item.seconds_per_byte, recompute, item) for item in items] + [(item.packing_seconds, pack, item) for item in items]
    cheap = sorted((way for way in ways if way[0] < math.inf), key=lambda way: way[0])
    for price, free, item in cheap:
        if price <= waited:
            free(item)
    for item in dear:
        swap(item, math.inf)
    for _, free, item in cheap:
        free(item)
    return max(0.0, need)


def _policy(problem: Problem, runs: list[_Run], items: list[_Item], tile: LossTile) -> Policy:
    layers = [LayerPolicy()] * len(problem.layers)
    for r, run in enumerate(runs):
        own = [item for item in items if item.run == r]
        for place, i in enumerate(run.layers):
            layers[i] = LayerPolicy(**{item.name: _split(item, place, len(run.layers)) for item in own})
    return Policy(tuple(layers), 1, tile.tokens, problem.ffn_tiles[0], problem.memory_tiles[0])


def _split(item: _Item, place: int, count: int) -> Split:
    """The split of one layer of a run; what is recomputed whole is so in the first layers, whose bytes are held longest."""
    swap, recompute, quantise = item.swap / item.bytes, item.recompute / item.bytes, item.quantise / item.bytes
    if item.whole and recompute > 0:
        n_whole = math.ceil(recompute * count - 1e-9)
        if place < n_whole:
            return Split(0.0, 0.0, 1.0)
        others = count / (count - n_whole)
        swap, recompute = min(1.0, swap * others), 0.0
        quantise = min(1.0 - swap, quantise * others)
    return Split(max(0.0, 1.0 - swap - recompute - quantise), swap, recompute, quantise)
