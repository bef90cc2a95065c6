"""Stop signals set a flag, any number of times, and ranks agree."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.distributed import run_distributed
from trainer.preemption import StopRequest, StopSignal

ROOT = Path(__file__).resolve().parents[2]

LOOP = """
import sys, time
from trainer.preemption import StopSignal
with StopSignal(force_after_seconds=float(sys.argv[1])) as stop:
    print("ready", flush=True)
    steps = 0
    while not stop.signal_number or "on" in sys.argv:
        time.sleep(0.02); steps += 1
        if stop.signal_number: print("flag", stop.signal_number, flush=True)
    time.sleep(0.3)
    print("saved", stop.signal_number, "torch" in sys.modules, flush=True)
"""


def start(*arguments: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_each_signal_sets_the_flag_and_repeats_change_nothing(number):
    process = start("60")
    for _ in range(20):
        process.send_signal(number)
    time.sleep(0.1)  # of two signals pending at once the smaller number is delivered first
    process.send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=20)
    assert output.splitlines()[-1] == f"saved {int(number)} False"
    assert process.returncode == 0, errors


def test_the_first_signal_wins():
    process = start("60")
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert output.splitlines()[-1] == f"saved {int(signal.SIGUSR1)} False"


def test_a_person_can_leave_by_a_later_second_interrupt_only():
    process = start("0.5", "on")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "flag 2\n"
    process.send_signal(signal.SIGINT)  # the launcher's echo of the same Ctrl-C
    time.sleep(0.2)
    assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)  # never forces
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in errors


def test_a_signal_that_the_shell_had_ignored_is_caught():
    command = f"trap '' USR1; exec {sys.executable} -c '{LOOP}' 60"
    process = subprocess.Popen(["bash", "-c", command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=20)
    assert f"saved {int(signal.SIGUSR1)}" in output


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with StopSignal() as stop:
        assert signal.getsignal(signal.SIGTERM) == stop._handle
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_one_process_agrees_with_itself():
    with StopSignal() as stop:
        assert not stop.agreed()
        assert stop.agreed(failed=True) == StopRequest(0, True)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed() == StopRequest(signal.SIGTERM, False)
        assert stop.agreed().reason == "stopped by SIGTERM"


def test_the_poll_hook_stands_in_for_a_signal(tmp_path):
    flag = tmp_path / "flag"
    stop = StopSignal(poll=lambda: signal.SIGUSR1 if flag.exists() else 0)
    assert not stop.agreed()
    flag.touch()
    assert stop.agreed().signal_number == signal.SIGUSR1
    flag.unlink()
    assert stop.agreed().signal_number == signal.SIGUSR1, "a request is not taken back"


def _agree() -> list[tuple[int, bool]]:
    rank, answers = dist.get_rank(), []
    own = dist.new_group(backend="gloo")
    with StopSignal() as stop:
        answers.append(stop.agreed())
        answers.append(stop.agreed(failed=rank == 2))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        answers.append(stop.agreed(own))
        if rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        answers.append(stop.agreed())
    return [(answer.signal_number, answer.failed) for answer in answers]


def test_all_ranks_agree_at_the_same_step():
    answers = run_distributed(_agree, 3)
    assert answers[0] == [(0, False), (0, True), (signal.SIGUSR1, False), (signal.SIGTERM, False)]
    assert answers[1] == answers[2] == answers[0]
