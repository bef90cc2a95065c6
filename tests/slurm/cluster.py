"""A real Slurm cluster of virtual nodes on this machine, for tests: started and stopped in seconds, with everything in one folder.

One slurmd per virtual node, each on its own port; a munged of its own on a socket in the folder, so that nothing of the machine's own
configuration is read or changed. Needs root and the Debian packages slurmctld, slurmd, slurm-client, slurm-wlm-basic-plugins, munge.

Try alone: ``python -m tests.slurm.cluster`` brings one up, shows it, and takes it down.
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

PACKAGES = "slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge"
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
NODES = 2
PR_SET_PDEATHSIG = 1

# AuthInfo cred_expire: a requeued job waits that long, 120 s by default; 5 is the least that Slurm takes.
# ReturnToService=1: a node that was lost comes back with its slurmd; one that somebody set DOWN stays so, though its slurmd lives. With 2
# it is back in milliseconds, still ending the job that Slurm then gives it again: "already running, do not launch second copy", and Slurm
# drains the node and holds the job (launch_failed_requeued_held).
# CgroupPlugin v1 starts everywhere as long as nothing uses it; "autodetect" dies where /sys/fs/cgroup is missing or mixed.
CONF = """
ClusterName=longstride
SlurmctldHost=localhost
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdTimeout={slurmd_seconds}
ReturnToService=1
MailProg=/bin/true
JobRequeue=1
KillWait=30
MinJobAge=600
TCPTimeout=5
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=100000,batch_sched_delay=0,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{accounting}
NodeName=n[1-{nodes}] NodeHostname=localhost Port=[{first_port}-{last_port}] CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=low  Nodes=n[1-{nodes}] PriorityTier=1  PreemptMode=REQUEUE GraceTime={grace} MaxTime=INFINITE Default=YES State=UP
PartitionName=high Nodes=n[1-{nodes}] PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


NO_ACCOUNTING = "AccountingStorageType=accounting_storage/none\nJobAcctGatherType=jobacct_gather/none"


class CannotStart(Exception):
    """Why there is no cluster here."""


