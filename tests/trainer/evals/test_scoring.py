"""Scores: all for a reader that knows, chance for one that does not; the table, the files, and what the command refuses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longstride import _parsers
from models.errors import UserError
from tests.trainer.evals.solvers import next_token
from tests.trainer.evals.test_tasks import CASES, made
from trainer.commands.evaluate import _depths, _lengths, _refuse_foreign
from trainer.config import RunConfig
from trainer.evals import report, suites
from trainer.evals.draws import Draws
from trainer.evals.sample import Task
from trainer.evals.sample import guessing as guessing_score
from trainer.evals.scoring import Cell, Predictor, score, total

ONE_OF_EACH = {case[0]: case for case in reversed(CASES)}
"""Of every task the first case."""


def knowing(task: Task) -> Predictor:
    """Works every answer out of the tokens before."""
    return lambda tokens_BT, at: [
        np.array([next_token(task, row[: t + 1].tolist()) for t in asked]) for row, asked in zip(tokens_BT, at, strict=True)
    ]


def guessing(task: Task) -> Predictor:
    """Says an answer of the right form, whatever it reads."""
    draws = Draws("guess")

    def predict(tokens_BT: np.ndarray, at: Sequence[np.ndarray]) -> list[np.ndarray]:
        said = []
        for asked in at:
            tokens = np.concatenate([task.kinds[0][1].draw(draws) for _ in asked])
            said.append(tokens[: len(asked)])
        return said

    return predict


@pytest.mark.parametrize(("name", "settings", "length"), ONE_OF_EACH.values(), ids=ONE_OF_EACH)
def test_one_who_knows_scores_all_and_one_who_guesses_scores_chance(name: str, settings: dict[str, Any], length: int) -> None:
    task, depths = made(name, settings), (0.0, 0.5, 1.0)
    cells = score(task, knowing(task), length, depths, 4, 0)
    assert [cell.depth for cell in cells] == list(depths) and {cell.length for cell in cells} == {length}
    whole = total(cells, length)
    assert whole.questions > 0 and whole.accuracy == whole.token_accuracy == 1.0
    if task.places_facts:
        assert [cell.questions for cell in cells] == [4, 4, 4]
    guessed = total(score(task, guessing(task), length, depths, 20, 0), length)
    chance = guessing_score(task)[0]
    assert abs(guessed.answered - guessed.questions * chance) <= 5 * (guessed.questions * chance * (1 - chance)) ** 0.5 + 1e-9


def test_a_question_counts_when_all_its_tokens_are_right() -> None:
    task = made("passkey", {})
    right = knowing(task)

    def one_wrong(tokens_BT: np.ndarray, at: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.append(tokens[:-1], 0) for tokens in right(tokens_BT, at)]

    whole = total(score(task, one_wrong, 400, (0.5,), 3, 0), 400)
    assert (whole.questions, whole.accuracy, whole.tokens, whole.token_accuracy) == (3, 0.0, 15, 0.8)


def test_other_seeds_are_other_samples_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    task, seen = made("mqar", {}), []

    def note(tokens_BT: np.ndarray, at: Sequence[np.ndarray]) -> list[np.ndarray]:
        seen.append(tokens_BT)
        return [np.zeros_like(asked) for asked in at]

    score(task, note, 64, (0.5,), 5, 0)
    score(task, note, 64, (0.5,), 5, 1)
    monkeypatch.setattr("trainer.evals.scoring.TOKENS_AT_ONCE", 128)
    score(task, note, 64, (0.5,), 5, 0)
    assert [len(tokens) for tokens in seen] == [5, 5, 2, 2, 1]
    assert (np.concatenate(seen[2:]) == seen[0]).all() and not (seen[0] == seen[1]).all()
    with pytest.raises(UserError, match="--lengths: synthetic/mqar needs 32 tokens"):
        score(task, note, 31, (0.5,), 5, 0)


def result() -> suites.TaskResult:
    cells = [Cell(1024, 0.0, 4, 4, 8, 8), Cell(1024, 1.0), Cell(2048, 0.0, 4, 1, 8, 5), Cell(2048, 1.0, 4, 2, 8, 6)]
    sizes = {1024: 2**20, 2048: 3 * 2**20}
    return suites.TaskResult("mqar", {"pairs": 2}, 0.25, 0.25, False, cells, {1024: 1.0, 2048: 2.0}, {1024: 4096, 2048: 8192}, sizes)


def test_the_table_and_the_files_say_what_was_found_and_replace_nothing(tmp_path: Path) -> None:
    lines = report.lines(result())
    assert lines[0] == "mqar (guessing: 25.0%, tokens 25.0%)"
    assert lines[2].split() == ["1,024", "100.0%", "100.0%", "4", "100.0%", "-", "1", "MiB", "4,096"]
    assert lines[3].split() == ["2,048", "37.5%", "68.8%", "8", "25.0%", "50.0%", "3", "MiB", "4,096"]
    picture = report.heat_map(result(), "mqar")
    assert picture.startswith(b"\x89PNG")
    first = report.write(tmp_path / "evals", "mqar_step_1", report.content(result(), step=1), picture)
    second = report.write(tmp_path / "evals", "mqar_step_1", report.content(result(), step=1), picture)
    assert (first.name, second.name) == ("mqar_step_1.json", "mqar_step_1_2.json")
    record = json.loads(first.read_text())
    assert record["cells"][3]["accuracy"] == 0.5 and record["cells"][1]["accuracy"] is None and "teacher-forced" in record["method"]
    assert sorted(path.suffix for path in (tmp_path / "evals").iterdir()) == [".json", ".json", ".png", ".png"]


def config(**data: Any) -> RunConfig:
    return RunConfig.model_validate({"data": data})


def test_a_task_is_made_as_the_run_was_trained_on_it_unless_told_otherwise() -> None:
    stages = [{"from_step": 0, "pairs": 1}, {"from_step": 9, "pairs": 3}]
    run = config(source="synthetic/mqar", synthetic={"keys": 9, "length": 100, "curriculum": stages})
    found = suites.settings_for("mqar", run, ["data.synthetic.gap=7", "data.synthetic.digits=3"])
    assert (found.pairs, found.keys, found.gap, found.length, found.curriculum) == (3, 9, 7, None, ())
    assert suites.settings_for("mqar", config(), []).of("mqar")["keys"] == 64


@pytest.mark.parametrize(
    ("run", "names", "words", "told"),
    [
        ({}, ["x"], [], "--suite: 'x' is none of: .*mqar"),
        ({"source": "synthetic/mqar"}, ["passkey"], [], "--suite passkey: is in words"),
        ({}, ["mqar"], ["data.synthetic.keys=4000"], "--suite mqar: needs 4080 ids, and the run's vocabulary has 258"),
        ({}, ["mqar"], ["data.synthetic.digits=4"], "data.synthetic.digits: these tasks read data.synthetic. .*pairs"),
        ({}, ["mqar"], ["train.steps=4"], "train.steps: these tasks read"),
        ({}, ["mqar"], ["data.synthetic.pairs=0"], "data.synthetic.pairs: 0 is out of range"),
        ({}, ["mqar"], ["data.synthetic.pairs=99"], "raise keys"),
    ],
)
def test_what_cannot_be_measured_is_refused(run: dict[str, Any], names: list[str], words: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        suites.build_tasks(suites.Request(suites.tasks_of(names), (64,), overrides=tuple(words)), config(**run))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lengths", "1k"], "--lengths: is read only with --suite"),
        (["--kv-gib", "1"], "--kv-gib: is read only with --suite"),
        (["data.synthetic.pairs=2"], "key=value: is read only with --suite"),
        (["--suite", "mqar", "--sequences", "4"], "--sequences: is read without --suite"),
        (["--suite", "mqar", "--data", "x"], "--data: is read by the suite position"),
    ],
)
def test_words_that_would_not_be_read_are_refused(words: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        _refuse_foreign(_parsers()[0].parse_args(["eval", "run", *words]))


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="on one process"):
        _refuse_foreign(_parsers()[0].parse_args(["eval", "run"]))


def test_lengths_and_depths_are_read_or_refused() -> None:
    assert _lengths("64k,1k, 1m,300") == (300, 1024, 65536, 1048576) and _depths("1,0.5") == (0.5, 1.0)
    for words in ("", "0", "-1", "x", "1.3", "1.3k", "3g"):
        with pytest.raises(UserError, match="--lengths"):
            _lengths(words)
    for words in ("", "2", "x", "0,-0.1", "nan"):
        with pytest.raises(UserError, match="--depths"):
            _depths(words)
