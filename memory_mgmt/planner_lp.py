"""The choice as a linear program: shares per layer and class, the times of three queues, memory at every position.

Variables per layer: swapped, recomputed and quantised share of each class (kept is the rest); end of forward f, of the copy out
d, of the copy back h, of backward b. Minimised: the end of backward. Times enter as ``later >= earlier + duration`` only, so the
least solution is the schedule itself. Integers: which loss tile, and whole-or-nothing recomputation. Imports no torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pulp

from memory_mgmt.planner_problem import LayerCost, Problem
from memory_mgmt.planner_solver import run_solver, split_of, value_of
from memory_mgmt.policy import CLASSES, ActivationClass, LayerPolicy

_TIE_BREAK = 1e-7
"""Of the step per step's worth of copies: among equal solutions the one that copies less, and keeps less in eight bits."""

_INTEGER_GAP = 1e-4
"""Share of the objective that a choice of integers may be worse than the best."""

Term = tuple[float, pulp.LpVariable]


@dataclass(frozen=True)
class Solution:
    """A solved program, in seconds and bytes."""

    layers: tuple[LayerPolicy, ...]
    loss_tile: int
    """Index of the loss tile."""
    seconds: float
    budget_bytes: float
    """The budget; in ``smallest_budget`` mode the least one."""
    solver: str
    device_worth: float = 0.0
    """Duals: seconds per step that one more byte of device memory saves."""
    host_worth: float = 0.0
    binding_rows: tuple[str, ...] = ()
    """Positions whose memory rows have a price, dearest first."""
    link_worth: float = 0.0
    """Seconds per step that one more byte per second of both directions would save, at the margin."""


@dataclass
class _Shares:
    """Variables of one layer (or of a run of equal ones)."""

    swap: dict[str, pulp.LpVariable] = field(default_factory=dict)
    recompute: dict[str, pulp.LpVariable] = field(default_factory=dict)
    quantise: dict[str, pulp.LpVariable] = field(default_factory=dict)

    def not_kept(self, name: ActivationClass) -> list[pulp.LpVariable]:
        """The shares of a class that are not simply kept."""
        return [part[name] for part in (self.swap, self.recompute, self.quantise) if name in part]


