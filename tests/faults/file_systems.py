"""Faults of file systems under a run, injected with real ones on loop devices: quota, errors in writing and in reading, stalls.

Needs root; the quota is Btrfs's (btrfs-progs: no other one is in every kernel), and a file system that stalls and can be killed is one in
user space (bindfs). Run by ``python -m tests.faults``.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from longstride import main
from parallel.launcher import HUNG
from tests.slurm.cluster import SEARCH
from tests.test_front_door import COMMAND, records, tiny, wait_for_step
from tests.trainer.guarded_run import go_on, make_run, train, trajectory
from trainer.checkpoint import CheckpointManager
from trainer.run_dir import RunDir

pytestmark = pytest.mark.timeout(900)
ENV = {**os.environ, "PATH": SEARCH}
SAVING = ["train.steps=8", "checkpoint.save_every_steps=2"]


def root(*command: object) -> str:
    """Output of a command of the system's; the test is skipped, saying why, where it is not there or not permitted."""
    words = [str(word) for word in command]
    if shutil.which(words[0], path=SEARCH) is None:
        pytest.skip(f"{words[0]} is not installed")
    done = subprocess.run(words, env=ENV, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@contextmanager
def mounted(what: Path, where: Path, *options: str) -> Iterator[Path]:
    """``what`` mounted at ``where``."""
    where.mkdir(exist_ok=True)
    root("mount", *options, what, where)
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], env=ENV, check=True)


def image(path: Path, size: int, *mkfs: str) -> Path:
    """A file with a file system in it."""
    with path.open("wb") as stream:
        stream.truncate(size)
    root(*mkfs, path)
    return path


@contextmanager
def limited(folder: Path) -> Iterator[tuple[Path, Callable[[str], object]]]:
    """A folder with a quota, and how to set it (``"3M"``, ``"none"``)."""
    disk = image(folder / "btrfs.img", 256 << 20, "mkfs.btrfs", "-q", "--mixed")
    with mounted(disk, folder / "btrfs", "-o", "loop,noatime") as top:
        root("btrfs", "quota", "enable", top)
        root("btrfs", "subvolume", "create", top / "user")
        group = f"0/{root('btrfs', 'inspect-internal', 'rootid', top / 'user').strip()}"
        yield top / "user", lambda limit: root("btrfs", "qgroup", "limit", limit, group, top)  # by top: that user may be full


def after_save(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Call ``act`` once, when the checkpoint of ``step`` is there."""
    retain = CheckpointManager._retain

    def then(self: CheckpointManager, newest: int) -> None:
        retain(self, newest)
        if newest == step:
            monkeypatch.undo()
            act()

    monkeypatch.setattr(CheckpointManager, "_retain", then)


def quietly(run_dir: RunDir) -> str:
    """``train`` from the start; that metrics cannot be written is warned of, and is not what is asked here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return train(run_dir)


def as_whole(tmp_path: Path, run_dir: RunDir, settings: list[str]) -> None:
    """The run goes on where it stands, and ends as one that nothing happened to."""
    assert go_on(str(run_dir.path)) == ""
    whole = make_run(tmp_path, "whole", *settings)
    assert train(whole) == ""
    assert trajectory(run_dir) == trajectory(whole) and len(trajectory(whole)) == 8


def test_a_quota_is_used_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The file system has room, this user has not: statvfs does not tell, the first write does."""
    with limited(tmp_path) as (folder, limit):
        run_dir = make_run(folder, "short", *SAVING)

        def use_up() -> None:
            os.sync()
            limit("4M")
            with contextlib.suppress(OSError), (folder / "others").open("wb", buffering=0) as stream:
                while stream.write(bytes(4096)):
                    pass

        after_save(monkeypatch, 4, use_up)
        problem = quietly(run_dir)
        assert "cannot save step_00000006" in problem and "Disk quota exceeded" in problem and "make room, then" in problem, problem
        assert run_dir.checkpoint_steps() == [2, 4] and not list(run_dir.checkpoints.glob(".*"))
        settings = tiny("new", f"run.root={folder}", "memory.plan=estimate", f"data.path={text_in(tmp_path / 'elsewhere') / 'text.jsonl'}")
        assert main(settings) == 2
        told = capsys.readouterr().err
        assert "Disk quota exceeded" in told and "run.root" in told and "Traceback" not in told, told
        assert not (folder / "new" / "config.yaml").exists()
        (folder / "others").unlink(missing_ok=True)  # the quota may have been less than what was there
        limit("none")
        as_whole(tmp_path, run_dir, SAVING)


def text_in(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"text": f"{n} " + "to be or not to be " * 20}) for n in range(40)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_what_was_written_does_not_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk whose writes fail: the kernel takes the bytes and says EIO when they are to be synced."""
    with limited(tmp_path) as (below, limit):
        disk = image(below / "disk.img", 64 << 20, "mkfs.ext4", "-q", "-O", "^has_journal")
        with mounted(disk, tmp_path / "disk", "-o", "loop") as folder:
            run_dir = make_run(folder, "short", *SAVING)

            def break_down() -> None:
                os.sync()
                limit("1M")

            after_save(monkeypatch, 4, break_down)
            problem = quietly(run_dir)
            assert "cannot save step_00000006: Input/output error" in problem, problem
            assert run_dir.checkpoint_steps() == [2, 4]
            limit("none")
            as_whole(tmp_path, run_dir, SAVING)


def test_a_checkpoint_cannot_be_read_any_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest checkpoint's sectors are bad: the file system gives EIO for what it reads there, and the one before is used."""
    disk = image(tmp_path / "disk.img", 128 << 20, "mkfs.btrfs", "-q", "--mixed")
    with mounted(disk, tmp_path / "disk", "-o", "loop") as folder:
        run_dir = make_run(folder, "short", *SAVING)
        assert train(run_dir) == ""
        os.sync()
        shard = max(run_dir.checkpoint(8).glob("*.distcp"), key=lambda path: path.stat().st_size)
        sector = shard.read_bytes()[8192:12288]
        with disk.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as sectors:
            places = [found.start() for found in re.finditer(re.escape(sector), sectors)]
            assert places
            for place in places:
                sectors[place] ^= 1
        with shard.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with pytest.raises(OSError, match="Input/output error"):
            shard.read_bytes()
        capsys.readouterr()
        assert train(run_dir, resume=True) == ""
        told = capsys.readouterr().out
        assert "step_00000008" in told and "Input/output error" in told and "resumed from step_00000006" in told, told
        as_whole(tmp_path, run_dir, SAVING)


STEPS = 150
RANKS = [f"train.steps={STEPS}", "parallel.cp=2", "memory.plan=estimate", "checkpoint.save_every_steps=10"]


def start(place: Path, name: str, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *tiny(name, *RANKS, *more)], cwd=place, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def longstride(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str]]:
    """Losses of a run that is not stalled."""
    folder = text_in(tmp_path_factory.mktemp("whole"))
    done = longstride(*tiny("whole", *RANKS), cwd=folder)
    assert done.returncode == 0, done.stderr
    found = losses(folder / "runs" / "whole")
    assert len(found) == STEPS
    return found


