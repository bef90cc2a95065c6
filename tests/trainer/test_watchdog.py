"""The watchdog: its limit, and ranks that really hang."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from parallel.launcher import HUNG
from tests.test_front_door import CLEAN, COMMAND, tiny, wait_for_step
from trainer.watchdog import Watchdog

ROOT = Path(__file__).resolve().parents[2]


def test_the_limit_follows_the_median_and_never_falls_below_the_minimum() -> None:
    now = [0.0]
    dog = Watchdog(10, 60, clock=lambda: now[0])
    assert dog.limit == 180, "nothing is known of the first steps"
    dog.beat(step_seconds=30)
    assert dog.limit == 300
    for seconds in (1, 1, 1, 1):
        dog.beat(step_seconds=seconds)
    assert dog.limit == 60
    for _ in range(10):
        dog.beat(step_seconds=20)
    assert dog.limit == 200
    now[0] += 200
    assert dog.overdue() == ""
    now[0] += 1
    assert dog.overdue() == "no step for 201 s (the limit is 200 s, the median step takes 20 s)"
    dog.beat(long=True)
    assert dog.limit == 300 and dog.overdue() == "", "a save may take longer than a step"


HANGING = """
import sys, threading, time
from pathlib import Path
from parallel.launcher import own_log
from trainer.watchdog import Watchdog
def stuck_in_a_collective(): time.sleep(60)
def stuck_in_a_save(): time.sleep(60)
def tell(reason):
    Path(sys.argv[1]).write_text(reason)
    time.sleep(60)  # a file system that hangs
if __name__ == "__main__":
    with own_log(Path(sys.argv[1] + ".log")), Watchdog(1.0, 0.2, tell, peers_seconds=0.0) as dog:
        threading.Thread(target=stuck_in_a_save, daemon=True).start()
        for _ in range(30):
            time.sleep(0.01)
            dog.beat(step_seconds=0.01)
        stuck_in_a_collective()
"""


def test_a_hung_process_says_where_and_ends(tmp_path: Path) -> None:
    began = time.monotonic()
    command = [sys.executable, "-c", HANGING, str(tmp_path / "reason")]
    full, end = os.pipe()  # a log that cannot be written to, as on a file system that hangs
    os.set_blocking(end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(end, bytes(4096))
    os.set_blocking(end, True)
    unheard = subprocess.Popen([*command[:-1], str(tmp_path / "unheard")], cwd=ROOT, stderr=end)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
        assert unheard.wait(timeout=50) == HUNG, "nobody reads what it would say"
    finally:
        unheard.kill()
        os.close(full)
        os.close(end)
    assert done.returncode == HUNG and time.monotonic() - began < 45
    for words in ("error: hung: no step for", "stuck_in_a_collective", "stuck_in_a_save"):
        assert words in done.stderr and words in (tmp_path / "reason.log").read_text()
    assert (tmp_path / "reason").read_text().startswith("hung: no step for")


def test_none_when_switched_off_and_none_left_behind() -> None:
    with Watchdog(0, 0.1) as dog:
        time.sleep(0.5)
        assert dog.overdue(), "it is only not watched"
    import threading

    with Watchdog(1, 100):
        assert "watchdog" in {thread.name for thread in threading.enumerate()}
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_a_rank_that_stands_still_ends_the_run_with_the_stack_of_its_peer(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{n} " + "to be or not to be " * 20}) + "\n" for n in range(40)))
    limits = ["guards.hang_min_seconds=6", "guards.hang_times_median=3", "memory.plan=estimate"]
    arguments = tiny("still", "train.steps=1000000", "parallel.cp=2", *limits)
    process = subprocess.Popen([*COMMAND, *arguments], cwd=tmp_path, env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run_dir = tmp_path / "runs" / "still"
    wait_for_step(process, run_dir, 5)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "_rank" in child.cmdline()]
    next(child for child in ranks if child.environ()["RANK"] == "1").suspend()
    _, err = process.communicate(timeout=120)
    assert process.returncode == HUNG, err
    assert "rank 0 of 2 hung and was ended by its watchdog" in err
    state = json.loads((run_dir / "state.json").read_text())
    assert state["status"] == "failed" and "hung: no step for" in state["reason"]
    log = (run_dir / "logs" / "rank_0.log").read_text()
    assert "error: hung: no step for" in log and "forward_backward" in log
    assert not [child for child in ranks if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
