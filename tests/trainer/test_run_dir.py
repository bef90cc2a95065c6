"""Paths, atomic writes, status and lock of a run directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from models.errors import UserError
from trainer.run_dir import Process, RunDir, write_atomic

ROOT = Path(__file__).resolve().parents[2]


def test_imports_no_torch():
    code = "import sys, trainer.run_dir, trainer.manifest, trainer.runs_table, trainer.preemption; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_paths_are_those_of_the_architecture(tmp_path):
    run = RunDir(tmp_path / "a")
    names = [run.config, run.memory_plan, run.state, run.metrics, run.tensorboard, run.log(3), run.checkpoint(1000), run.code]
    assert [str(path.relative_to(run.path)) for path in names] == [
        "config.yaml",
        "memory_plan.json",
        "state.json",
        "metrics.jsonl",
        "tensorboard",
        "logs/rank_3.log",
        "checkpoints/step_00001000",
        "code",
    ]
    assert not run.path.exists()


def test_create_refuses_anything_that_is_there(tmp_path):
    run = RunDir(tmp_path / "runs" / "a")
    run.create()
    assert run.checkpoints.is_dir()
    with pytest.raises(UserError, match="longstride resume.*or choose another run.name"):
        run.create()
    (tmp_path / "empty").mkdir()
    RunDir(tmp_path / "empty").create()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        RunDir(tmp_path / "file").create()
    with pytest.raises(UserError, match="cannot create run directory.*run.root"):
        RunDir(tmp_path / "file" / "below").create()


def test_nobody_else_looks_into_a_run_unless_it_may(tmp_path):
    before = os.umask(0o022)
    try:
        RunDir(tmp_path / "runs" / "mine").create()
        RunDir(tmp_path / "runs" / "ours").create(private=False)
    finally:
        os.umask(before)
    assert [(tmp_path / "runs" / name).stat().st_mode & 0o777 for name in ("mine", "ours", "")] == [0o700, 0o755, 0o755]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_run_made_open_later_is_as_open_as_the_umask_lets(tmp_path, umask):
    run = RunDir(tmp_path / "run")
    run.create()
    before = os.umask(umask)
    try:
        run.set_private(False)
        assert os.umask(umask) == umask, "reading the umask leaves it as it was"
    finally:
        os.umask(before)
    assert run.path.stat().st_mode & 0o777 == 0o777 & ~umask
    run.set_private(True)
    assert run.path.stat().st_mode & 0o777 == 0o700


def test_checkpoint_steps_lists_published_ones_only(tmp_path):
    run = RunDir(tmp_path)
    assert run.checkpoint_steps() == []
    for name in ("step_00000020", "step_00000003", "step_123456789", ".tmp-step_00000030", ".trash-step_00000001", "step_5", "other"):
        (run.checkpoints / name).mkdir(parents=True)
    (run.checkpoints / "step_00000007").write_text("a file")
    assert run.checkpoint_steps() == [3, 20, 123456789]


def test_write_atomic_keeps_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_write_atomic_leaves_permissions_to_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        write_atomic(tmp_path / "private", b"x")
        os.umask(0o022)
        write_atomic(tmp_path / "public", b"x")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("private", "public")] == [0o600, 0o644]


def test_write_atomic_under_kill_is_old_or_new(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"0" * 1_000_000)
    code = (
        "import sys; from pathlib import Path; from trainer.run_dir import write_atomic; print('go', flush=True)\n"
        "for i in range(10**9): write_atomic(Path(sys.argv[1]), str(i % 10).encode() * 1_000_000)"
    )
    for delay in (0.0, 0.01, 0.03):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.wait()
        process.stdout.close()
        content = path.read_bytes()
        assert len(content) == 1_000_000
        assert len(set(content)) == 1


def test_state_keeps_start_time_and_total(tmp_path):
    run = RunDir(tmp_path)
    assert run.read_state() is None
    run.write_state("running", step=0, total_steps=100)
    first = run.read_state()
    run.write_state("failed", step=7, reason="two\nlines")
    last = run.read_state()
    assert first and last
    assert (last.status, last.step, last.total_steps, last.reason, last.started) == ("failed", 7, 100, "two lines", first.started)
    for content in ("", "[]", '{"status": "running"}', '{"process": 3}', "null"):
        run.state.write_text(content)
        assert run.read_state() is None


def test_state_on_a_full_disk_warns_and_goes_on(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    monkeypatch.setattr("trainer.run_dir.write_atomic", lambda path, data: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.warns(RuntimeWarning, match="No space left"):
        run.write_state("running", step=1)


def test_process_death_is_seen_and_others_are_not_guessed():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    here = Process.current()
    assert not here.is_dead()
    from trainer.run_dir import _start_ticks

    theirs = Process(child.pid, here.host, here.boot_id, here.namespace, _start_ticks(child.pid))
    assert not theirs.is_dead()
    assert Process(child.pid, here.host, here.boot_id, here.namespace, theirs.started_ticks + 1).is_dead(), "a reused number"
    child.kill()
    time.sleep(0.2)
    assert theirs.is_dead(), "a zombie is dead"
    child.wait()
    assert theirs.is_dead()
    assert Process(child.pid, here.host, "another boot", here.namespace, 5).is_dead()
    assert not Process(child.pid, "another-host", here.boot_id, here.namespace, 5).is_dead()
    assert not Process(child.pid, here.host, here.boot_id, "pid:[1]", 5).is_dead()


def test_lock_is_exclusive_and_dies_with_its_holder(tmp_path):
    run = RunDir(tmp_path)
    code = (
        "import sys, time; from trainer.run_dir import RunDir\nwith RunDir(sys.argv[1]).lock(): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="another process"), run.lock():
        pass
    run.wait_until_free(0.1)
    assert holder.poll() is None, "it waits no longer than that"
    threading.Timer(0.3, holder.kill).start()
    run.wait_until_free(60)
    assert holder.wait(timeout=10) == -signal.SIGKILL
    holder.stdout.close()
    with run.lock():
        pass


def test_code_snapshot_holds_the_rooms_sources_only(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    run.code.mkdir()
    (run.code / "stale.py").write_text("")
    count = run.snapshot_code()
    files = [path for path in run.code.rglob("*") if path.is_file()]
    assert count == len(files) > 10
    assert {path.suffix for path in files} == {".py", ".cpp", ".h", ".html", ".js", ".sbatch"}
    assert (run.code / "trainer" / "run_dir.py").read_bytes() == (ROOT / "trainer" / "run_dir.py").read_bytes()
    assert not (run.code / "stale.py").exists()
    assert run.snapshot_code(run.code) == 0 and len([path for path in run.code.rglob("*") if path.is_file()]) == count
