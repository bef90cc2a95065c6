"""Steps that are not finite or spike: told exactly, agreed by all ranks, passed over, and the rest bit for bit as if they had not been."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from models.errors import UserError
from tests.distributed import run_distributed
from tests.trainer.guarded_run import entries, faults, make_run, records, train, trajectory
from trainer import config_file, passed_over
from trainer.config import GuardsSection
from trainer.engine import Engine
from trainer.guards import History, trouble_of
from trainer.metrics import MetricsWriter
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
    kept = [
        PassedOver(8, 12, 3, "skip_step", None, "a"),
        PassedOver(12, 16, 3, "skip_step", None, "b"),
        PassedOver(40, 44, 11, "rollback", 4, "c"),
    ]
    for entry in kept:
        passed_over.write(path, entry, loss="nan")
        with path.open("a") as stream:
            stream.write('{"first": 1, "end"')  # torn by a crash
    assert passed_over.read(path) == kept
    known = PassedOverList(kept)
    assert [known.covers(*part) for part in ((0, 8), (4, 9), (15, 20), (16, 40), (43, 44), (44, 48))] == [
        False,
        True,
        True,
        False,
        True,
        False,
    ]
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
    settings = [*COMMON, "parallel.dp_shard=2", "guards.report_every_steps=4"]
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


def test_every_rank_reports(two_ranks: tuple[Path, list[dict[str, str]]]) -> None:
    folder, _ = two_ranks
    found = json.loads(RunDir(folder / "whole").ranks.read_text())
    assert found["step"] == STEPS and [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert all(rank["own_seconds"] > 0 and rank["resident_bytes"] > 2**20 and rank["available_bytes"] > 0 for rank in found["ranks"])


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


# ---- one process, each policy by itself


@pytest.mark.parametrize("more", [["optim.preset=galore", "optim.update_gap=5", "optim.rank=4"], ["checkpoint.asynchronous=true"]])
def test_going_back_leaves_nothing_of_what_was(tmp_path: Path, more: list[str]) -> None:
    never = make_run(tmp_path, "never", *COMMON, *more)
    passed_over.write(never.passed_over, PassedOver(8, 10, 0, "skip_step", None, ""))
    back = make_run(tmp_path, "back", *COMMON, *ROLL, "guards.rollback_steps=2", *more)
    assert train(never) == ""
    with faults(back, {9: 40.0}):
        assert train(back) == ""
    assert trajectory(back) == trajectory(never)
    assert [(e.first, e.end, e.back_to) for e in entries(back)] == [(8, 10, 8)]


def test_too_many_in_a_row_stop_the_run_and_so_do_rollbacks_that_lead_nowhere(tmp_path: Path) -> None:
    always = dict.fromkeys(range(5, 30), math.nan)
    skip = make_run(tmp_path, "skip", *COMMON, *SKIP, "guards.max_mends=2")
    back = make_run(tmp_path, "back", *COMMON, *ROLL, "guards.max_mends=2")
    with faults(skip, always):
        assert "step 6: loss nan" in (told := train(skip)) and "2 sets of data in a row were passed over" in told
    with faults(back, always):
        assert "went back to step_00000004 2 times already" in train(back)
        assert "went back to step_00000004 2 times already" in train(back, resume=True), "a new process knows of those before"
    assert [(e.first, e.back_to) for e in entries(back)] == [(5, 4), (6, 4)]
    assert back.checkpoint_steps() == [0, 4] and skip.checkpoint_steps() == [4]


def test_spikes_are_reported_when_nothing_else_is_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path, "told", *COMMON)
    with faults(run_dir, {9: 40.0}):
        assert train(run_dir) == ""
    assert "guard: step 10: loss" in capfd.readouterr().out and entries(run_dir) == []
    assert len(trajectory(run_dir)) == STEPS


def test_parameters_that_overflow_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine.step

    def overflow(self: Engine, lr: float, accept: Callable[[float], bool]) -> float:
        norm = step(self, lr, accept)
        if self.calls == 8 - 1:  # type: ignore[attr-defined]
            next(iter(self.parameters.values())).data[0] = math.inf
        self.calls += 1  # type: ignore[attr-defined]
        return norm

    monkeypatch.setattr(Engine, "step", overflow)
    monkeypatch.setattr(Engine, "calls", 0, raising=False)
    run_dir = make_run(tmp_path, "over", *COMMON)
    assert "step 8: its update made parameters or optimizer states that are not finite" in train(run_dir)
    assert run_dir.checkpoint_steps() == [4]
    monkeypatch.setattr(Engine, "calls", 0)
    back = make_run(tmp_path, "back", *COMMON, *ROLL)
    assert train(back) == ""
    assert [(e.first, e.step, e.back_to) for e in entries(back)] == [(7, 8, 4)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("mount is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_disk_without_room_for_a_checkpoint(small_disk: Path, asynchronous: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full from step 4 to step 6; what is due at step 4 is saved as soon as there is room."""
    settings = [*COMMON, f"checkpoint.asynchronous={asynchronous}"]
    whole = make_run(small_disk, "whole", *settings)
    go_on = make_run(small_disk, "on", *settings, "guards.on_full_disk=continue")
    stops = make_run(small_disk, "stop", *settings)
    ballast = small_disk / "ballast"

    class Recorded(MetricsWriter):
        def write(self, record: Mapping[str, Any]) -> None:
            super().write(record)
            if record["step"] == 3:
                free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
                ballast.write_bytes(bytes(free - 65_536))
            if record["step"] == 6:
                ballast.unlink()

    assert train(whole) == ""
    monkeypatch.setattr("trainer.build.MetricsWriter", Recorded)
    assert train(go_on) == ""
    assert trajectory(go_on) == trajectory(whole) and go_on.checkpoint_steps() == [8, 12]
    assert "no room for step_00000004" in (told := train(stops)) and "longstride resume" in told
    ballast.unlink()
    assert stops.checkpoint_steps() == []
