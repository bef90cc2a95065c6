"""metrics.jsonl is exact, repaired after any tear, and a full disk does not stop a run."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import warnings

import pytest

from trainer.metrics import MetricsWriter, decode_record, encode_record, repair
from trainer.run_dir import RunDir


def record(step: int, split: str = "train", **more) -> dict:
    return {"step": step, "split": split, "loss": step / 3, "tokens": step * 100, "tokens_per_second": 5.5, "memory_peak_bytes": 1, **more}


def writer(path, start_step=0, **settings) -> MetricsWriter:
    return MetricsWriter(RunDir(path), start_step, **{"tensorboard": False, **settings})


def steps(path) -> list[tuple[int, str]]:
    return [(r["step"], r["split"]) for r in map(json.loads, RunDir(path).metrics.read_text().splitlines())]


def test_floats_read_back_bit_identical():
    rng = random.Random(0)
    for _ in range(1000):
        value = math.ldexp(rng.random() - 0.5, rng.randrange(-1000, 1000))
        again = decode_record(encode_record({"step": 1, "loss": value, "parts": [value]}))
        assert again is not None
        assert again["loss"].hex() == value.hex() == again["parts"][0].hex()


def test_numbers_that_json_lacks_are_text_that_float_reads():
    line = encode_record({"step": 1, "loss": math.nan, "grad_norm": math.inf, "parts": [-math.inf], "by": {"a": math.nan}})
    again = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert math.isnan(float(again["loss"]))
    assert float(again["grad_norm"]) == math.inf
    assert float(again["parts"][0]) == -math.inf


def test_a_record_is_in_the_file_when_write_returns(tmp_path):
    metrics = writer(tmp_path)
    metrics.write(record(1))
    assert steps(tmp_path) == [(1, "train")]
    metrics.write(record(1, "valid"))
    assert steps(tmp_path) == [(1, "train"), (1, "valid")]


def test_resume_removes_the_steps_that_run_again(tmp_path):
    metrics = writer(tmp_path)
    for step in range(1, 8):
        metrics.write(record(step))
        if step % 2 == 0:
            metrics.write(record(step, "valid"))
    metrics.close()
    again = writer(tmp_path, 4)
    again.write(record(5, loss=9.0))
    assert steps(tmp_path) == [(1, "train"), (2, "train"), (2, "valid"), (3, "train"), (4, "train"), (4, "valid"), (5, "train")]
    again.close()
    writer(tmp_path, 0).close()
    assert steps(tmp_path) == [], "from the beginning: nothing stays, not even step 0"


def test_a_tear_at_any_byte_is_repaired(tmp_path):
    lines = [encode_record(record(step, note='é\u2028 \\ "')) for step in (1, 2)]
    data = b"".join(lines)
    path = RunDir(tmp_path).metrics
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        metrics = writer(tmp_path, 5)
        metrics.write(record(3))
        metrics.close()
        whole = [1] * (length >= len(lines[0])) + [2] * (length >= len(data))
        assert [step for step, _ in steps(tmp_path)] == [*whole, 3], length


def test_only_the_bad_lines_go_when_the_middle_is_damaged(tmp_path):
    path = RunDir(tmp_path).metrics
    good = [encode_record(record(step)) for step in (1, 2, 3)]
    path.write_bytes(good[0] + b'{"step": 1\n' + b"\x00\xff\n" + b"7\n" + b'{"loss": 1}\n' + good[1] + good[2] + b'{"ste')
    assert repair(path, 2) == 6
    assert path.read_bytes() == good[0] + good[1]
    assert repair(path, 2) == 0
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    assert repair(tmp_path / "nowhere", 2) == 0


def test_other_ranks_write_nothing(tmp_path):
    metrics = writer(tmp_path, enabled=False, tensorboard=True)
    metrics.write(record(1))
    metrics.close()
    assert os.listdir(tmp_path) == []


class _BadStream:
    """A disk that takes ``room`` more bytes, then none, until ``room`` is raised."""

    def __init__(self, stream, room: int) -> None:
        self.stream, self.room = stream, room

    def write(self, data: bytes) -> int:
        part = data[: self.room]
        if not part:
            raise OSError(28, "No space left on device")
        self.room -= len(part)
        return self.stream.write(part)

    def truncate(self, size: int) -> int:
        return self.stream.truncate(size)

    def close(self) -> None:
        self.stream.close()


@pytest.mark.parametrize("room", [0, 1, 50, 150, 153])
def test_a_full_disk_warns_once_and_leaves_no_half_line(tmp_path, room):
    metrics = writer(tmp_path)
    metrics._stream = bad = _BadStream(metrics._stream, room)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in (1, 2, 3, 4):
            metrics.write(record(step))
        bad.room = 10_000
        metrics.write(record(5))
    metrics.close()
    assert [str(w.message) for w in caught] == [f"cannot write metrics below {tmp_path}: No space left on device; training goes on"]
    fitting = [(1, "train")] if room >= len(encode_record(record(1))) else []
    assert steps(tmp_path) == [*fitting, (5, "train")]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own writer thread
def test_a_disk_that_is_really_full(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("mount is not permitted here")
    try:
        metrics = writer(folder, tensorboard=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(1, 2000):
                metrics.write(record(step))
            metrics.close()
        assert sum("training goes on" in str(w.message) for w in caught) == 1
        written = [step for step, _ in steps(folder)]
        assert written == list(range(1, len(written) + 1))
        assert 10 < len(written) < 1999
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_run_directory_that_cannot_be_written_warns(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="training goes on"):
        metrics = MetricsWriter(RunDir(tmp_path / "file"), 0)
    metrics.write(record(1))
    metrics.close()


def _scalars(folder, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.parametrize(("resume_at", "rolled_back"), [(6, False), (0, False), (6, True)])
def test_tensorboard_curves_have_one_point_per_step_after_a_resume(tmp_path, resume_at, rolled_back):
    run = RunDir(tmp_path)
    first = MetricsWriter(run, 0)
    for step in range(10):
        first.write(record(step, lr=0.5, text="no number", flag=True, cursor={"epoch": 0, "step": step, "name": "x"}))
        first.write(record(step, "valid"))
    if rolled_back:
        second = first
        second.rewind(resume_at)
    else:
        del first  # as after a kill: never closed, yet flushed
        second = MetricsWriter(run, resume_at)
    for step in range(resume_at + 1 if resume_at else 0, 12):
        second.write(record(step, loss=100.0 + step))
    second.close()
    points = _scalars(run.tensorboard, "train/loss")
    assert [step for step, _ in points] == list(range(12))
    cut = resume_at + 1 if resume_at else 0
    assert [value for _, value in points[cut:]] == [100.0 + step for step in range(cut, 12)]
    assert [step for step, _ in _scalars(run.tensorboard, "train/lr")] == list(range(cut))
    if cut:
        assert _scalars(run.tensorboard, "train/cursor/step") == [(step, step) for step in range(cut)]
        assert [step for step, _ in _scalars(run.tensorboard, "valid/loss")] == list(range(cut))


def test_a_tensorboard_that_fails_ends_alone(tmp_path):
    metrics = MetricsWriter(RunDir(tmp_path), 0)
    metrics._board.add_scalar = lambda *args: (_ for _ in ()).throw(OSError(5, "Input/output error"))
    with pytest.warns(RuntimeWarning, match="Input/output error; training goes on"):
        metrics.write(record(1))
    metrics.write(record(2))
    metrics.close()
    assert steps(tmp_path) == [(1, "train"), (2, "train")]
