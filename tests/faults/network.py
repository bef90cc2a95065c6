"""The network between ranks is cut: two machines are two network namespaces on a pair of virtual cables, and one of these goes down.

Packets are lost without a word then, as when a switch dies: no connection is reset. Needs root and iproute2. Run by ``python -m
tests.faults``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.distributed import run_distributed
from tests.faults.file_systems import root
from tests.slurm.test_on_a_cluster import ranks
from tests.test_front_door import CLEAN, ROOT, records
from tests.trainer.guarded_run import go_on, make_run, trajectory
from trainer.run_dir import RunDir

pytestmark = pytest.mark.timeout(900)
STEPS = 300


@contextmanager
def two_machines() -> Iterator[tuple[str, str]]:
    """Names of two network namespaces, 10.77.0.1 and 10.77.0.2, in each the interface ``cable``."""
    names = tuple(f"longstride-{os.getpid()}-{side}" for side in "ab")
    made = []
    try:
        for name in names:
            root("ip", "netns", "add", name)
            made.append(name)
        first, second = names
        root("ip", "-n", first, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", second)
        for number, name in enumerate(names, start=1):
            root("ip", "-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
            for link in ("lo", "cable"):
                root("ip", "-n", name, "link", "set", link, "up")
        yield first, second
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def attempt(machines: tuple[str, str], run_dir: RunDir, number: int) -> list[subprocess.Popen[bytes]]:
    """One attempt of a job, by the commands that its script runs on each node."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=0"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-id=cut.{number}", "--rdzv-endpoint=10.77.0.1:29577", "--signals-to-handle=SIGQUIT"]
    rank = [str(ROOT / "longstride.py"), "_job_rank", str(run_dir.path), str(number), str(run_dir.path / "flag")]
    env = {**CLEAN, "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
    agents = []
    with (run_dir.path / f"attempt_{number}.log").open("wb") as log:
        for node, name in enumerate(machines, start=1):
            # Both have the host name of this machine, by which torchrun would know who holds the store.
            here = [f"--rdzv-conf=is_host={int(node == 1)}", f"--local-addr=10.77.0.{node}"]
            command = ["ip", "netns", "exec", name, *torchrun, *here, *rank]
            agents.append(subprocess.Popen(command, cwd=run_dir.path.parent, env=env, stdout=log, stderr=log, start_new_session=True))
    return agents


def test_the_network_between_ranks_is_cut(tmp_path: Path) -> None:
    """Every rank ends by itself within the limit, saying where it waits; the next attempt goes on, bit for bit."""
    settings = ["parallel.cp=2", f"train.steps={STEPS}", "checkpoint.save_every_steps=20"]
    run_dir = make_run(tmp_path, "cut", *settings, "guards.hang_min_seconds=8", "guards.hang_times_median=3")
    with two_machines() as machines:
        agents = attempt(machines, run_dir, 1)
        try:
            wait(lambda: [record["step"] for record in records(run_dir.path)][-1:] >= [50], "step 50", run_dir)
            root("ip", "-n", machines[1], "link", "set", "cable", "down")
            wait(lambda: not ranks(run_dir), "end of the ranks", run_dir)
            for agent in agents:  # as Slurm does with the tasks beside one that failed (srun --kill-on-bad-exit)
                agent.terminate()
            codes = [agent.wait(timeout=60) for agent in agents]
            assert all(codes), codes
            logs = [(run_dir.log(rank, 1)).read_text() for rank in range(2)]
            assert all("error: " in log for log in logs) and any("error: hung: no step for" in log for log in logs), logs
            root("ip", "-n", machines[1], "link", "set", "cable", "up")
            agents = attempt(machines, run_dir, 2)
            assert [agent.wait(timeout=500) for agent in agents] == [0, 0], (run_dir.path / "attempt_2.log").read_text()[-3000:]
        finally:
            for agent in agents:
                for each in [*psutil.Process(agent.pid).children(recursive=True), agent] if agent.poll() is None else []:
                    each.kill()
            for rank in ranks(run_dir):
                rank.kill()
    assert "resumed from step_" in run_dir.log(0, 2).read_text()
    whole = make_run(tmp_path, "whole", *settings)
    assert run_distributed(go_on, 2, str(whole.path), timeout=600) == ["", ""]
    assert trajectory(run_dir) == trajectory(whole) and len(trajectory(whole)) == STEPS


def wait(condition: Callable[[], bool], what: str, run_dir: RunDir) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        logs = "\n".join(f"--- {log}\n{log.read_text()[-2000:]}" for log in run_dir.path.rglob("*.log"))
        assert time.monotonic() < deadline, f"no {what}\n{logs}"
        time.sleep(0.2)
