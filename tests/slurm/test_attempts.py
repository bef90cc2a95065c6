"""What a job does after its ranks have ended, and when it is no longer started again."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from models.errors import RunFailed, UserError
from slurm import attempts
from slurm.submission import Submission, write_submission
from trainer import config_file
from trainer.rank_notes import RankNote, read_notes, write_note
from trainer.run_dir import RunDir

SAVED = RankNote(75, signal_number=int(signal.SIGUSR1), step=7)
ENDED = RankNote(75, signal_number=int(signal.SIGTERM), step=7)


@pytest.mark.parametrize(
    ("notes", "code", "cancelled", "word"),
    [
        ({0: RankNote(0), 1: RankNote(0)}, 0, False, "done"),
        ({0: RankNote(0), 1: RankNote(0)}, 0, True, "done"),
        ({0: SAVED, 1: SAVED}, 0, False, "requeue"),
        ({0: SAVED, 1: SAVED}, 0, True, "cancel"),
        ({0: ENDED, 1: ENDED}, 0, False, "wait"),
        ({0: ENDED, 1: ENDED}, 0, True, "cancel"),
        ({0: RankNote(1, "RuntimeError: Connection closed by peer")}, 1, False, "requeue"),
        ({0: RankNote(1, "RuntimeError: Connection closed by peer")}, 1, True, "cancel"),
        ({}, 137, False, "requeue"),
        ({0: RankNote(0)}, 1, False, "requeue"),
        ({}, 0, False, "requeue"),
        ({0: RankNote(1, "loss nan", refused=True), 1: RankNote(1, "lost a peer")}, 1, False, "fail"),
        ({1: RankNote(2, "data.path", refused=True)}, 1, False, "fail"),
    ],
)
def test_what_follows(notes: dict[int, RankNote], code: int, cancelled: bool, word: str) -> None:
    decision = attempts.decide(notes, code, cancelled=cancelled)
    assert decision.word == word and decision.reason and str(decision).startswith(f"{word}: ")


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    run_dir.config.write_text(config_file.dump(config_file.resolve(None, ["train.steps=10"])))
    write_submission(run_dir, Submission("token", "5", 2))
    return run_dir


def fail_once(run_dir: RunDir, job: str) -> None:
    number = int(attempts.start(run_dir, job, "n1"))
    assert attempts.end(run_dir, job, number, 1).word == "requeue"


def test_attempts_are_numbered_and_a_loop_without_progress_ends_with_the_reason(run_dir: RunDir) -> None:
    fail_once(run_dir, "5")
    write_note(run_dir, 2, 0, RankNote(1, "RuntimeError: the disk melted"))
    fail_once(run_dir, "5")
    with pytest.raises(RunFailed, match=r"2 attempts in a row .* after step 0; the last one: rank 0: RuntimeError: the disk melted"):
        attempts.start(run_dir, "5", "n1")
    state = run_dir.read_state()
    assert state is not None and state.status == "failed" and "disk melted" in state.reason
    assert attempts.start(run_dir, "6", "n1") == "3", "a person submitted it again"


def test_a_new_checkpoint_is_progress(run_dir: RunDir) -> None:
    for step in range(1, 6):
        fail_once(run_dir, "5")
        run_dir.checkpoint(step).mkdir(parents=True)
    fail_once(run_dir, "5")
    fail_once(run_dir, "5")
    with pytest.raises(RunFailed, match="after step 5"):
        attempts.start(run_dir, "5", "n1")


def test_an_attempt_that_was_overtaken_decides_nothing(run_dir: RunDir) -> None:
    assert [attempts.start(run_dir, "5", node) for node in ("n1", "n2")] == ["1", "2"]
    run_dir.write_state("running", step=3)
    assert attempts.end(run_dir, "5", 1, 1).word == "wait"
    state = run_dir.read_state()
    assert state is not None and state.status == "running" and len(attempts.read_records(run_dir)) == 2
    assert attempts.end(run_dir, "5", 2, 1).word == "requeue"


def test_a_finished_run_is_not_started_unless_it_was_given_more_steps(run_dir: RunDir) -> None:
    run_dir.write_state("done", step=10, total_steps=10)
    assert attempts.start(run_dir, "5", "n1") == attempts.DONE
    run_dir.config.write_text(config_file.dump(config_file.resolve(None, ["train.steps=20"])))
    assert attempts.start(run_dir, "5", "n1") == "1"


def test_torn_lines_and_foreign_notes_are_left_out(run_dir: RunDir) -> None:
    fail_once(run_dir, "5")
    with (run_dir.slurm / "attempts.jsonl").open("a") as stream:
        stream.write('{"attempt": 9, "jo')
    assert attempts.start(run_dir, "5", "n1") == "2"
    assert [record["attempt"] for record in attempts.read_records(run_dir)] == [1, 1, 2]
    folder = run_dir.log(0, 2).parent
    folder.mkdir(parents=True)
    write_note(run_dir, 2, 1, SAVED)
    for name, text in {"rank_0.end": "{", "rank_2.end": '{"kode": 1}', "rank_x.end": "{}", "rank_3.end": "[1]"}.items():
        (folder / name).write_text(text)
    assert read_notes(run_dir, 2) == {1: SAVED}


def test_a_run_that_was_never_submitted_says_how(tmp_path: Path, run_dir: RunDir) -> None:
    (run_dir.slurm / "submission.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be read"):
        attempts.start(run_dir, "5", "n1")
    (run_dir.slurm / "submission.json").unlink()
    with pytest.raises(UserError, match="not given to Slurm"):
        attempts.start(run_dir, "5", "n1")