class Cluster:
    """A running cluster. Give ``env`` to commands that talk to it."""

    def __init__(self, grace_seconds: int = 15, slurmd_seconds: int = 300) -> None:
        """``grace_seconds``: between preemption and the end. ``slurmd_seconds``: without a word from a node until it counts as lost."""
        self.folder = folder = Path(tempfile.mkdtemp(prefix="longstride-slurm-"))
        folder.chmod(0o711)  # munged wants its socket where everybody may reach it
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCH}
        self._processes: list[psutil.Process] = []
        self._grace, self._slurmd_seconds = grace_seconds, slurmd_seconds

    def up(self) -> None:
        """Start everything; raises CannotStart with the reason."""
        missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name, path=SEARCH) is None]
        if missing:
            raise CannotStart(f"{', '.join(missing)} not installed: apt-get install --no-install-recommends {PACKAGES}")
        if os.geteuid() != 0:
            raise CannotStart("slurmd needs root")
        self._write_files()
        self._munged()
        self._before_controller()
        self._daemon("slurmctld", [])
        for node in range(1, NODES + 1):
            self.start_node(f"n{node}")
        self._until(lambda: self.run("sinfo", "-h", "-N", "-t", "idle", "-p", "low", "-o", "%N").split() == ["n1", "n2"], "idle nodes")

    def down(self) -> None:
        """End all jobs and daemons; what does not go is killed. Nothing is left running."""
        with contextlib.suppress(Exception):
            self.run("scancel", "--user", getpass.getuser())
            self._until(lambda: not self.run("squeue", "-h").strip(), "an empty queue", seconds=15)
        for process in reversed(self._processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in [*process.children(recursive=True), process]:
                    each.send_signal(signal.SIGTERM)
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
                process.wait(timeout=5)
        for process in psutil.process_iter(["name", "cwd"]):  # steps that outlived their slurmd; they have no environment
            if process.info["name"] == "slurmstepd" and (process.info["cwd"] or "").startswith(str(self.folder)):
                process.kill()
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _before_controller(self) -> None:
        """Start what the controller needs."""

    def start_node(self, node: str) -> None:
        """Start the slurmd of a virtual node."""
        self._daemon("slurmd", ["-N", node], f"slurmd-{node}")

    def lose_node(self, node: str) -> None:
        """What a power failure does to a node: its slurmd, its steps and all that they run are gone, and nobody says so."""
        slurmd = next(process for process in self._processes if process.cmdline()[-2:] == ["-N", node])
        slurmd.kill()
        slurmd.wait()
        self._processes.remove(slurmd)
        while found := self._of_node(node):  # what one of them still started is found the next time
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def _of_node(self, node: str) -> list[psutil.Process]:
        """All that runs on a virtual node, and the slurmstepd above it."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter(["environ", "status"]):
            env = process.info["environ"] or {}
            if process.info["status"] == psutil.STATUS_ZOMBIE or env.get("SLURM_CONF") != self.env["SLURM_CONF"]:
                continue
            if env.get("SLURMD_NODENAME") == node:
                with contextlib.suppress(psutil.NoSuchProcess):
                    found[process.pid] = process
                    if (above := process.parent()) is not None and above.name() == "slurmstepd":
                        found[above.pid] = above
        return list(found.values())

    def run(self, *command: str) -> str:
        """Output of one of Slurm's commands; raises CalledProcessError."""
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=30, check=True).stdout

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self._shown(job, "JobState")

    def restarts(self, job: str) -> int:
        """How often the job was requeued."""
        return int(self._shown(job, "Restarts"))

    def _shown(self, job: str, name: str) -> str:
        words = self.run("scontrol", "show", "job", "-o", job).split()
        return next(word.split("=", 1)[1] for word in words if word.startswith(f"{name}="))

    def _write_files(self) -> None:
        ports = list(_free_ports(2 + NODES))
        for name in ("state", *(f"spool-n{node}" for node in range(1, NODES + 1))):
            (self.folder / name).mkdir()
        conf = CONF.format(
            folder=self.folder, user=getpass.getuser(), nodes=NODES, ctld_port=ports[0], first_port=ports[1], last_port=ports[NODES],
            grace=self._grace, slurmd_seconds=self._slurmd_seconds, accounting=self._accounting(ports[-1]),
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)

    def _accounting(self, port: int) -> str:
        """What slurm.conf says of accounting; ``port`` is for slurmdbd."""
        return NO_ACCOUNTING

    def _munged(self) -> None:
        files = {
            "socket": "munge.sock",
            "key-file": "munge.key",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "munge.seed",
        }
        options = [f"--{name}={self.folder / file}" for name, file in files.items()]
        self._start(["munged", "--foreground", *options])
        self._until(lambda: (self.folder / "munge.sock").exists(), "munged's socket")

    def _daemon(self, name: str, options: list[str], log: str | None = None) -> None:
        self._start([name, "-D", *options])
        self._until((self.folder / f"{log or name}.log").exists, f"{name}'s log")

    def _start(self, command: list[str]) -> None:
        # A session of its own: Ctrl-C on the tests must not end it before the jobs are cleaned up.
        with (self.folder / "output.log").open("ab") as output:
            started = subprocess.Popen(
                command, env=self.env, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                preexec_fn=_end_with_parent,
            )  # fmt: skip
        self._processes.append(psutil.Process(started.pid))

    def _until(self, condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):
                if condition():
                    return
            ended = [process.pid for process in self._processes if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE]
            if ended or time.monotonic() > deadline:
                logs = "\n".join(f"{log.name}: {log.read_text()[-800:]}" for log in sorted(self.folder.glob("*.log")))
                raise CannotStart(f"no {what}; {'a daemon has ended' if ended else f'{seconds:.0f} s passed'}\n{logs}")
            time.sleep(0.1)


def _end_with_parent() -> None:
    """Tests that are killed leave no daemons behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _free_ports(count: int) -> Iterator[int]:
    """Ports in a row that nobody listens on, below those that the kernel gives to clients."""
    for first in range(17000 + os.getpid() % 1000 * 8, 32000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        yield from range(first, first + count)
        return
    raise CannotStart("no free ports")


if __name__ == "__main__":
    cluster = Cluster()
    try:
        cluster.up()
        print(cluster.run("sinfo", "-N", "-l"))
    finally:
        cluster.down()