def losses(run_dir: Path) -> list[tuple[int, str]]:
    return [(record["step"], float(record["loss"]).hex()) for record in records(run_dir)]


def test_a_stall_is_waited_for(tmp_path: Path, whole: list[tuple[int, str]]) -> None:
    """For some seconds nothing can be written anywhere below the run; ranks wait in the middle of whatever they do."""
    disk = image(tmp_path / "disk.img", 64 << 20, "mkfs.ext4", "-q")
    with mounted(disk, tmp_path / "disk", "-o", "loop") as folder:
        text_in(tmp_path)
        process = start(tmp_path, "stalled", f"run.root={folder}")
        run_dir = folder / "stalled"
        for step in (20, 70):
            wait_for_step(process, run_dir, step)
            root("fsfreeze", "--freeze", folder)
            time.sleep(4)
            root("fsfreeze", "--unfreeze", folder)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
        assert losses(run_dir) == whole


def test_a_stall_without_end_ends_the_ranks(tmp_path: Path, whole: list[tuple[int, str]]) -> None:
    """The file server does not answer any more, and everything below the run is on it, the ranks' logs too."""
    kept = tmp_path / "kept"
    kept.mkdir()
    folder = tmp_path / "served"
    folder.mkdir()
    if shutil.which("bindfs", path=SEARCH) is None:
        pytest.skip("bindfs is not installed")
    server = subprocess.Popen(["bindfs", "-f", str(kept), str(folder)], env=ENV)
    try:
        deadline = time.monotonic() + 30
        while not folder.is_mount():
            assert time.monotonic() < deadline and server.poll() is None
            time.sleep(0.05)
        text_in(tmp_path)
        process = start(tmp_path, "stalled", f"run.root={folder}", "guards.hang_min_seconds=6", "guards.hang_times_median=3")
        wait_for_step(process, folder / "stalled", 12)
        ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "_rank" in child.cmdline()]
        assert len(ranks) == 2
        server.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        while any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks):
            assert time.monotonic() - began < 200, "the ranks are still there"
            time.sleep(0.2)
        server.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=200)
        assert process.returncode == HUNG and "hung and was ended by its watchdog" in err, err
        done = longstride("resume", str(folder / "stalled"), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert losses(folder / "stalled") == whole
    finally:
        server.send_signal(signal.SIGCONT)
        subprocess.run(["umount", "-l", str(folder)], env=ENV, check=False)
        server.terminate()
        server.wait(timeout=30)
