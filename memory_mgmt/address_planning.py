"""Addresses for the buffers of a step whose lives are known: the lowest plan found within a time limit, with its certificate.

``plan_addresses`` is what the rest of the room calls. The lower bound is the most bytes alive at one time, or what an exact search has
proven beyond that; a plan of that height is optimal, otherwise the ratio states the gap. Methods, each in its file: ``greedy``,
``search`` (local search over orders), ``exact`` (canonical plans), ``mip`` (through PuLP), ``bilevel`` (MEMO's), and ``auto``, which
runs what suits the instance and keeps the best.

Try alone: ``python -m memory_mgmt.address_planning IN.csv [--capacity N] [--time-limit S] [--method M] --out OUT.csv``. It prints
``height lower_bound ratio seconds status``; exit code 0 when the capacity is met or none was given, 1 when the best plan is higher,
2 for a bad file.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from memory_mgmt.address_bilevel import bilevel, stretches
from memory_mgmt.address_file import read_lifetimes, write_plan
from memory_mgmt.address_portfolio import Best, descend, exact_fits, greedy, in_parallel, skeleton, squeak
from memory_mgmt.address_problem import Int64s, Lifetime, Problem, check_plan, find_overlap, height, problem_of
from models.errors import UserError

__all__ = ["METHODS", "AddressPlan", "Lifetime", "check_plan", "plan_addresses"]

LARGE = 500  # buffers beyond which the exact search over everything takes its time

METHODS = ("auto", "greedy", "search", "exact", "mip", "bilevel")


@dataclass(frozen=True)
class AddressPlan:
    """Offsets in the order of the lifetimes given, and what is known about their quality.

    ``height`` is the end of the highest buffer, sizes rounded up to the alignment. ``method`` names what found the plan. ``status`` is
    "optimal" when the height equals the lower bound, else "feasible": valid, at most ``ratio`` times as high as the best.
    """

    offsets: tuple[int, ...]
    height: int
    lower_bound: int
    method: str
    status: str
    seconds: float

    @property
    def ratio(self) -> float:
        """Height over lower bound; 1.0 is optimal."""
        return self.height / self.lower_bound if self.lower_bound else 1.0

    @property
    def optimal(self) -> bool:
        """True when the height equals the lower bound: no plan can be lower."""
        return self.height == self.lower_bound


def plan_addresses(
    lifetimes: Sequence[Lifetime],
    *,
    capacity: int | None = None,
    time_limit: float = 10.0,
    method: str = "auto",
    alignment: int = 1,
    seed: int = 0,
) -> AddressPlan:
    """The lowest plan that ``method`` finds within ``time_limit`` seconds; it ends earlier when the plan is proven optimal.

    Offsets are multiples of ``alignment``, and sizes count rounded up to it. With a ``capacity``, at most a tenth of the limit goes into
    lower plans once it is met; a higher plan is returned all the same. Every plan is checked before it is returned. The first call on a
    machine compiles the C++ loops, a few seconds beyond the limit. Raises ValueError for impossible lifetimes, method or limits.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
    if time_limit <= 0:
        raise ValueError(f"time_limit must be positive, not {time_limit}")
    begun = time.perf_counter()
    problem = problem_of(lifetimes, alignment)
    best = Best(problem, time_limit, capacity)
    if len(problem):
        _improve(best, method, [life.group for life in lifetimes], seed)
    if (pair := find_overlap(problem, best.offsets)) is not None:
        a, b = (lifetimes[i].id for i in pair)
        raise AssertionError(f"{best.label} gave buffers {a} and {b} overlapping addresses: please report this instance")
    status = "optimal" if best.height == best.bound else "feasible"
    return AddressPlan(tuple(best.offsets.tolist()), best.height, best.bound, best.label, status, time.perf_counter() - begun)


def _improve(best: Best, method: str, groups: Sequence[Hashable | None], seed: int) -> None:
    if method == "bilevel":
        grouping = _best_grouping(best, groups)
        if best.label == "none":  # no transients, so one level is all there is
            greedy(best)
        _search_bilevel(best, grouping, 1.0, seed)
        return
    greedy(best)
    if best.over or method == "greedy":
        return
    if method == "search":
        in_parallel(best, lambda: squeak(best, 1.0, seed), lambda: squeak(best, 1.0, seed + 1))
    elif method == "exact":
        in_parallel(best, lambda: descend(best, seed, from_below=True), lambda: descend(best, seed + 1, from_below=False))
    elif method == "mip":
        _mip(best, seed)
    else:
        _auto(best, groups, seed)


