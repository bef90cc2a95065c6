"""MEMO's bi-level plan (SIGMOD 2025, section 4.2): first each layer's transients alone, then the step with each layer as one buffer.

A group is a stretch of the step, one layer's forward or backward pass. Its transients are planned alone; the whole group then is one
pseudo buffer, alive from the first of them to the last and as high as their plan. Equal layers are planned once, which is why very deep
models plan fast this way. The price: nothing else may use the holes inside a pseudo buffer. The plan is valid for any grouping.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np

from memory_mgmt.address_problem import Int64s, Problem, height

Planner = Callable[[Problem], Int64s]


def bilevel(problem: Problem, groups: Sequence[Hashable | None], inner: Planner, outer: Planner) -> Int64s:
    """Offsets by planning every group with ``inner`` and the whole with ``outer``; None stands for no group."""
    members: dict[Hashable, list[int]] = {}
    alone: list[int] = []
    for i, group in enumerate(groups):
        (alone if group is None else members.setdefault(group, [])).append(i)
    planned: dict[bytes, Int64s] = {}
    blocks: list[tuple[Int64s, Int64s]] = []  # the group's buffers and their offsets within it
    for index in members.values():
        # By life and size, so that equal layers look equal whatever the order in the input.
        part = np.array(sorted(index, key=lambda i: (problem.lower[i], problem.upper[i], problem.size[i])), dtype=np.int64)
        begin = problem.lower[part].min()
        layer = Problem(problem.lower[part] - begin, problem.upper[part] - begin, problem.size[part])
        shape = np.concatenate([layer.lower, layer.upper, layer.size]).tobytes()
        if shape not in planned:
            planned[shape] = inner(layer)
        blocks.append((part, planned[shape]))
    step = Problem(
        np.concatenate([problem.lower[alone], np.array([problem.lower[part].min() for part, _ in blocks], dtype=np.int64)]),
        np.concatenate([problem.upper[alone], np.array([problem.upper[part].max() for part, _ in blocks], dtype=np.int64)]),
        np.concatenate([problem.size[alone], np.array([height(problem.subset(p), o) for p, o in blocks], dtype=np.int64)]),
    )
    base = outer(step)
    offsets = np.zeros(len(problem), dtype=np.int64)
    offsets[alone] = base[: len(alone)]
    for (part, within), start in zip(blocks, base[len(alone) :], strict=True):
        offsets[part] = start + within
    return offsets


def stretches(problem: Problem) -> Iterator[list[int | None]]:
    """Groupings guessed from the lives alone, for longer and longer transients.

    A buffer is a transient when it lives at most a given time (a power of two, from 2 up to half the step); transients whose lives
    touch without a gap are one stretch. Stretches of one buffer are no group.
    """
    if not len(problem):
        return
    duration = problem.upper - problem.lower
    span = int(problem.upper.max() - problem.lower.min())
    order = np.lexsort((problem.upper, problem.lower)).tolist()
    lower, upper, lives = problem.lower.tolist(), problem.upper.tolist(), duration.tolist()
    seen: set[tuple[int | None, ...]] = set()
    longest = 2
    while longest <= max(2, span // 2):
        groups: list[int | None] = [None] * len(problem)
        reach, number, size = None, -1, [0] * len(problem)
        for i in order:
            if lives[i] > longest:
                continue
            if reach is None or lower[i] >= reach:
                number += 1
            reach = upper[i] if reach is None else max(reach, upper[i])
            groups[i] = number
            size[number] += 1
        groups = [group if group is not None and size[group] > 1 else None for group in groups]
        if (key := tuple(groups)) not in seen and any(group is not None for group in groups):
            seen.add(key)
            yield groups
        longest *= 2
