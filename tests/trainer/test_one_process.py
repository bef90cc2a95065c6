"""Real processes that want the same trace at once: one makes it, whatever becomes of the others."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from memory_mgmt.trace import Trace
from trainer import config_file, tracing

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 4
WORKER = """
    import errno, fcntl, os, signal, sys, time
    from pathlib import Path
    from models.errors import UserError
    from memory_mgmt.trace import Trace
    from trainer import config_file, one_process, tracing

    folder, fate = Path(sys.argv[1]), sys.argv[2]
    config = config_file.resolve(config_file.find("debug_cpu", Path("configs")))
    requests = [tracing.TraceRequest(config, vocab, "cpu") for vocab in (256, 320)]
    if int(sys.argv[3]) % 2:
        requests.reverse()

    def run_process(bodies):
        with (folder / "log").open("a") as log:
            log.write(f"{os.getpid()} {len(bodies)}\\n")
        first = len((folder / "log").read_text().splitlines()) == 1
        time.sleep(1.0 if first or fate == "no locks" else 0.0)
        if fate == "killed" and first:
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == "refused":
            raise UserError("the training step could not be traced: 7 is not 8")
        for body in bodies:
            Trace("cpu", [], [], [], 1, {"maker": os.getpid()}).save(Path(body["out"]))

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    tracing.trace_workers.run = run_process
    tracing._code_digest = lambda: "the same for all"
    if fate == "no locks":
        fcntl.flock = no_locks
    if fate == "stuck":
        one_process.WAIT_SECONDS = 0.3
    (folder / f"ready_{sys.argv[3]}").touch()
    while len(list(folder.glob("ready_*"))) < int(sys.argv[4]):
        time.sleep(0.005)
    try:
        print(sorted({trace.notes["maker"] for trace in tracing.trace_steps(requests)}))
    except UserError as error:
        print(error)
        sys.exit(2)
"""


def run(folder: Path, fate: str) -> tuple[list[int], list[str], list[int]]:
    """Exit codes and outputs of processes that start together, and how many traces each call of the tracer was asked for."""
    (folder / "worker.py").write_text(textwrap.dedent(WORKER))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder)}
    command = [sys.executable, str(folder / "worker.py"), str(folder), fate]
    processes = [
        subprocess.Popen([*command, str(i), str(PROCESSES)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for i in range(PROCESSES)
    ]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    calls = [int(line.split()[1]) for line in (folder / "log").read_text().splitlines()]
    return [process.returncode for process in processes], outputs, calls


def test_one_of_them_traces(tmp_path: Path) -> None:
    codes, outputs, calls = run(tmp_path, "well")
    assert codes == [0] * PROCESSES and calls == [2]
    assert len(set(outputs)) == 1
    assert not list(tmp_path.rglob("*.lock"))


def test_the_next_one_takes_over_from_one_that_was_killed(tmp_path: Path) -> None:
    codes, outputs, calls = run(tmp_path, "killed")
    assert sorted(codes) == [-9, 0, 0, 0] and calls == [2, 2]
    assert len(set(outputs) - {""}) == 1


def test_those_who_wait_hear_why_it_failed(tmp_path: Path) -> None:
    codes, outputs, calls = run(tmp_path, "refused")
    assert codes == [2] * PROCESSES and calls == [2]
    assert set(outputs) == {"the training step could not be traced: 7 is not 8"}


@pytest.mark.parametrize("fate", ["no locks", "stuck"])
def test_nobody_waits_in_vain(fate: str, tmp_path: Path) -> None:
    codes, outputs, calls = run(tmp_path, fate)
    assert codes == [0] * PROCESSES and len(calls) > 1 and all(output.startswith("[") for output in outputs)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-5], lambda raw: b"", lambda raw: raw[:20] + bytes([raw[20] ^ 255]) + raw[21:]])
def test_a_damaged_trace_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]) -> None:
    made: list[str] = []

    def run_process(bodies: list[dict[str, str]]) -> None:
        for body in bodies:
            made.append(body["out"])
            Trace("cpu", [], [], [], 1, {"number": len(made)}).save(Path(body["out"]))

    monkeypatch.setattr(tracing, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(tracing.trace_workers, "run", run_process)
    request = tracing.TraceRequest(config_file.resolve(config_file.find("debug_cpu", ROOT / "configs")), 320, "cpu")
    assert tracing.trace_step(request).notes == tracing.trace_step(request).notes == {"number": 1}
    kept = Path(made[0])
    kept.write_bytes(damage(kept.read_bytes()))
    assert tracing.trace_step(request).notes == {"number": 2}
    kept.write_bytes(damage(kept.read_bytes()))
    assert tracing.kept(request) is None and not kept.exists()
