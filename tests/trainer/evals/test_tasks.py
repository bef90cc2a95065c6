"""Generated samples: right by an independent solver, the same for the same number, guessed as seldom as is said."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import UserError
from tests.trainer.evals.solvers import next_token
from trainer.config import DataSection
from trainer.evals.draws import Draws
from trainer.evals.registry import task_of
from trainer.evals.sample import Task, guessing

CASES: list[tuple[str, dict[str, Any], int]] = [
    ("mqar", {}, 64),
    ("mqar", {"pairs": 4, "gap": 30, "keys": 5, "values": 3, "fillers": 1}, 46),
    ("mqar", {"pairs": 3, "queries": 1, "power": 1.0}, 501),
    ("associative", {}, 79),
    ("associative", {"pairs": 3, "queries": 3, "key_tokens": 3, "value_tokens": 2, "keys": 4, "segment_tokens": 21}, 200),
    ("associative", {"pairs": 20, "key_tokens": 2, "segment_tokens": 5}, 20 * 21 + 7),
    ("passkey", {}, 400),
    ("passkey", {"digits": 1, "depth": 0.0}, 300),
    ("passkey", {"digits": 9, "depth": 1.0}, 3000),
    ("copy", {}, 40),
    ("reverse", {"pairs": 5, "gap": 9, "depth": 0.0}, 40),
    ("sort", {"pairs": 12, "values": 5}, 80),
    ("needle_single", {}, 600),
    ("needle_multikey", {"pairs": 6, "digits": 4, "depth": 0.5}, 1500),
    ("needle_haystack", {}, 900),
    ("variables", {}, 900),
    ("variables", {"pairs": 3, "hops": 2}, 900),
    ("qa1", {}, 400),
    ("qa1", {"facts": 40}, 3000),
    ("qa2", {}, 700),
    ("qa2", {"facts": 60}, 3000),
    ("qa3", {}, 1000),
    ("qa3", {"facts": 60}, 3000),
    ("qa4", {}, 300),
    ("qa4", {"facts": 5}, 400),
    ("qa5", {}, 600),
    ("qa5", {"facts": 40}, 3000),
]
IDS = [f"{name}-{i}" for i, (name, _, _) in enumerate(CASES)]


def made(name: str, settings: dict[str, Any]) -> Task:
    return task_of(DataSection.model_validate({"source": f"synthetic/{name}", "synthetic": settings}))


@pytest.mark.parametrize(("name", "settings", "length"), CASES, ids=IDS)
def test_a_solver_that_reads_only_the_tokens_before_finds_every_answer(name: str, settings: dict[str, Any], length: int) -> None:
    task = made(name, settings)
    for number in range(20):
        sample = task.sample(Draws(name, 0, number), length)
        assert sample.tokens_T.shape == (length,) and sample.tokens_T.dtype == np.int64 and sample.tokens_T.min() >= 0
        asked = [int(t) for question in sample.questions for t in question.at]
        assert len(set(asked)) == len(asked) > 0, "one answer at one place"
        for question in sample.questions:
            assert 0 <= question.depth < 1, "the fact stands before the question"
            for at, token in zip(question.at, question.answer, strict=True):
                assert next_token(task, sample.tokens_T[: at + 1].tolist()) == token
                following = sample.last if at + 1 == length else sample.tokens_T[at + 1]
                assert sample.last is None or following == token, "the text goes on with the answer"


@pytest.mark.parametrize(("name", "settings", "length"), CASES, ids=IDS)
def test_a_sample_is_a_function_of_its_number(name: str, settings: dict[str, Any], length: int) -> None:
    task, again = made(name, settings), made(name, settings)
    samples = [task.sample(Draws(name, 0, n), length) for n in range(6)]
    for n in reversed(range(6)):
        same = again.sample(Draws(name, 0, n), length)
        assert (same.tokens_T == samples[n].tokens_T).all() and same.last == samples[n].last
    assert len({sample.tokens_T.tobytes() for sample in samples}) >= 3, "few are equal, and only where a sample holds one digit"


@pytest.mark.parametrize(("name", "settings", "length"), CASES, ids=IDS)
def test_guessing_scores_what_is_said(name: str, settings: dict[str, Any], length: int) -> None:
    """Answers of samples against guesses drawn apart: whole answers and tokens are hit as often as is said, within five deviations."""
    task, guesses = made(name, settings), Draws("guess")
    asked = whole = hit = tokens = 0
    for number in range(60):
        for question in task.sample(Draws(name, 1, number), length).questions:
            guess = task.kinds[question.kind][1].draw(guesses)
            hits = [a == b for a, b in zip(guess, question.answer, strict=False)]
            asked, whole = asked + 1, whole + (len(guess) == len(question.answer) and all(hits))
            hit, tokens = hit + sum(hits), tokens + len(question.answer)
    # Tokens of one answer hang together: as if only whole answers were drawn.
    for found, expected in zip((whole / asked, hit / tokens), guessing(task), strict=True):
        assert abs(found - expected) <= 5 * (expected * (1 - expected) / asked) ** 0.5 + 1e-12


def test_no_answer_of_mqar_stands_after_its_query_and_keys_are_asked_once() -> None:
    task = made("mqar", {"pairs": 4, "keys": 8, "values": 4})
    for number in range(50):
        sample = task.sample(Draws(number), 40)
        values = (sample.tokens_T >= 8) & (sample.tokens_T < 12)
        assert values[1:8:2].all() and values.sum() == 4, "values stand in the pairs alone"
        assert np.bincount(sample.tokens_T[sample.tokens_T < 8]).max() == 2


def test_queries_follow_the_power_law() -> None:
    """Small exponents ask soon after the gap; 1 asks anywhere, evenly."""
    near, even = (
        np.concatenate([[q.at[0] for q in made("mqar", {"power": p}).sample(Draws(n), 1016).questions] for n in range(100)])
        for p in (0.01, 1.0)
    )
    assert np.median(near) < 100 and abs(np.mean(even) - (16 + 1000 / 2)) < 5 * 1000 / 12**0.5 / 800**0.5


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_a_fact_stands_at_its_depth(depth: float) -> None:
    for name in ("passkey", "needle_single", "needle_multikey", "needle_haystack", "copy"):
        sample = made(name, {}).sample(Draws(3), 20_000, depth)
        assert abs(sample.questions[0].depth - depth) < 0.02, name


def test_a_background_file_stands_around_the_facts_sentence_by_sentence(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("Call me Ishmael. Some years ago,\nnever mind how long precisely! Why not? " * 3)
    text = bytes(made("qa1", {"background": str(tmp_path / "book.txt")}).sample(Draws(1), 600).tokens_T.tolist()).decode()
    assert text.count("Some years ago, never mind how long precisely! ") >= 5 and next_token(made("qa1", {}), [*text.encode()])
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    for bad, told in (("empty.txt", "no words"), ("binary.txt", "no text file"), ("", "cannot be read")):
        with pytest.raises(UserError, match=told):
            made("qa1", {"background": str(tmp_path / bad)})


def test_a_million_tokens_are_made_exactly() -> None:
    for name in ("mqar", "passkey"):
        sample = made(name, {}).sample(Draws(1), 2**20, 0.5)
        assert len(sample.tokens_T) == 2**20 and sample.questions[0].at[0] < 2**20


@pytest.mark.parametrize("name", ["qa1", "qa2", "qa3", "qa4", "qa5"])
def test_every_answer_and_every_kind_of_question_comes(name: str) -> None:
    task, found = made(name, {}), Counter[bytes]()
    for number in range(80):
        question = task.sample(Draws(name, number), 800).questions[0]
        found[question.answer.tobytes()] += 1
        assert 0 < question.depth < 1
    words = {word.tobytes() for _, answers in task.kinds for word in answers.parts[0]}
    assert found.keys() == words, "all that may be answered, nothing else"
    assert max(found.values()) < 80 * 0.5, "and nothing much more often"


def test_draws_repeat_nowhere_and_choose_without_putting_back() -> None:
    draws = Draws("x", 1)
    first, second = draws.uniform(1000), draws.uniform(1000)
    assert not set(first) & set(second) and abs(first.mean() - 0.5) < 0.05 and 0 <= first.min() < first.max() < 1
    for limit, n in ((5, 5), (1000, 3), (10**12, 40)):
        found = draws.different(limit, n)
        assert len(set(found.tolist())) == n and found.min() >= 0 and found.max() < limit
    # Frozen: a change here changes every run that is resumed.
    assert Draws("frozen").below(1000, 5).tolist() == [154, 194, 214, 981, 25]


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("mqar", {"pairs": 65}, "raise keys"),
        ("mqar", {"pairs": 2, "queries": 3}, "asked for at most once"),
        ("associative", {"pairs": 17}, "raise keys or key_tokens"),
        ("associative", {"pairs": 2, "queries": 3}, "at most once"),
        ("associative", {"pairs": 8, "queries": 5}, "segment_tokens 16; raise it"),
        ("passkey", {"background": "absent.txt"}, "absent.txt cannot be read"),
        ("needle_multikey", {"pairs": 10**5}, "different keys"),
        ("qa4", {"facts": 6}, "from 2 to 5"),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        made(name, settings)


def test_too_short_samples_are_refused_with_the_length_they_need() -> None:
    for name, settings, _ in CASES:
        task = made(name, settings)
        with pytest.raises(ValueError, match="needs [0-9]+ tokens") as error:
            task.sample(Draws(0), 7)
        needed = int(str(error.value).split("needs ")[1].split()[0])
        task.sample(Draws(0), needed)
        with pytest.raises(ValueError, match="needs"):
            task.sample(Draws(0), needed - 1)
