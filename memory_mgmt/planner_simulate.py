"""Walk one step under a policy, tensor by tensor, and say what it holds and how long it takes.

Written against the description in ``planner_problem.py`` alone and sharing nothing with the rows of ``planner_lp.py``: every policy
that the planner returns is checked here. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from memory_mgmt.planner_problem import LayerCost, Problem
from memory_mgmt.policy import CLASSES, ActivationClass, LayerPolicy, Policy

_SLACK = 1e-6
"""Relative excess over a limit that is taken for rounding."""


@dataclass(frozen=True)
class Evaluation:
    """What a policy needs."""

    peak_bytes: int
    peak_moment: str
    host_bytes: int
    seconds: float
    recompute_seconds: float
    """Forward work done again, tiles' own cost included."""
    quantise_seconds: float
    """Making eight-bit copies and making them wide again."""
    waiting_seconds: float
    """Computation waiting for copies."""
    copied_bytes: int
    """To host memory; as much comes back."""
    violations: tuple[str, ...]
    """What is not allowed or does not fit, in words; empty for a valid policy."""


@dataclass
class _Ledger:
    """Live bytes by owner, and the most that was ever live."""

    total: float
    live: dict[tuple[int, str], float] = field(default_factory=dict)
    peak: float = 0.0
    moment: str = ""

    def hold(self, layer: int, name: str, n_bytes: float) -> None:
        self.total += n_bytes - self.live.get((layer, name), 0.0)
        self.live[layer, name] = n_bytes

    def drop(self, layer: int, name: str) -> None:
        self.total -= self.live.pop((layer, name), 0.0)

    def look(self, moment: str, working: float) -> None:
        if self.total + working > self.peak:
            self.peak, self.moment = self.total + working, moment


