"""For each task one who reads nothing but the tokens so far and knows its rules, written apart from the generator."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from trainer.evals.sample import Task


def _mqar(task: Task, seen: Sequence[int]) -> int:
    is_key, is_value = (lambda t: t < task.keys), (lambda t: task.keys <= t < task.keys + task.values)  # type: ignore[attr-defined]
    known = {a: b for a, b in pairwise(seen) if is_key(a) and is_value(b)}
    return known[seen[-1]]


def _associative(task: Task, seen: Sequence[int]) -> int:
    words = task.keys + task.values + task.fillers  # type: ignore[attr-defined]
    pair, ask, equals = words, words + 1, words + 2
    known = {}
    for i, token in enumerate(seen):
        if token == pair:
            end = seen.index(equals, i)
            known[tuple(seen[i + 1 : end])] = seen[end + 1 : end + 1 + task.value_tokens]  # type: ignore[attr-defined]
    asked = len(seen) - 1 - list(reversed(seen)).index(ask)
    end = seen.index(equals, asked)
    return known[tuple(seen[asked + 1 : end])][len(seen) - end - 1]


def _passkey(text: str) -> str:
    found = re.findall(r"The pass key is (\d+)\.", text)
    assert len(found) == 1 and len(re.findall(found[0], text)) == 2, "it stands where it is told, and nowhere else"
    return found[0]


IN_WORDS = {"passkey": (_passkey, "The pass key is ")}
"""By task: (the whole answer from the text, what stands before it in the text)."""
OF_IDS = {"mqar": _mqar, "associative": _associative}


def next_token(task: Task, seen: Sequence[int]) -> int:
    """The token that follows ``seen`` (byte tokens for tasks in words)."""
    if task.name in OF_IDS:
        return OF_IDS[task.name](task, list(seen))
    solve, before = IN_WORDS[task.name]
    text = bytes(seen).decode()
    prompt, said = text.rsplit(before, 1)
    answer = solve(prompt)
    assert answer.startswith(said), "a true beginning of the answer was read"
    return answer.encode()[len(said)]
