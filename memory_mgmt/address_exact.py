"""Exact search: is there a plan no higher than a given height? Depth first over canonical plans; it proves when there is none.

In a canonical plan no buffer can slide down: each lies on the ground or on another one. Sliding down never makes a plan higher, so if
any plan fits, a canonical one does. Time is cut into *sections*, the largest sets of buffers alive together. A node takes the lowest
level at which something may still lie, picks a section there, and tries every buffer that may lie on it, then a hole. Cut off are: a
section whose ground plus what it must still hold passes the capacity; a hole that an unplaced buffer would fit into; a buffer that
nothing can carry at the height it is forced to; states that failed before. Parts without a common buffer are searched one by one.

``PythonSearch`` is the readable twin of address_exact.cpp, which does the same incrementally (a node costs what changed). The idea of
sections, decomposition and dominance: MiniMalloc (Moffitt, ASPLOS 2023).
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from memory_mgmt.address_native import exact_library, native_exact
from memory_mgmt.address_problem import Int64s, Problem, pressure

Answer = Literal["found", "infeasible", "stopped"]
INF = 2**62


def exact(
    problem: Problem, capacity: int, deadline: float, stop: NDArray[np.int32], seed: int = 0, fixed: Int64s | None = None
) -> tuple[Answer, Int64s]:
    """Offsets of a plan no higher than ``capacity`` ("found"), or the proof that there is none ("infeasible").

    ``fixed`` holds the offsets of buffers that keep theirs, -1 for the others, which all go above them: "infeasible" then says no more.
    "stopped": neither by ``deadline`` (time.perf_counter) or before another thread set ``stop[0]``; the offsets then mean nothing.
    """
    if not len(problem):
        return "found", np.zeros(0, dtype=np.int64)
    nodes_of_attempt = len(problem) + 300  # most attempts that succeed hardly ever go back
    fixed = np.full(len(problem), -1, dtype=np.int64) if fixed is None else fixed
    library = exact_library()
    if library is None:
        return PythonSearch.of(problem, capacity, fixed).restarts(features(problem), nodes_of_attempt, deadline, stop, seed)
    seconds = max(0.0, deadline - time.perf_counter())
    code, offsets = native_exact(library, problem, capacity, fixed, features(problem), nodes_of_attempt, seconds, stop, seed)
    answers: dict[int, Answer] = {1: "found", 0: "infeasible", -1: "stopped"}
    return answers[code], offsets


def features(problem: Problem) -> NDArray[np.float64]:
    """What orders of trial are made of, [3, n]: logarithms of duration, size and pressure, each with mean 0 and deviation 1."""
    logs = np.log(np.maximum(1, np.stack([problem.upper - problem.lower, problem.size, pressure(problem)])).astype(np.float64))
    deviation = logs.std(axis=1, keepdims=True)
    return np.ascontiguousarray((logs - logs.mean(axis=1, keepdims=True)) / np.where(deviation > 1e-12, deviation, 1))


def sections(problem: Problem) -> tuple[list[int], list[int], int]:
    """Per buffer its first section and the one after its last, and the number of sections. Buffers of size 0 are in none."""
    used = np.flatnonzero(problem.size)
    by_lower, by_upper = used[np.argsort(problem.lower[used])].tolist(), used[np.argsort(problem.upper[used])].tolist()
    first, end = [0] * len(problem), [0] * len(problem)
    started = closed = number = 0
    while closed < len(used):
        t = problem.upper[by_upper[closed]]  # the next life to end
        before = started
        while started < len(used) and problem.lower[by_lower[started]] < t:
            first[by_lower[started]] = number
            started += 1
        number += started > before  # a buffer began since the last section: a new largest set
        while closed < len(used) and problem.upper[by_upper[closed]] == t:
            end[by_upper[closed]] = number
            closed += 1
    return first, end, number


@dataclass
class PythonSearch:
    """One instance; heights are in units of the sizes' common divisor."""

    capacity: int
    unit: int
    size: list[int]
    first: list[int]
    end: list[int]
    rest: list[int]  # per section: bytes still to place
    floor: list[int]  # per section: where the next buffer may start
    solid: list[int]  # per section: the top of what lies there
    rank: list[int]
    offset: list[int]
    waiting: frozenset[int]  # what is to be placed
    failed: set[tuple[object, ...]] = field(default_factory=set)
    fewest_first: bool = False
    nodes: int = 0

    class Stopped(Exception):
        """A limit was reached."""

    @classmethod
    def of(cls, problem: Problem, capacity: int, fixed: Int64s | None = None) -> PythonSearch:
        """The search for a plan of ``problem`` no higher than ``capacity``, above the buffers with a fixed offset."""
        first, end, number = sections(problem)
        unit = problem.unit
        size = (problem.size // unit).tolist()
        offset = [-1] * len(size) if fixed is None else [at if at < 0 else at // unit for at in fixed.tolist()]
        rest, floor = [0] * number, [0] * number
        for j, bytes_ in enumerate(size):
            for s in range(first[j], end[j]):
                if offset[j] < 0:
                    rest[s] += bytes_
                else:
                    floor[s] = max(floor[s], offset[j] + bytes_)
        waiting = frozenset(j for j, bytes_ in enumerate(size) if bytes_ and offset[j] < 0)
        start = [max(0, at) for at in offset]
        return cls(capacity // unit, unit, size, first, end, rest, floor, floor.copy(), [0] * len(size), start, waiting)

    def restarts(
        self, features: NDArray[np.float64], nodes: int, deadline: float, stop: NDArray[np.int32], seed: int
    ) -> tuple[Answer, Int64s]:
        """Attempts with random orders of trial, ever longer, until one ends with an answer. Failed states stay known."""
        chance = random.Random(seed)
        start = self.floor.copy(), self.solid.copy(), self.rest.copy()
        if any(f + r > self.capacity for f, r in zip(self.floor, self.rest, strict=True)):
            return "infeasible", np.zeros(len(self.size), dtype=np.int64)
        for attempt in count():
            self.floor, self.solid, self.rest = (column.copy() for column in start)
            weights = np.array([chance.random() * (chance.random() < 0.5) for _ in range(3)])
            score = weights @ features + 0.2 * np.array([chance.gauss(0, 1) for _ in self.size])
            self.rank = np.argsort(np.argsort(-score, kind="stable")).tolist()
            self.fewest_first = chance.random() < 0.5
            self.nodes = nodes * (1 + attempt // 4)
            try:
                found = self.solve(self.waiting, deadline, stop)
            except self.Stopped:
                if self.nodes > 0 or time.perf_counter() > deadline or stop[0]:
                    return "stopped", np.zeros(len(self.size), dtype=np.int64)
                continue
            return ("found" if found else "infeasible"), np.array(self.offset, dtype=np.int64) * self.unit
        raise AssertionError("count() does not end")

    def solve(self, part: frozenset[int], deadline: float, stop: NDArray[np.int32]) -> bool:
        """Places the buffers of ``part`` on the ground as it is; False when they cannot be placed canonically."""
        self.nodes -= 1
        if self.nodes <= 0 or time.perf_counter() > deadline or stop[0]:
            raise self.Stopped
        low = self.propagate(part)
        if low is None:
            return False
        return all(self.branch(piece, low, deadline, stop) for piece in self.pieces(part))

    def pieces(self, part: frozenset[int]) -> list[frozenset[int]]:
        """The sets of ``part`` that share no section with each other, small ones first."""
        out: list[list[int]] = []
        reach = -1
        for j in sorted(part, key=self.first.__getitem__):
            if self.first[j] >= reach:
                out.append([])
            reach = max(reach, self.end[j])
            out[-1].append(j)
        return sorted((frozenset(piece) for piece in out), key=len)

    def propagate(self, part: frozenset[int]) -> dict[int, int] | None:
        """The lowest offset that each buffer may still get; raises ``floor`` to match. None when something fits nowhere."""
        low = dict.fromkeys(part, 0)
        while True:
            start, tops = [INF] * len(self.rest), [[(INF, -1)] * 2 for _ in self.rest]
            for j in part:
                low[j] = max(low[j], *self.floor[self.first[j] : self.end[j]])
                if low[j] + self.size[j] > self.capacity:
                    return None
                for s in range(self.first[j], self.end[j]):
                    start[s] = min(start[s], low[j])
                    tops[s] = sorted([*tops[s], (low[j] + self.size[j], j)])[:2]
            changed = False
            for j in part:
                life = range(self.first[j], self.end[j])
                support = max(self.solid[s] for s in life)
                if support + self.size[j] <= min(self.floor[s] for s in life):
                    return None  # it would fit into a hole left below
                # The lowest top of another buffer to come that could carry it.
                carrier = min(tops[s][1][0] if tops[s][0][1] == j else tops[s][0][0] for s in life)
                if support < low[j] < carrier:
                    if carrier == INF:
                        return None
                    low[j] = carrier
                    changed = True
            for s, lowest in enumerate(start):
                if self.floor[s] < lowest < INF:
                    self.floor[s] = lowest
                    changed = True
                    if lowest + self.rest[s] > self.capacity:
                        return None
            if not changed:
                return low

    def branch(self, part: frozenset[int], low: dict[int, int], deadline: float, stop: NDArray[np.int32]) -> bool:
        """Tries everything that may lie on the lowest level of one section of ``part``, then a hole there."""
        spanned = range(min(self.first[j] for j in part), max(self.end[j] for j in part))
        state = (part, *((self.floor[s], self.solid[s]) for s in spanned if self.rest[s]))
        if state in self.failed:
            return False
        level = min(low[j] for j in part)
        at, lying = self.section_at(part, low, level)
        ground = self.floor.copy(), self.solid.copy(), self.rest.copy()
        tried: set[tuple[int, int, int]] = set()
        for j in sorted(lying, key=self.rank.__getitem__):
            shape = (self.first[j], self.end[j], self.size[j])
            if shape in tried:
                continue
            tried.add(shape)
            self.offset[j] = level
            for s in range(self.first[j], self.end[j]):
                self.floor[s] = self.solid[s] = level + self.size[j]
                self.rest[s] -= self.size[j]
            if self.solve(part - {j}, deadline, stop):
                return True
            self.floor, self.solid, self.rest = (column.copy() for column in ground)
        if level + 1 + self.rest[at] <= self.capacity:
            self.floor[at] = level + 1
            if self.solve(part, deadline, stop):
                return True
            self.floor, self.solid, self.rest = (column.copy() for column in ground)
        self.failed.add(state)
        return False

    def section_at(self, part: frozenset[int], low: dict[int, int], level: int) -> tuple[int, list[int]]:
        """The section to branch on, with the least slack or the fewest choices, and what may lie there at ``level``."""
        lying: dict[int, list[int]] = {}
        for j in part:
            if low[j] == level:
                for s in range(self.first[j], self.end[j]):
                    lying.setdefault(s, []).append(j)

        def key(s: int) -> tuple[int, int, int]:
            slack = self.capacity - self.floor[s] - self.rest[s]
            choices = len(lying[s])
            return (choices + (slack > 0), slack, s) if self.fewest_first else (slack, choices, s)

        at = min(lying, key=key)
        return at, lying[at]
