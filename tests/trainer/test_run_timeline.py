"""The timeline in a run's directory: of the run's own plan, from the trace that is there, and never a reason to fail."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from memory_mgmt.estimate import METHOD as ESTIMATED
from memory_mgmt.plan import MemoryPlan, Moment, Term
from memory_mgmt.trace import Trace, TracedBuffer
from memory_mgmt.traced_plan import METHOD
from trainer import config_file, planning, trace_workers, tracing
from trainer.plan_files import PAGE, PICTURE, kept_trace
from trainer.run_dir import RunDir
from trainer.run_timeline import drawn

HOME = Path(__file__).resolve().parents[2]
BUFFER = TracedBuffer(0, 2, 5, 2**22, 2**22, "transient", "aten::mm", "blocks.0", 0, "forward", "forward")
TRACE = Trace("cpu", [BUFFER], [], [(1, "forward blocks.0")], 9)
PLAN = MemoryPlan(METHOD, "cpu", 1, (Term("step", "transient", 2**22, 2**22),), (Moment("forward", 2**22),), None, None)


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run that is about to start; the trace behind its plan is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    config = config_file.resolve(config_file.find("debug_cpu", HOME / "configs"), ["train.device=cpu"])
    run_dir.config.write_text(config_file.dump(config))
    run_dir.memory_plan.write_text(PLAN.to_json())
    request = planning.target_of(config, planning.this_machine("cpu")).request()
    TRACE.save(tracing._path(request.to_dict(), tracing._code_digest()))
    return run_dir


def run(run_dir: RunDir) -> list[str]:
    """What a run tells whose ranks do nothing."""
    told: list[str] = []
    with drawn(run_dir, told.append):
        pass
    return told


def files(run_dir: RunDir) -> set[str]:
    return {path.name for path in run_dir.path.glob("*timeline*")}


def test_drawn_once_and_again_for_another_plan(run_dir: RunDir) -> None:
    page = run_dir.path / PAGE
    assert run(run_dir) == [f"memory timeline: {page}"] and files(run_dir) == {PAGE, PICTURE}
    assert "4.0 MiB" in page.read_text() and 'id="tab-addresses"' in page.read_text()
    (page).write_text("this one")
    assert run(run_dir) == [f"memory timeline: {page}"] and page.read_text() == "this one"
    run_dir.memory_plan.write_text(replace(PLAN, budget_bytes=3 * 2**20).to_json())
    os.utime(page, ns=(0, run_dir.memory_plan.stat().st_mtime_ns - 1))
    run(run_dir)
    assert "memory.budget_gib" in page.read_text()


def test_without_a_kept_trace_the_earlier_picture_goes_and_the_run_goes_on(run_dir: RunDir) -> None:
    (run_dir.path / PICTURE).write_text("of an earlier plan")
    for path in (tracing.cache_dir() / "traces").glob("*.gz"):
        path.unlink()
    (_, warning) = run(run_dir)
    assert warning.startswith("warning: the memory timeline was not drawn") and "no longer kept" in warning
    assert files(run_dir) == set()


def test_what_cannot_be_written_or_read_is_a_warning(run_dir: RunDir) -> None:
    (run_dir.path / PICTURE).mkdir()
    (warning,) = run(run_dir)
    assert warning.startswith("warning: ")
    (run_dir.path / PICTURE).rmdir()
    run_dir.memory_plan.write_text("torn")
    (warning,) = run(run_dir)
    assert warning.startswith("warning: ") and files(run_dir) == set()


def test_a_plan_from_formulas_has_none_and_an_error_of_the_run_passes(run_dir: RunDir) -> None:
    run_dir.memory_plan.write_text(replace(PLAN, method=ESTIMATED).to_json())
    assert run(run_dir) == [] and files(run_dir) == set()
    with pytest.raises(RuntimeError, match="of the run"), drawn(run_dir, print):
        raise RuntimeError("of the run")


@pytest.mark.parametrize("recompute", ["none", "auto"])
def test_the_trace_behind_a_plan_is_the_one_that_is_kept(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ["model.layers=[swa]", "model.d_model=16", "model.n_heads=2", "model.n_kv_heads=null", "data.seq_len=64", "model.window=16"]
    config = config_file.resolve(config_file.find("debug_cpu", HOME / "configs"), [*tiny, f"memory.recompute={recompute}"])
    plan = planning.plan_run(config)
    monkeypatch.setattr(trace_workers, "run", lambda requests: pytest.fail("traced again"))
    trace = kept_trace(config, plan)
    assert trace is not None
    assert planning.plan_traced(planning.target_of(config, planning.this_machine("auto")), trace).peak_bytes == plan.peak_bytes