class Program:
    """One linear program over a problem with a single tiling and groups of one block (``planner_groups.grouped``).

    ``uniform``: equal layers share their variables. ``minimise``: ``seconds``, or ``budget`` for the smallest budget.
    """

    def __init__(self, problem: Problem, *, uniform: bool = False, minimise: str = "seconds") -> None:
        self.problem, self.minimise = problem, minimise
        self.n = len(problem.layers)
        everything = sum(layer.of(name).bytes for layer in problem.layers for name in CLASSES)
        # Units near 1 for the solver: tolerances are absolute.
        self.byte = max(1.0, everything / self.n)
        self.second = max(problem.base_seconds, 1e-9) / self.n
        self.program = pulp.LpProblem("memory_policy", pulp.LpMinimize)
        self.rows: dict[str, pulp.LpConstraint] = {}
        self.integers: list[pulp.LpVariable] = []
        self.memory_rows: dict[str, str] = {}
        self.copy_rows: dict[str, tuple[int, float]] = {}
        self.shares = self._make_shares(uniform)
        self.loss = [self._variable(f"loss_{j}", integer=len(problem.loss_tiles) > 1) for j in range(len(problem.loss_tiles))]
        self._row("one_loss", [(1.0, z) for z in self.loss], "==", 1.0)
        self._memory()
        self.end = self._times()
        self._objective()

    # --- variables -----------------------------------------------------------------------------------------------------------

    def _variable(self, name: str, upper: float | None = 1.0, integer: bool = False) -> pulp.LpVariable:
        category = pulp.LpInteger if integer else pulp.LpContinuous
        # PuLP 3.3 asks for its new method and warns about the constructor, which is all that earlier ones have.
        make = getattr(self.program, "add_variable", pulp.LpVariable)
        variable = make(name, 0, upper, category)
        if integer:
            self.integers.append(variable)
        return variable

    def _make_shares(self, uniform: bool) -> list[_Shares]:
        known: dict[tuple[LayerCost, bool], _Shares] = {}
        shares = []
        for i, layer in enumerate(self.problem.layers):
            swappable = i < self.problem.n_swappable
            key = (layer, swappable)
            if not uniform or key not in known:
                known[key] = self._layer_shares(i, layer, swappable)
            shares.append(known[key])
        return shares

    def _layer_shares(self, i: int, layer: LayerCost, swappable: bool) -> _Shares:
        made = _Shares()
        for name in CLASSES:
            cost = layer.of(name)
            if not cost.bytes and not cost.recompute_seconds:
                continue
            if swappable and cost.may_swap and cost.bytes:
                made.swap[name] = self._variable(f"s_{i}_{name}")
            if cost.may_recompute and name != "input":
                made.recompute[name] = self._variable(f"r_{i}_{name}", integer=cost.whole_recompute)
            if cost.quantised_bytes is not None:
                made.quantise[name] = self._variable(f"q_{i}_{name}")
            parts = [(1.0, variable) for variable in made.not_kept(name)]
            if not cost.may_keep:
                self._row(f"all_{i}_{name}", parts, "==", 1.0)
            elif len(parts) > 1:
                self._row(f"part_{i}_{name}", parts, "<=", 1.0)
        return made

    # --- rows ------------------------------------------------------------------------------------------------------------------

    def _row(self, name: str, terms: Sequence[Term], sense: str, right: float) -> None:
        merged: dict[pulp.LpVariable, float] = {}
        for factor, variable in terms:
            merged[variable] = merged.get(variable, 0.0) + factor
        relation = {"<=": pulp.LpConstraintLE, "==": pulp.LpConstraintEQ, ">=": pulp.LpConstraintGE}[sense]
        expression = pulp.LpAffineExpression(list(merged.items()))
        self.rows[name] = pulp.LpConstraint(expression, relation, name, right)
        self.program.addConstraint(self.rows[name])

    def _swap_terms(self, i: int, per: float) -> list[Term]:
        """Swapped bytes of layer i, divided by ``per``."""
        if i < 0:
            return []
        layer = self.problem.layers[i]
        return [(layer.of(name).bytes / per, s) for name, s in self.shares[i].swap.items()]  # type: ignore[arg-type]

    def _quantise_terms(self, i: int, part: str) -> list[Term]:
        """Time of ``quantise`` or ``dequantise`` of layer i."""
        layer, shares = self.problem.layers[i], self.shares[i].quantise
        return [(getattr(layer.of(name), f"{part}_seconds") / self.second, q) for name, q in shares.items()]  # type: ignore[arg-type]

    def _own(self, i: int, names: Sequence[ActivationClass]) -> tuple[float, list[Term]]:
        """What is there of a layer's classes during its own forward or backward: all, less what exists in tiles only."""
        layer = self.problem.layers[i]
        whole = float(sum(layer.of(name).bytes for name in names))
        terms: list[Term] = []
        for name in names:
            cost = layer.of(name)
            if cost.tiled_bytes is not None and name in self.shares[i].recompute:
                terms.append((-(cost.bytes - cost.tiled_bytes) / self.byte, self.shares[i].recompute[name]))
            if cost.tiled_bytes is not None and cost.quantised_bytes is not None:
                there = cost.tiled_bytes + cost.quantised_bytes
                terms.append((-(cost.bytes - there) / self.byte, self.shares[i].quantise[name]))
        return whole, terms

    def _limit(self, name: str, moment: str, terms: Sequence[Term], fixed_bytes: float) -> None:
        """``terms + fixed <= budget``."""
        self.memory_rows[name] = moment
        fixed = (fixed_bytes - self.problem.budget_bytes) / self.byte
        if self.minimise == "budget":
            self._row(name, [*terms, (-1.0, self.budget)], "<=", -fixed_bytes / self.byte)
        elif fixed > -1e6:  # a budget far beyond everything is no row
            self._row(name, terms, "<=", -fixed)

    def _memory(self) -> None:
        problem, layers = self.problem, self.problem.layers
        if self.minimise == "budget":
            self.budget = self._variable("budget", None)
            self._limit("other", "update", [], problem.other_peak_bytes)
        kept_before: list[Term] = []
        gradients = sum(layer.gradient_bytes for layer in layers)
        for i, layer in enumerate(layers):
            beside = [*kept_before, *(self._swap_terms(i - 1, self.byte) if problem.overlap else [])]
            self._layer_memory(i, beside, problem.resident_bytes, gradients)
            gradients -= layer.gradient_bytes
            kept_before = self._kept_after(i, kept_before)
        at_loss = [*kept_before, *(self._swap_terms(self.n - 1, self.byte) if problem.overlap else [])]
        tiles = [(tile.working_bytes / self.byte, z) for tile, z in zip(problem.loss_tiles, self.loss, strict=True)]
        self._limit("mem_loss", "loss", [*at_loss, *tiles], problem.resident_bytes)
        host = [term for i in range(self.n) for term in self._swap_terms(i, self.byte / problem.swap_ratio)]
        if host:
            self._row("host", host, "<=", problem.host_bytes / self.byte)

    def _layer_memory(self, i: int, beside: Sequence[Term], resident: float, gradients: float) -> None:
        """The six moments of one layer. Forward and backward meet the same kept and swapped bytes: one row serves both."""
        layer = self.problem.layers[i]
        for part, stage, names, names_back in (
            ("entrance", layer.entrance_stages[0], CLASSES[:2], CLASSES[:1]),
            ("mixer", layer.mixer_stages[0], CLASSES[:3], CLASSES[:3]),
            ("feed-forward", layer.ffn_stages[0], CLASSES, CLASSES),
        ):
            (there, tiled), (there_back, _) = self._own(i, names), self._own(i, names_back)
            forth, back = there + stage.forward_bytes, there_back + stage.backward_bytes + gradients
            moment = f"{'backward' if back >= forth else 'forward'} of layer {i}, {part}"
            self._limit(f"mem_{part[0]}_{i}", moment, [*beside, *tiled], resident + max(forth, back))

    def _kept_after(self, i: int, before: Sequence[Term]) -> list[Term]:
        """A variable for the kept bytes of layers 0..i, so that every memory row stays short."""
        layer, shares = self.problem.layers[i], self.shares[i]
        kept = self._variable(f"kept_{i}", None)
        terms: list[Term] = [(1.0, kept), *((-factor, variable) for factor, variable in before)]
        for name in CLASSES:
            size, packed = layer.of(name).bytes / self.byte, (layer.of(name).quantised_bytes or 0) / self.byte
            terms += [(size, variable) for variable in shares.not_kept(name)]
            terms += [(-packed, shares.quantise[name])] if name in shares.quantise else []
        self._row(f"keep_{i}", terms, "==", sum(layer.of(name).bytes for name in CLASSES) / self.byte)
        return [(1.0, kept)]

    def _after(self, name: str, later: pulp.LpVariable, earlier: pulp.LpVariable | None, terms: Sequence[Term], fixed: float) -> None:
        """``later >= earlier + terms + fixed``, seconds over ``self.second``."""
        before: list[Term] = [] if earlier is None else [(-1.0, earlier)]
        self._row(name, [(1.0, later), *before, *((-factor, variable) for factor, variable in terms)], ">=", fixed)

    def _copy(
        self, name: str, i: int, later: pulp.LpVariable, earlier: pulp.LpVariable | None, bandwidth: float, beside: float = 0.0
    ) -> None:
        """``beside``: seconds of other copies that come with it."""
        self.copy_rows[name] = (i, bandwidth)
        self._after(name, later, earlier, self._copy_terms(i, bandwidth), beside / self.second)

    def _copy_terms(self, i: int, bandwidth: float) -> list[Term]:
        """Time of a layer's copies in one direction."""
        return self._swap_terms(i, bandwidth * self.second / self.problem.swap_ratio)

    def _times(self) -> pulp.LpVariable:
        problem, n, second = self.problem, self.n, self.second
        forward = [self._variable(f"f_{i}", None) for i in range(n)]
        out = [self._variable(f"d_{i}", None) for i in range(n)]
        loss = self._variable("l", None)
        for i, layer in enumerate(problem.layers):
            duration, work = layer.forward_seconds / second, self._quantise_terms(i, "quantise")
            before = forward[i - 1] if i else None
            if not problem.overlap:
                self.copy_rows[f"f_{i}_after"] = (i, problem.bandwidth_out)
                self._after(f"f_{i}_after", forward[i], before, [*work, *self._copy_terms(i, problem.bandwidth_out)], duration)
                continue
            self._after(f"f_{i}_after", forward[i], before, work, duration)
            if i > 1 and self.shares[i - 2].swap:
                self._after(f"f_{i}_buffer", forward[i], out[i - 2], work, duration)
            self._copy(f"d_{i}_ready", i, out[i], forward[i], problem.bandwidth_out)
            if i:
                self._copy(f"d_{i}_queue", i, out[i], out[i - 1], problem.bandwidth_out)
        tiles = [(tile.seconds / second, z) for tile, z in zip(problem.loss_tiles, self.loss, strict=True)]
        self._after("l_after", loss, forward[-1], tiles, 0.0)
        if n > 1 and problem.overlap:
            self._after("l_buffer", loss, out[n - 2], tiles, 0.0)
        return self._backward_times(loss, out)

    def _backward_times(self, loss: pulp.LpVariable, out: Sequence[pulp.LpVariable]) -> pulp.LpVariable:
        n, second = self.n, self.second
        end = [self._variable(f"b_{i}", None) for i in range(n)]
        back = [self._variable(f"h_{i}", None) for i in range(n)]
        for i in reversed(range(n)):
            layer = self.problem.layers[i]
            work = [(layer.of(name).recompute_seconds / second, r) for name, r in self.shares[i].recompute.items()]  # type: ignore[arg-type]
            work += self._quantise_terms(i, "dequantise")
            duration = (layer.backward_seconds + layer.tile_seconds) / second
            before, bandwidth, fetch = end[i + 1] if i + 1 < n else loss, self.problem.bandwidth_in, layer.fetch_seconds
            if not self.problem.overlap:
                self.copy_rows[f"b_{i}_after"] = (i, bandwidth)
                self._after(f"b_{i}_after", end[i], before, [*work, *self._copy_terms(i, bandwidth)], duration + fetch / second)
                continue
            self._after(f"b_{i}_after", end[i], before, work, duration)
            if not self._comes_in(i):
                continue
            self._after(f"b_{i}_data", end[i], back[i], work, duration)
            issued = end[i + 2] if i + 2 < n else loss
            self._copy(f"h_{i}_issued", i, back[i], issued, bandwidth, fetch)
            if self.shares[i].swap:
                self._copy(f"h_{i}_parked", i, back[i], out[i], bandwidth, fetch)
            if i + 1 < n and self._comes_in(i + 1):
                self._copy(f"h_{i}_queue", i, back[i], back[i + 1], bandwidth, fetch)
        return end[0]

    def _comes_in(self, i: int) -> bool:
        """Whether a layer's backward may wait for copies to the device."""
        return bool(self.shares[i].swap) or self.problem.layers[i].fetch_seconds > 0

    def _objective(self) -> None:
        per = self.problem.bandwidth_out * self.second / _TIE_BREAK
        copies = [term for i in range(self.n) for term in self._swap_terms(i, per)]
        for layer, shares in zip(self.problem.layers, self.shares, strict=True):
            copies += [(layer.of(name).bytes / per, q) for name, q in shares.quantise.items()]  # type: ignore[arg-type]
        merged: dict[pulp.LpVariable, float] = {}
        for factor, variable in copies:
            merged[variable] = merged.get(variable, 0.0) + factor
        goal = self.budget if self.minimise == "budget" else self.end
        self.program.setObjective(pulp.LpAffineExpression([(goal, 1.0), *merged.items()]))

    # --- solving ---------------------------------------------------------------------------------------------------------------

    def solve(self, time_limit: float = 10.0, *, like: Solution | None = None, cutoff: float = math.inf) -> Solution | None:
        """The best solution, or None when there is none within the limits, or none below ``cutoff`` seconds. Integers are settled
        first (or taken from ``like``), then fixed, and the linear program is solved again for its prices."""
        deadline = time.monotonic() + time_limit
        if self.minimise == "seconds" and self.problem.other_peak_bytes > self.problem.budget_bytes:
            return None
        if self.integers and not self._settle_integers(deadline, like, cutoff):
            return None
        solver = run_solver(self.program, max(0.1, deadline - time.monotonic()))
        return None if solver is None or self._seconds() >= cutoff else self._read(solver)

    def _seconds(self) -> float:
        """Of the step in the present solution."""
        return value_of(self.end) * self.second + self.problem.fixed_seconds

    def _settle_integers(self, deadline: float, like: Solution | None, cutoff: float) -> bool:
        """Fix every integer variable at a good value; False when there is none, or when even fractions reach ``cutoff``."""
        if like is not None:
            self._fix({name: 1.0 if value else 0.0 for name, value in self._integers_of(like).items()})
            return True
        left = max(0.1, (deadline - time.monotonic()) / 3)
        if run_solver(self.program, left, relaxed=True) is None or self._seconds() >= cutoff:
            return False
        bound = value_of(self.program.objective)
        whole = self._whole_values()
        if len(whole) < len(self.integers):
            # Most layers come out whole in the relaxation: settling the others is nearly always as good as the full search.
            self._fix(whole)
            quick = run_solver(self.program, left, relative_gap=_INTEGER_GAP)
            found = value_of(self.program.objective) if quick else math.inf
            values = self._whole_values() if quick else {}
            if found > bound + abs(bound) * _INTEGER_GAP:
                self._release()
                searched = run_solver(self.program, left, relative_gap=_INTEGER_GAP)
                if searched and value_of(self.program.objective) < found:
                    values = self._whole_values()
            if not values:
                return False
            whole = values
        self._fix(whole)
        return True

    def _whole_values(self) -> dict[str, float]:
        """The integer variables that are whole in the present solution."""
        values = {variable.name: value_of(variable) for variable in self.integers}
        return {name: float(round(value)) for name, value in values.items() if abs(value - round(value)) < 1e-6}

    def _integers_of(self, solution: Solution) -> dict[str, float]:
        """Values of the integer variables in a solution of a program of the same shape."""
        values = {z.name: float(j == solution.loss_tile) for j, z in enumerate(self.loss)}
        for shares, splits in zip(self.shares, solution.layers, strict=True):
            values |= {variable.name: splits.of(name).recompute for name, variable in shares.recompute.items()}  # type: ignore[arg-type]
        return {variable.name: values[variable.name] for variable in self.integers}

    def _fix(self, values: Mapping[str, float]) -> None:
        for variable in self.integers:
            if variable.name in values:
                variable.cat, variable.lowBound, variable.upBound = pulp.LpContinuous, values[variable.name], values[variable.name]

    def _release(self) -> None:
        for variable in self.integers:
            variable.cat, variable.lowBound, variable.upBound = pulp.LpInteger, 0, 1

    def _read(self, solver: str) -> Solution:
        rows, problem = self.rows, self.problem
        prices = {name: -(rows[name].pi or 0.0) for name in self.memory_rows if name in rows}
        per_byte = self.second / self.byte
        host = -(rows["host"].pi or 0.0) * per_byte if "host" in rows else 0.0
        link = 0.0
        for name, (i, bandwidth) in self.copy_rows.items():
            if name in rows:
                swapped = sum(factor * value_of(variable) for factor, variable in self._swap_terms(i, 1.0 / problem.swap_ratio))
                link += (rows[name].pi or 0.0) * swapped / bandwidth**2
        dear = sorted((name for name, price in prices.items() if price > 1e-6), key=lambda name: -prices[name])
        return Solution(
            layers=tuple(self._policy(i) for i in range(self.n)),
            loss_tile=max(range(len(self.loss)), key=lambda j: value_of(self.loss[j])),
            seconds=self._seconds(),
            budget_bytes=value_of(self.budget) * self.byte if self.minimise == "budget" else problem.budget_bytes,
            solver=solver,
            device_worth=sum(prices.values()) * per_byte,
            host_worth=host,
            binding_rows=tuple(self.memory_rows[name] for name in dear),
            link_worth=link,
        )

    def _policy(self, i: int) -> LayerPolicy:
        shares = self.shares[i]
        parts = (shares.swap, shares.recompute, shares.quantise)
        return LayerPolicy(**{name: split_of(*(part.get(name) for part in parts)) for name in CLASSES})
