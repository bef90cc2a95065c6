"""The local launcher with a worker that trains nothing: exit codes, signals, killed ranks, a killed launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from models.errors import UserError
from parallel.distributed import Accelerate, Env, check_launch, environment, threads_for

ROOT = Path(__file__).resolve().parents[1]

LAUNCH = """
    import os, sys
    from pathlib import Path
    from models.errors import UserError
    from parallel.launcher import launch_local

    folder = Path(sys.argv[1])
    command = [sys.executable, str(folder / "worker.py"), str(os.getpid()), str(folder)]
    logs = [folder / f"rank_{rank}.log" for rank in range(2)]
    try:
        sys.exit(launch_local(command, logs, 1, 2.0, lambda line: print(line, file=sys.stderr)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
"""

JOIN = """
    import os, signal, subprocess, sys, time
    from pathlib import Path
    from parallel.distributed import environment
    from parallel.launcher import FORWARDED, join_launcher

    folder, env = Path(sys.argv[2]), environment()
    log = join_launcher(int(sys.argv[1]), env.rank, folder / f"rank_{env.rank}.log")
    caught = []

    def take_signals():
        for number in FORWARDED:
            signal.signal(number, lambda number, frame: caught.append(signal.Signals(number).name))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)

    def ready():
        (folder / f"pid_{env.rank}.tmp").write_text(str(os.getpid()))
        (folder / f"pid_{env.rank}.tmp").rename(folder / f"pid_{env.rank}")

    def wait_for_signal():
        deadline = time.monotonic() + 60
        while not caught and time.monotonic() < deadline:
            time.sleep(0.01)
"""


class Launch:
    """A launcher in its own process with two workers that run ``body``."""

    def __init__(self, folder: Path, body: str) -> None:
        self.folder = folder
        (folder / "worker.py").write_text(textwrap.dedent(JOIN) + textwrap.dedent(body))
        (folder / "launch.py").write_text(textwrap.dedent(LAUNCH))
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "launch.py"), str(folder)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def pids(self) -> list[int]:
        """Process ids of the ranks, once both are ready."""
        files = [self.folder / f"pid_{rank}" for rank in range(2)]
        wait_until(lambda: all(file.exists() for file in files) or self.process.poll() is not None)
        return [int(file.read_text()) for file in files]

    def end(self) -> tuple[int, str, str]:
        """Exit code, output and errors."""
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err

    def log(self, rank: int) -> str:
        return (self.folder / f"rank_{rank}.log").read_text()


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[[str], Launch]]:
    launches: list[Launch] = []

    def start(body: str) -> Launch:
        launches.append(Launch(tmp_path, body))
        return launches[-1]

    yield start
    for started in launches:
        if started.process.poll() is None:
            started.process.kill()
            started.process.communicate()


def test_ranks_are_connected_and_logged(launch: Callable[[str], Launch]) -> None:
    started = launch(
        """
        import torch, torch.distributed as dist
        from parallel.distributed import init_distributed
        init_distributed(env, torch.device("cpu"), 60)
        total = torch.tensor(float(env.rank + 1))
        dist.all_reduce(total)
        print(f"rank {env.rank} of {env.world_size} by {env.launched_by}: {total.item()}, threads {torch.get_num_threads()}")
        os.system("echo from a child of $RANK >&2")
        """
    )
    code, out, err = started.end()
    assert code == 0, err
    assert out == "rank 0 of 2 by longstride: 3.0, threads 1\n"
    assert "from a child" not in err
    for rank in range(2):
        assert f"rank {rank} of 2 by longstride: 3.0" in started.log(rank)
        assert f"from a child of {rank}" in started.log(rank)


CODES = {(0, 0): 0, (75, 75): 75, (75, 0): 75, (0, 3): 1, (3, 75): 1, (2, 2): 2}
"""What two ranks end with, and then the launcher."""

IN_TURN = """
    import json, os, sys
    from pathlib import Path
    from models.errors import UserError
    from parallel.launcher import launch_local

    folder = Path(sys.argv[1])

    def ended(codes):
        own = folder / "_".join(map(str, codes))
        own.mkdir()
        worker = [sys.executable, str(folder / "worker.py"), str(os.getpid()), str(own), *map(str, codes)]
        try:
            return launch_local(worker, [own / f"rank_{rank}.log" for rank in range(2)], 1, 2.0), ""
        except UserError as error:
            return error.exit_code, f"error: {error}"

    print(json.dumps([ended(codes) for codes in json.loads(sys.argv[2])]))
"""


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], tuple[int, str]]:
    """Exit code and message of every case, all launched by one process: what one launch leaves behind would be seen in the next."""
    folder = tmp_path_factory.mktemp("codes")
    body = "print('error: data.path: nothing there', file=log)\nsys.exit(int(sys.argv[3 + env.rank]))\n"
    (folder / "worker.py").write_text(textwrap.dedent(JOIN) + body)
    (folder / "in_turn.py").write_text(textwrap.dedent(IN_TURN))
    command = [sys.executable, str(folder / "in_turn.py"), str(folder), json.dumps(list(CODES))]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, ""), done
    return dict(zip(CODES, map(tuple, json.loads(done.stdout)), strict=True))


@pytest.mark.parametrize("codes", CODES)
def test_exit_codes(ends: dict[tuple[int, int], tuple[int, str]], codes: tuple[int, int]) -> None:
    code, err = ends[codes]
    assert code == CODES[codes]
    if code == 2:
        assert err == "error: data.path: nothing there"
    if code == 1:
        rank = codes.index(3)
        assert f"rank {rank} of 2 ended with exit code 3" in err and f"rank_{rank}.log" in err and "nothing there" in err


def test_logs_are_appended_and_only_the_new_part_is_shown(launch: Callable[[str], Launch], tmp_path: Path) -> None:
    (tmp_path / "rank_1.log").write_text("error: an old story\n")
    started = launch("print('the new story', file=log)\nsys.exit(env.rank)")
    code, _, err = started.end()
    assert code == 1 and "the new story" in err and "old story" not in err
    assert started.log(1) == "error: an old story\nthe new story\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_every_rank_once_and_saving_is_waited_for(launch: Callable[[str], Launch], number: signal.Signals) -> None:
    started = launch(
        """
        take_signals(); ready(); wait_for_signal()
        time.sleep(4)  # saving; longer than a failed rank's peers would get
        print(*caught)
        sys.exit(75)
        """
    )
    started.pids()
    for _ in range(3):
        started.process.send_signal(number)
        time.sleep(0.02)
    code, _, err = started.end()
    assert code == 75, err
    assert err.count(number.name) == 1
    for rank in range(2):
        assert started.log(rank) == f"{number.name}\n"


def test_a_signal_before_ranks_can_take_it_is_neither_lost_nor_fatal(launch: Callable[[str], Launch]) -> None:
    started = launch(
        """
        ready()
        time.sleep(1.5)  # importing torch
        take_signals(); wait_for_signal()
        print(*caught)
        sys.exit(75)
        """
    )
    started.pids()
    started.process.send_signal(signal.SIGUSR1)
    code, _, err = started.end()
    assert code == 75, err
    assert [started.log(rank) for rank in range(2)] == ["SIGUSR1\n", "SIGUSR1\n"]


def test_a_second_ctrl_c_after_a_while_is_handed_on(launch: Callable[[str], Launch]) -> None:
    started = launch(
        """
        take_signals(); ready()
        while len(caught) < 2: time.sleep(0.01)
        sys.exit(130)
        """
    )
    started.pids()
    started.process.send_signal(signal.SIGINT)
    time.sleep(3.3)
    started.process.send_signal(signal.SIGINT)
    _, _, err = started.end()
    assert "KeyboardInterrupt" in err


def test_a_killed_rank_ends_the_others_and_their_children(launch: Callable[[str], Launch]) -> None:
    started = launch(
        """
        take_signals()
        child = subprocess.Popen(["sleep", "300"])
        (folder / f"child_{env.rank}").write_text(str(child.pid))
        print("step 7")
        ready()
        time.sleep(300)
        """
    )
    pids = started.pids()
    began = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    code, _, err = started.end()
    assert code == 1 and time.monotonic() - began < 10
    assert "rank 1 of 2 was killed by SIGKILL (signal 9)" in err and str(started.folder / "rank_1.log") in err and "step 7" in err
    children = [int((started.folder / f"child_{rank}").read_text()) for rank in range(2)]
    wait_until(lambda: all(gone(pid) for pid in [*pids, *children]), 5)


def test_a_killed_launcher_leaves_no_rank(launch: Callable[[str], Launch]) -> None:
    started = launch("take_signals(); ready(); time.sleep(300)")
    pids = started.pids()
    started.process.kill()
    started.process.wait()
    wait_until(lambda: all(gone(pid) for pid in pids), 5)


def test_a_rank_that_stays_behind_is_named(launch: Callable[[str], Launch]) -> None:
    code, _, err = launch("sys.exit(0) if env.rank else time.sleep(300)").end()
    assert code == 1 and "rank 0 of 2 did not end although others had" in err


TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
SRUN = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_ID": "0"}
MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in {"RANK": "0", "LOCAL_RANK": "0", "SIZE": "1", "LOCAL_SIZE": "1"}.items()}
MASTER = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True", "ACCELERATE_DYNAMO_BACKEND": "NO"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Env()),
        (TORCHRUN, Env(1, 1, 2, 2, "environment")),
        ({**TORCHRUN, "TORCHELASTIC_RUN_ID": "none"}, Env(1, 1, 2, 2, "torchrun")),
        ({**SRUN, **MASTER}, Env(3, 1, 4, 2, "srun")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Env()),  # a batch script, not a step
        (
            {
                "OMPI_COMM_WORLD_RANK": "0",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                "OMPI_COMM_WORLD_SIZE": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
            },
            Env(launched_by="mpirun"),
        ),
        ({**TORCHRUN, **ACCELERATE}, Env(1, 1, 2, 2, "accelerate", Accelerate("no", True, False, None))),
        ({**ACCELERATE, **MASTER}, Env(accelerate=Accelerate("no", True, True, None))),
    ],
)
def test_environment(variables: dict[str, str], expected: Env) -> None:
    assert environment(variables) == expected


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, ["MASTER_ADDR", "2 ranks"]),
        ({"RANK": "0"}, ["LOCAL_RANK"]),
        ({**TORCHRUN, "RANK": "two"}, ["RANK='two'"]),
        ({**TORCHRUN, "RANK": "2"}, ["RANK=2", "WORLD_SIZE=2"]),
        (SRUN, ["SLURM_PROCID=3", "4 ranks", "MASTER_ADDR"]),
        ({**TORCHRUN, **ACCELERATE, "ACCELERATE_USE_FSDP": "true"}, ["ACCELERATE_USE_FSDP", "parallel.dp_shard"]),
        ({**TORCHRUN, **ACCELERATE, "ACCELERATE_USE_DEEPSPEED": "true"}, ["ACCELERATE_USE_DEEPSPEED"]),
        ({**ACCELERATE, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, ["ACCELERATE_DYNAMO_BACKEND=INDUCTOR"]),
    ],
)
def test_environments_that_would_train_wrongly_are_refused(variables: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        environment(variables)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("asked", "ranks", "parts"),
    [
        (Accelerate("bf16", False, False, None), 1, ["bf16", "train.precision is fp32", "train.precision=bf16"]),
        (Accelerate("fp16", False, False, None), 1, ["fp16", "--mixed_precision"]),
        (Accelerate("no", True, False, None), 1, ["--cpu", "train.device"]),
        (Accelerate("no", False, False, 4), 1, ["train.grad_accum is 1", "train.grad_accum=4"]),
        (Accelerate("no", False, True, None), 1, ["one that is connected to no other", "parallel.cp"]),
    ],
)
def test_accelerate_against_the_configuration(asked: Accelerate, ranks: int, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check_launch(Env(accelerate=asked), "fp32", "cuda", 1, ranks)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_accelerate_that_agrees_is_honoured() -> None:
    check_launch(Env(accelerate=Accelerate("bf16", True, True, 2)), "bf16", "auto", 2, 2)
    check_launch(Env(accelerate=Accelerate("no", False, False, None)), "bf16", "cuda", 1, 1)


def test_threads_share_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_for(0, 1) == cores
    assert threads_for(0, 4 * cores) == 1
    assert threads_for(3, 2) == 3