class _Walk:
    """State of the three queues and of memory during one simulated step."""

    def __init__(self, problem: Problem, policy: Policy) -> None:
        self.problem, self.policy = problem, policy
        self.layers = problem.layers
        k = policy.group_blocks
        self.groups = [range(first, min(first + k, len(self.layers))) for first in range(0, len(self.layers), k)]
        self.waiting_bytes = [sum(self.share(i, name, "swap") for i in group for name in CLASSES) for group in self.groups]
        """Of each group of layers in host memory."""
        self.memory = _Ledger(problem.resident_bytes)
        self.now = self.out_free = self.in_free = 0.0
        self.parked_at: dict[int, float] = {}
        self.back_at: dict[int, float] = {}
        self.recomputed = self.quantised = self.waited = 0.0

    # --- what a layer makes, keeps and lacks ---------------------------------------------------------------------------------

    def share(self, i: int, name: ActivationClass, part: str) -> float:
        """Bytes of a class that are kept, swapped or recomputed."""
        return getattr(self.policy.layers[i].of(name), part) * self.layers[i].of(name).bytes

    def in_eight_bits(self, i: int, name: ActivationClass) -> float:
        """Bytes of the eight-bit copies of a class."""
        return self.policy.layers[i].of(name).quantise * (self.layers[i].of(name).quantised_bytes or 0)

    def materialise(self, i: int, name: ActivationClass) -> None:
        """A whole class is there, except what is only ever there one tile at a time."""
        cost, split = self.layers[i].of(name), self.policy.layers[i].of(name)
        whole = float(cost.bytes)
        if cost.tiled_bytes is not None:
            by_tile = split.recompute + split.quantise
            whole = (1 - by_tile) * cost.bytes + by_tile * cost.tiled_bytes + self.in_eight_bits(i, name)
        self.memory.hold(i, name, whole)

    def convert(self, i: int, part: str) -> None:
        """Time of ``quantise`` in forward or ``dequantise`` in backward."""
        layer, splits = self.layers[i], self.policy.layers[i]
        seconds = sum(splits.of(name).quantise * getattr(layer.of(name), f"{part}_seconds") for name in CLASSES)
        self.now += seconds
        self.quantised += seconds

    def wait(self, until: float) -> None:
        """Computation stands still until a copy is done."""
        if until > self.now:
            self.waited += until - self.now
            self.now = until

    # --- forward ---------------------------------------------------------------------------------------------------------------

    def forward(self) -> None:
        for g, group in enumerate(self.groups):
            self.free_buffer(g - 2)
            for i in group:
                self.run_layer_forward(i, "forward")
                for name in CLASSES:
                    self.leave(i, name)
            self.park(g)
        self.free_buffer(len(self.groups) - 2)

    def run_layer_forward(self, i: int, moment: str) -> None:
        """Memory and time of one layer's forward; everything it makes is there afterwards."""
        layer = self.layers[i]
        self.materialise(i, "input")
        self.materialise(i, "projections")
        self.memory.look(f"{moment} of layer {i}, entrance", layer.entrance_stages[0].forward_bytes)
        self.materialise(i, "mixer")
        self.memory.look(f"{moment} of layer {i}, mixer", layer.mixer_stages[0].forward_bytes)
        self.materialise(i, "feed_forward")
        self.memory.look(f"{moment} of layer {i}, feed-forward", layer.ffn_stages[0].forward_bytes)
        if moment == "forward":
            self.now += layer.forward_seconds
            self.convert(i, "quantise")

    def leave(self, i: int, name: ActivationClass) -> None:
        """After forward: the kept share stays, whole or in eight bits, the swapped share stays until its copy is done."""
        self.memory.hold(i, name, self.share(i, name, "keep") + self.in_eight_bits(i, name))
        self.memory.hold(i, name + " on its way", self.share(i, name, "swap"))

    def park(self, g: int) -> None:
        """Start the copies of a group to host memory."""
        seconds = self.waiting_bytes[g] * self.problem.swap_ratio / self.problem.bandwidth_out
        if not self.problem.overlap:
            self.wait(self.now + seconds)
            self.parked_at[g] = self.now
            self.free_buffer(g)
            return
        start = max(self.now, self.out_free)
        self.out_free = self.parked_at[g] = start + seconds

    def free_buffer(self, g: int) -> None:
        """Wait until a group's copies to host memory are done; the device tensors are gone then."""
        if g < 0:
            return
        self.wait(self.parked_at[g])
        for i in self.groups[g]:
            for name in CLASSES:
                self.memory.drop(i, name + " on its way")

    def loss(self) -> None:
        tile = self.problem.loss_tiles[0]
        self.memory.look("loss", tile.working_bytes)
        self.now += tile.seconds

    # --- backward --------------------------------------------------------------------------------------------------------------

    def fetch_seconds(self, g: int) -> float:
        """Of a group's parameters; of a group of several layers they come once for all that is recomputed, again for each backward."""
        group = self.groups[g]
        return (2 - 1 / len(group)) * sum(self.layers[i].fetch_seconds for i in group)

    def fetch(self, g: int) -> None:
        """Start the copies back of a group; room is taken at once."""
        if g < 0 or g in self.back_at:
            return
        seconds = self.waiting_bytes[g] * self.problem.swap_ratio / self.problem.bandwidth_in + self.fetch_seconds(g)
        start = max(self.now, self.in_free, self.parked_at[g] if self.waiting_bytes[g] else 0.0)
        self.in_free = self.back_at[g] = start + seconds
        for i in self.groups[g]:
            for name in CLASSES:
                self.memory.hold(i, name + " on its way", self.share(i, name, "swap"))

    def backward(self) -> None:
        for g in reversed(range(len(self.groups))):
            self.fetch(g)
            if self.problem.overlap:
                self.fetch(g - 1)
            if self.waiting_bytes[g] or self.fetch_seconds(g):
                self.wait(self.back_at[g])
            group = self.groups[g]
            for i in group:
                for name in CLASSES:
                    self.memory.drop(i, name + " on its way")
                    here = self.share(i, name, "keep") + self.share(i, name, "swap") + self.in_eight_bits(i, name)
                    self.memory.hold(i, name, here)
            if len(group) > 1:
                self.remake_group(group)
            for i in reversed(group):
                self.run_layer_backward(i, remade=len(group) > 1 and self.problem.group_inside == "all")

    def remake_group(self, group: range) -> None:
        """Forward of a group again from its first input: all of its inside stays, or only the inputs of its blocks."""
        stays = self.problem.group_inside == "all"
        for i in group:
            if i != group[0]:
                self.spend(self.layers[i].input.recompute_seconds)
                self.materialise(i, "input")
            if i == group[-1] and not stays:
                return
            self.run_layer_forward(i, "recomputation")
            self.spend(self.missing_seconds(i))
            if not stays:
                for name in CLASSES[1:]:
                    self.memory.drop(i, name)

    def missing_seconds(self, i: int) -> float:
        """To recompute what a layer lacks, its input excepted."""
        splits, layer = self.policy.layers[i], self.layers[i]
        return sum(splits.of(name).recompute * layer.of(name).recompute_seconds for name in CLASSES[1:])

    def spend(self, seconds: float) -> None:
        self.now += seconds
        self.recomputed += seconds

    def run_layer_backward(self, i: int, remade: bool) -> None:
        layer = self.layers[i]
        if not remade:
            self.spend(self.missing_seconds(i))
        self.convert(i, "dequantise")
        self.memory.hold(i, "gradients", layer.gradient_bytes)
        for name in CLASSES:
            self.materialise(i, name)
        self.memory.look(f"backward of layer {i}, feed-forward", layer.ffn_stages[0].backward_bytes)
        self.memory.drop(i, "feed_forward")
        self.memory.look(f"backward of layer {i}, mixer", layer.mixer_stages[0].backward_bytes)
        self.memory.drop(i, "mixer")
        self.memory.drop(i, "projections")
        self.memory.look(f"backward of layer {i}, entrance", layer.entrance_stages[0].backward_bytes)
        self.memory.drop(i, "input")
        self.spend(layer.tile_seconds)
        self.now += layer.backward_seconds