def _auto(best: Best, groups: Sequence[Hashable | None], seed: int) -> None:
    fits = exact_fits(best.problem)
    if len(best.problem) > LARGE:
        skeleton(best)

    def below() -> None:
        if fits:
            descend(best, seed, from_below=True)
        else:
            squeak(best, 1.0, seed)

    def above() -> None:
        _search_bilevel(best, _best_grouping(best, groups), 0.2, seed)
        squeak(best, 0.05 if fits else 1.0, seed + 1)
        if fits:
            descend(best, seed + 1, from_below=False)

    in_parallel(best, below, above)


def _mip(best: Best, seed: int) -> None:
    from memory_mgmt.address_mip import mip  # PuLP takes a while to import

    bound = mip(best.problem, best.offsets, best.bound, best.deadline, lambda offsets: best.offer(offsets, "mip"), seed)
    best.prove(bound)


def _groupings(best: Best, groups: Sequence[Hashable | None]) -> list[Sequence[Hashable | None]]:
    return [groups] if any(group is not None for group in groups) else list(stretches(best.problem))


def _greedy_plan(problem: Problem) -> Int64s:
    best = Best(problem, time_limit=60.0)
    greedy(best)
    return best.offsets


def _best_grouping(best: Best, groups: Sequence[Hashable | None]) -> Sequence[Hashable | None]:
    """The grouping with the lowest bi-level plan by greedy levels, far below a second for a step; offers these plans."""
    lowest, chosen = None, groups
    for grouping in _groupings(best, groups):
        offsets = bilevel(best.problem, grouping, _greedy_plan, _greedy_plan)
        best.offer(offsets, "bilevel")
        if best.over:
            return grouping
        if lowest is None or height(best.problem, offsets) < lowest:
            lowest, chosen = height(best.problem, offsets), grouping
    return chosen


def _search_bilevel(best: Best, grouping: Sequence[Hashable | None], share: float, seed: int) -> None:
    """Offers the bi-level plan with both levels searched, in a share of the time left."""
    deadline = best.share(share)

    def searched(problem: Problem) -> Int64s:
        with best.level(problem, 0.3 * max(0.0, deadline - time.perf_counter())) as level:
            greedy(level)
            if not level.over and exact_fits(problem):
                descend(level, seed, from_below=True)
            return level.offsets

    if not best.over and any(group is not None for group in grouping):
        best.offer(bilevel(best.problem, grouping, searched, searched), "bilevel")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m memory_mgmt.address_planning", description="Plan addresses of buffers with known lives."
    )
    parser.add_argument("input", type=Path, metavar="IN.csv", help="id,lower,upper,size[,group][,...]; lives are [lower, upper)")
    parser.add_argument("--capacity", type=int, help="the height to stay within; exit code 1 when the best plan is higher")
    parser.add_argument("--time-limit", type=float, default=10.0, metavar="S", help="seconds (default: 10)")
    parser.add_argument("--method", choices=METHODS, default="auto")
    parser.add_argument("--alignment", type=int, default=1, metavar="N", help="offsets are multiples of N (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the random searches (default: 0)")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.csv", help="the input with a column offset")
    given = parser.parse_args(arguments)
    try:
        return _plan_file(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _plan_file(given: argparse.Namespace) -> int:
    lifetimes, header, rows = read_lifetimes(given.input)
    try:
        plan = plan_addresses(
            lifetimes,
            capacity=given.capacity,
            time_limit=given.time_limit,
            method=given.method,
            alignment=given.alignment,
            seed=given.seed,
        )
    except ValueError as error:
        raise UserError(f"{given.input}: {error}") from None
    write_plan(given.out, header, rows, plan.offsets)
    print(f"{plan.height} {plan.lower_bound} {plan.ratio:.6f} {plan.seconds:.3f} {plan.status}")
    return int(given.capacity is not None and plan.height > given.capacity)


if __name__ == "__main__":
    sys.exit(main())
