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


def _lists(task: Task, seen: Sequence[int]) -> int:
    begin = task.values + task.fillers  # type: ignore[attr-defined]
    symbols = list(seen[seen.index(begin) + 1 : seen.index(begin + 1)])
    said = len(seen) - 1 - seen.index(begin + 2)
    return {"copy": symbols, "reverse": list(reversed(symbols)), "sort": sorted(symbols)}[task.name][said]


def _needle(text: str) -> str:
    (key,) = re.findall(r"What is the special magic number for (\S+) mentioned", text)
    (found,) = re.findall(rf"One of the special magic numbers for {key} is: (\d+)\. ", text)
    assert len(re.findall(found, text)) == 1, "it stands where it is told, and nowhere else"
    return found


def _variables(text: str) -> str:
    value = re.findall(r"are assigned the value (\d+), $", text)[0]
    told, known, order = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\. ", text), {}, []
    for name, source in told:
        known[name] = known.get(source, source)
        order.append(name)
    return "".join(f" {name}" for name in order if known[name] == value)


MOVED = r"(\w+) (?:moved|went|travelled|journeyed|went back) to the (\w+)\."
TOOK = r"(\w+) (?:picked up|got|grabbed|took) the (\w+)\."
PUT = r"(\w+) (?:put down|dropped|discarded|left) the (\w+)\."
GAVE = r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)\."
BESIDE = r"The (\w+) is (north|south|east|west) of the (\w+)\."


def _babi(text: str) -> str:
    """Replays every sentence about the world, thing by thing."""
    place: dict[str, str] = {}
    holds: dict[str, str] = {}
    trail: dict[str, list[str]] = {}
    gifts, beside = re.findall(GAVE, text), re.findall(BESIDE, text)
    for sentence in re.findall(r"[A-Z][^.?]*[.]", text):
        if match := re.fullmatch(MOVED, sentence):
            place[match[1]] = match[2]
            for thing in (thing for thing, who in holds.items() if who == match[1]):
                trail[thing].append(match[2])
        elif match := re.fullmatch(TOOK, sentence):
            holds[match[2]] = match[1]
            trail.setdefault(match[2], [place[match[1]]])
            assert trail[match[2]][-1] == place[match[1]], "nobody takes what is elsewhere"
        elif match := re.fullmatch(PUT, sentence):
            assert holds.pop(match[2]) == match[1], "nobody puts down what another holds"
    question = text.rsplit("\nQuestion: ", 1)[1].strip()
    answers = [
        (r"Where is the (\w+)\?", lambda thing: trail[thing][-1]),
        (r"Where is (\w+)\?", lambda who: place[who]),
        (r"Where was the (\w+) before the (\w+)\?", lambda thing, then: trail[thing][trail[thing].index(then) - 1]),
        (r"What is (\w+) of the (\w+)\?", lambda way, b: next(a for a, w, other in beside if (w, other) == (way, b))),
        (r"What is the (\w+) (\w+) of\?", lambda a, way: next(b for one, w, b in beside if (one, w) == (a, way))),
        (r"What did (\w+) give to (\w+)\?", lambda a, c: [g[1] for g in gifts if (g[0], g[2]) == (a, c)][-1]),
        (r"Who gave the (\w+) to (\w+)\?", lambda b, c: [g[0] for g in gifts if g[1:] == (b, c)][-1]),
        (r"Who did (\w+) give the (\w+) to\?", lambda a, b: [g[2] for g in gifts if g[:2] == (a, b)][-1]),
        (r"Who gave the (\w+)\?", lambda b: [g[0] for g in gifts if g[1] == b][-1]),
        (r"Who received the (\w+)\?", lambda b: [g[2] for g in gifts if g[1] == b][-1]),
    ]
    for pattern, answer in answers:
        if match := re.fullmatch(pattern, question):
            return answer(*match.groups())
    raise AssertionError(f"unknown question {question!r}")


IN_WORDS = {
    "passkey": (_passkey, "The pass key is "),
    **dict.fromkeys(("needle_single", "needle_multikey", "needle_haystack"), (_needle, "mentioned in the provided text is ")),
    "variables": (_variables, "they are:"),
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4", "qa5"), (_babi, "\nAnswer: ")),
}
"""By task: (the whole answer from the text, what stands before it in the text)."""
OF_IDS = {"mqar": _mqar, "associative": _associative, **dict.fromkeys(("copy", "reverse", "sort"), _lists)}


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