def evaluate(problem: Problem, policy: Policy) -> Evaluation:
    """Simulate one step under ``policy``. Raises ValueError when its layers, tiles or groups are not the problem's."""
    walk = _Walk(problem.for_policy(policy), policy)
    walk.forward()
    walk.loss()
    walk.backward()
    memory = walk.memory
    if problem.other_peak_bytes > memory.peak:
        memory.peak, memory.moment = problem.other_peak_bytes, "update"
    host = sum(walk.waiting_bytes) * problem.swap_ratio
    violations = list(_forbidden(walk.problem, policy))
    if memory.peak > problem.budget_bytes * (1 + _SLACK):
        violations.append(f"device memory: {memory.peak:.0f} bytes at '{memory.moment}', allowed {problem.budget_bytes}")
    if host > problem.host_bytes * (1 + _SLACK):
        violations.append(f"host memory: {host:.0f} bytes, allowed {problem.host_bytes}")
    return Evaluation(
        peak_bytes=round(memory.peak),
        peak_moment=memory.moment,
        host_bytes=round(host),
        seconds=walk.now + problem.fixed_seconds,
        recompute_seconds=walk.recomputed,
        quantise_seconds=walk.quantised,
        waiting_seconds=walk.waited,
        copied_bytes=round(host),
        violations=tuple(violations),
    )


def _forbidden(problem: Problem, policy: Policy) -> Iterable[str]:
    """Shares that the problem does not allow."""
    k = policy.group_blocks
    for i, (cost, splits) in enumerate(zip(problem.layers, policy.layers, strict=True)):
        swappable = i // k * k + k <= len(problem.layers) - problem.unswapped_last
        yield from _forbidden_in(i, cost, splits, swappable, inner=i % k > 0, grouped=k > 1)


def _forbidden_in(i: int, cost: LayerCost, splits: LayerPolicy, swappable: bool, inner: bool, grouped: bool) -> Iterable[str]:
    for name in CLASSES:
        split, known = splits.of(name), cost.of(name)
        if not known.bytes and not known.recompute_seconds:
            continue
        if split.swap > 0 and not (known.may_swap and swappable):
            yield f"layer {i}: {name} may not be swapped"
        if split.keep > _SLACK and not known.may_keep:
            yield f"layer {i}: {name} may not be kept"
        if split.quantise > 0 and known.quantised_bytes is None:
            yield f"layer {i}: {name} may not be kept in eight bits"
        if name == "input":
            if inner and split.recompute < 1:
                yield f"layer {i}: the input inside a group is recomputed, not kept"
            if not inner and split.recompute > 0:
                yield f"layer {i}: the input cannot be recomputed"
        elif split.recompute > 0 and not known.may_recompute:
            yield f"layer {i}: {name} may not be recomputed"
        elif grouped and split.recompute < 1:
            yield f"layer {i}: {name} inside a group is recomputed"
        if known.whole_recompute and 0 < split.recompute < 1:
            yield f"layer {i}: {name} is recomputed whole or not at all"
