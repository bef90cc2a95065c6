"""Several searches at once for one problem: they share the best plan and the proven bound, and stop each other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from memory_mgmt.address_exact import exact, sections
from memory_mgmt.address_greedy import FITS, Fit, orders, place
from memory_mgmt.address_local_search import squeaky_wheel
from memory_mgmt.address_native import exact_library, native_place, search_library
from memory_mgmt.address_problem import Int64s, Problem, height, max_live

# The exact search keeps a list of the buffers of every section: 160 MB at this many entries. In Python a node costs that many steps.
LARGEST_EXACT = 20_000_000
LARGEST_EXACT_PYTHON = 20_000


class Best:
    """The best plan so far and the proven lower bound of one problem; its methods may be called from several threads.

    ``deadline`` is on time.perf_counter's clock. Once the plan fits ``capacity``, at most a tenth of the time limit is left.
    """

    def __init__(self, problem: Problem, time_limit: float, capacity: int | None = None) -> None:
        now = time.perf_counter()
        self.problem = problem
        self.capacity = capacity
        self.deadline = now + time_limit
        self.grace = time_limit / 10
        self.bound = max_live(problem)
        # One buffer after another is a plan.
        self.offsets = np.cumsum(problem.size) - problem.size
        self.height = int(problem.size.sum())
        self.label = "none"
        self.changed = threading.Condition()
        self._running: list[tuple[int, NDArray[np.int32]]] = []
        self._levels: list[Best] = []

    @property
    def over(self) -> bool:
        """Nothing better is possible, or no time is left."""
        return self.height <= self.bound or time.perf_counter() >= self.deadline

    def offer(self, offsets: Int64s, label: str) -> None:
        """Keeps the plan if it is lower than the best; ends the searches for plans that are not lower than it."""
        with self.changed:
            found = height(self.problem, offsets)
            if found >= self.height and self.label != "none":
                return
            self.offsets, self.height, self.label = offsets, found, label
            if self.capacity is not None and found <= self.capacity:
                self.deadline = min(self.deadline, time.perf_counter() + self.grace)
            self._end_pointless()

    def prove(self, bound: int) -> None:
        """No plan is lower than ``bound``."""
        with self.changed:
            self.bound = max(self.bound, bound)
            self._end_pointless()

    def _end_pointless(self) -> None:
        for target, stop in self._running:
            if self.height <= target or target < self.bound or self.height <= self.bound:
                stop[0] = 1
        self.changed.notify_all()

    @contextmanager
    def searching(self, target: int) -> Iterator[NDArray[np.int32]]:
        """A flag that is set when a plan as low as ``target`` is known or impossible, or the time is over."""
        entry = (target, np.zeros(1, dtype=np.int32))
        with self.changed:
            self._running.append(entry)
            if self.over or not self.bound <= target < self.height:
                entry[1][0] = 1
        try:
            yield entry[1]
        finally:
            with self.changed:
                self._running = [other for other in self._running if other is not entry]

    @contextmanager
    def level(self, problem: Problem, time_limit: float) -> Iterator[Best]:
        """The best plan of one level of this problem: it ends with this one."""
        inner = Best(problem, time_limit)
        with self.changed:
            self._levels.append(inner)
            if self.over:
                inner.stop_all()
        try:
            yield inner
        finally:
            with self.changed:
                self._levels.remove(inner)

    def share(self, share: float) -> float:
        """The deadline for a search that may use this share of the time left."""
        now = time.perf_counter()
        return now + share * max(0.0, self.deadline - now)

    def stop_all(self) -> None:
        """Ends every search."""
        with self.changed:
            self.deadline = time.perf_counter()
            for _, stop in self._running:
                stop[0] = 1
            for inner in self._levels:
                inner.stop_all()


def greedy(best: Best) -> None:
    """Offers the greedy plans, until one meets the bound or the time is over; at least one."""
    for name, order in orders(best.problem):
        for fit in FITS:
            best.offer(_placed(best.problem, order, fit), f"greedy:{name}/{fit}")
            if best.over:
                return


def _placed(problem: Problem, order: Int64s, fit: Fit) -> Int64s:
    library = search_library()
    return place(problem, order, fit) if library is None else native_place(library, problem, order, fit == "best")


def skeleton(best: Best) -> None:
    """Places long lives greedily, then searches exactly for what lies on them, for several ideas of what is long.

    On a training step this is fast where the search over everything is not: what a layer keeps is stacked, and the transients of each
    layer are a small problem of their own.
    """
    problem, duration = best.problem, best.problem.upper - best.problem.lower
    parts = sections(problem)
    span = int(problem.upper.max() - problem.lower.min())
    for fraction in (64, 32, 16, 8, 4, 2):  # the fastest searches first
        long = np.flatnonzero(duration > span // fraction)
        if not 0 < len(long) < len(problem) or not exact_fits(problem.subset(np.flatnonzero(duration <= span // fraction))):
            continue
        for _, order in orders(problem.subset(long)):
            if best.over:
                return
            fixed = np.full(len(problem), -1, dtype=np.int64)
            fixed[long] = _placed(problem.subset(long), order, "first")
            if _least_height(problem, fixed, parts) > best.bound:
                continue
            with best.searching(best.bound) as stop:
                # What succeeds does so at once; the next idea is worth more than a longer search.
                deadline = min(best.share(0.05), time.perf_counter() + 0.1)
                answer, offsets = exact(problem, best.bound, deadline, stop, fixed=fixed)
            if answer == "found":
                best.offer(offsets, "skeleton")


def _least_height(problem: Problem, fixed: Int64s, parts: tuple[list[int], list[int], int]) -> int:
    """The height of the fixed buffers with all others that live at the same time above them, at the worst time."""
    floor, change = np.zeros(parts[2], dtype=np.int64), np.zeros(parts[2] + 1, dtype=np.int64)
    for a, b, at, size in zip(parts[0], parts[1], fixed.tolist(), problem.size.tolist(), strict=True):
        if at < 0:
            change[a] += size
            change[b] -= size
        else:
            np.maximum(floor[a:b], at + size, out=floor[a:b])
    return int((floor + np.cumsum(change[:-1])).max())


def squeak(best: Best, share: float, seed: int) -> None:
    """Local search from the best plan, for a share of the time left."""
    deadline = best.share(share)
    target = best.bound
    if best.capacity is not None and best.height > best.capacity:
        target = max(target, best.capacity)
    with best.searching(target) as stop:
        best.offer(squeaky_wheel(best.problem, best.offsets, target, deadline, stop, seed), "search")


def descend(best: Best, seed: int, from_below: bool) -> None:
    """Exact searches for lower and lower plans until the best one is proven optimal or the time is over.

    From below: first at the lower bound. Then, and else, halfway between what was not found in its share of the time and the best plan;
    when nothing is left between, the lower bound once more.
    """
    given_up = best.bound - 1  # no plan this low was found in its share of the time
    target = best.bound
    if best.capacity is not None and best.bound < best.capacity < best.height:
        target = best.capacity
    elif not from_below:
        target = _halfway(best, given_up)
    while not best.over:
        share = 0.7 if target == best.bound else 0.4
        with best.searching(target) as stop:
            answer, offsets = exact(best.problem, target, best.share(share), stop, seed)
        if answer == "found":
            best.offer(offsets, "exact")
        elif answer == "infeasible":
            best.prove(target + best.problem.unit)
        elif target < best.height:
            given_up = max(given_up, target)
        seed += 2
        target = best.bound if given_up >= best.height - best.problem.unit else _halfway(best, given_up)
        if target == best.bound:
            given_up = best.bound - 1


def _halfway(best: Best, given_up: int) -> int:
    """A target between the highest one given up or proven impossible and the best plan, a multiple of the unit."""
    low, high = max(given_up, best.bound - 1), best.height - best.problem.unit
    return max(best.bound, -(-(low + high) // 2 // best.problem.unit) * best.problem.unit) if high > low else best.bound


def exact_fits(problem: Problem) -> bool:
    """Whether the exact search's tables are of a reasonable size."""
    first, end, _ = sections(problem)
    return sum(end) - sum(first) <= (LARGEST_EXACT if exact_library() is not None else LARGEST_EXACT_PYTHON)


def in_parallel(best: Best, *searches: Callable[[], None]) -> None:
    """Runs the searches on one thread each until the best plan is optimal or the time is over; in turn where they are in Python.

    An error in a search ends all and is raised here.
    """
    if search_library() is None:
        for search in searches:
            if not best.over:
                search()
        return
    errors: list[BaseException] = []
    running = len(searches)

    def guarded(search: Callable[[], None]) -> None:
        nonlocal running
        try:
            search()
        except BaseException as error:
            errors.append(error)
        with best.changed:
            running -= 1
            best.changed.notify_all()

    threads = [threading.Thread(target=guarded, args=(search,), daemon=True) for search in searches]
    for thread in threads:
        thread.start()
    try:
        with best.changed:
            while running and not errors and not best.over:
                best.changed.wait(max(0.0, best.deadline - time.perf_counter()))
    finally:
        best.stop_all()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
