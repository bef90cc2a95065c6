"""Steps that are not finite or spike: told exactly, agreed by all ranks, passed over, and the rest bit for bit as if they had not been."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from models.errors import UserError
from tests.distributed import run_distributed
from tests.trainer.guarded_run import entries, faults, make_run, records, train, trajectory
from trainer import config_file, passed_over
from trainer.config import GuardsSection
from trainer.guards import History, trouble_of
from trainer.passed_over import PassedOver, PassedOverList
from trainer.run_dir import RunDir

STEADY = [3.0 + 0.01 * (-1) ** n for n in range(40)]
"""Mean 3, standard deviation 0.01, which counts as 0.03: one percent of the mean."""
GUARDS = GuardsSection(spike_steps=32, spike_deviations=5.0)


@pytest.mark.parametrize(
    ("loss", "valid", "norm", "kind"),
    [
        (3.0, 9, 1.0, None),
        (3.14, 9, 1.0, None),
        (3.16, 9, 1.0, "spike"),
        (1.0, 9, 1.0, None),
        (3.0, 9, 1.06, "spike"),
        (math.nan, 9, 1.0, "not_finite"),
        (math.inf, 9, 1.0, "not_finite"),
        (3.0, 9, math.nan, "not_finite"),
        (3.0, 9, math.inf, "not_finite"),
        (math.nan, 0, 0.0, None),
    ],
)
def test_what_counts_as_trouble(loss: float, valid: int, norm: float, kind: str | None) -> None:
    history = History(STEADY[:32], [1.0] * 32)
    trouble = trouble_of(loss, valid, norm, history, GUARDS)
    assert (trouble.kind if trouble else None) == kind
    if kind == "spike":
        assert trouble and "standard deviations above" in trouble.text and "the last 32 steps" in trouble.text


def test_nothing_is_judged_before_a_quarter_of_the_history_is_known() -> None:
    assert trouble_of(1e9, 9, 1.0, History([3.0] * 7, [1.0] * 7), GUARDS) is None
    assert trouble_of(1e9, 9, 1.0, History([3.0] * 8, [1.0] * 8), GUARDS) is not None


def test_the_history_forgets_and_survives_json() -> None:
    history = History()
    for n in range(20):
        history.add(n / 7, math.nan if n == 3 else 1.0, 8)
    assert history.loss == [n / 7 for n in range(12, 20)] and len(history.grad_norm) == 8
    assert History.from_json(json.loads(json.dumps(vars(history)))) == history
    assert History.from_json({}) == History()


def test_the_list_of_what_was_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "passed_over.jsonl"
    assert passed_over.read(path) == []
    kept = [PassedOver(8, 12, 3, "skip_step", None, "a"), PassedOver(12, 16, 3, "skip_step", None, "b"), PassedOver(40, 44, 11, "rollback", 4, "c")]
    for entry in kept:
        passed_over.write(path, entry, loss="nan")
        with path.open("a") as stream:
            stream.write('{"first": 1, "end"')  # torn by a crash
    assert passed_over.read(path) == kept
    known = PassedOverList(kept)
    assert [known.covers(*part) for part in ((0, 8), (4, 9), (15, 20), (16, 40), (43, 44), (44, 48))] == [False, True, True, False, True, False]
    assert [known.skipped_before(n) for n in (8, 12, 16, 44)] == [0, 1, 2, 0]
    assert known.rollbacks_to(4) == 1 and known.rollbacks_to(3) == 0


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["guards.on_not_finite=rollback"], ["guards.on_not_finite", "checkpoint.save_every_steps"]),
        (["guards.on_spike=skip_step", "optim.fuse_backward=true"], ["guards.on_spike", "optim.fuse_backward"]),
        (["guards.on_spike=retry"], ["guards.on_spike", "rollback"]),
        (["guards.spike_steps=2"], ["guards.spike_steps"]),
    ],
)
def test_policies_that_cannot_be_are_refused(settings: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        config_file.resolve(None, settings)
    assert all(part in str(error.value) for part in parts), error.value


# ---- whole runs: steps are counted from 1, sets of data from 0

STEPS = 12
COMMON = [f"train.steps={STEPS}", "checkpoint.save_every_steps=4", "guards.spike_steps=12", "guards.spike_deviations=8"]
ROLL = ["guards.on_not_finite=rollback", "guards.on_spike=rollback"]
SKIP = ["guards.on_not_finite=skip_step", "guards.on_spike=skip_step"]
PER_STEP = 2


def _two_ranks(folder: str) -> dict[str, str]:
    """All runs on two ranks that share the data, with faults on rank 1 only. By run: why it ended."""
    root = Path(folder)
    told = {}
    told["whole"] = train(RunDir(root / "whole"))
    told["never"] = train(RunDir(root / "never"))
    for name in ("skip", "back"):
        with faults(RunDir(root / name), {2: math.nan, 9: 40.0}, on_rank=1):
            told[name] = train(RunDir(root / name))
    with faults(RunDir(root / "stop"), {5: math.inf}, on_rank=1):
        told["stop"] = train(RunDir(root / "stop"))
    told["resumed"] = train(RunDir(root / "stop"), resume=True)  # without the fault
    return told


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    folder = tmp_path_factory.mktemp("guards")
    settings = [*COMMON, "parallel.dp_shard=2"]
    for name, more in {"whole": [], "never": [], "skip": SKIP, "back": ROLL, "stop": []}.items():
        make_run(folder, name, *settings, *more)
    for number in (2, 9):  # as if these data had never been
        entry = PassedOver(PER_STEP * number, PER_STEP * (number + 1), 0, "skip_step", None, "")
        passed_over.write(folder / "never" / "passed_over.jsonl", entry)
    return folder, run_distributed(_two_ranks, 2, str(folder))


def test_every_rank_ends_alike(two_ranks: tuple[Path, list[dict[str, str]]]) -> None:
    _, told = two_ranks
    assert told[0] == told[1]
    assert {name: bool(text) for name, text in told[0].items()} == {
        "whole": False, "never": False, "skip": False, "back": False, "stop": True, "resumed": False,
    }  # fmt: skip


def test_a_mended_run_is_the_run_that_never_had_those_data(two_ranks: tuple[Path, list[dict[str, str]]]) -> None:
    folder, _ = two_ranks
    never = trajectory(RunDir(folder / "never"))
    assert [step for step, *_ in never] == list(range(1, STEPS + 1))
    consumed = [PER_STEP * n for n in range(1, STEPS + 3) if n not in (3, 10)]
    assert [sequences for *_, sequences in never] == consumed
    assert never != trajectory(RunDir(folder / "whole"))
    for name in ("skip", "back"):
        assert trajectory(RunDir(folder / name)) == never, name
        assert all(record["tokens"] == 32 * PER_STEP * record["step"] for record in records(RunDir(folder / name)))


def test_what_was_passed_over_is_on_record(two_ranks: tuple[Path, list[dict[str, str]]]) -> None:
    folder, _ = two_ranks
    by_name = {name: entries(RunDir(folder / name)) for name in ("skip", "back")}
    for name, back_to in {"skip": [None, None], "back": [0, 8]}.items():
        assert [(e.first, e.end, e.step, e.back_to) for e in by_name[name]] == [(4, 6, 3, back_to[0]), (18, 20, 9, back_to[1])], name
        assert "nan" in by_name[name][0].reason and "standard deviations above" in by_name[name][1].reason
    assert RunDir(folder / "back").checkpoint_steps() == [8, 12]


def test_without_a_policy_all_stop_and_a_resumed_run_is_whole(two_ranks: tuple[Path, list[dict[str, str]]]) -> None:
    folder, told = two_ranks
    assert told[0]["stop"].startswith("step 6: loss inf") and "guards.on_not_finite=rollback" in told[0]["stop"]
    assert trajectory(RunDir(folder / "stop")) == trajectory(RunDir(folder / "whole"))
    assert entries(RunDir(folder / "stop")) == []
