"""What a job that resumes by itself looks like: bring up a Slurm of two virtual nodes, submit, interrupt, watch it go on, take Slurm down.

usage: python scripts/slurm_demo.py [CONFIG] [key=value ...]      default: quickstart on two nodes with one rank each
Needs root and Slurm's Debian packages (``make slurm-demo`` installs them). Nothing of the machine's own Slurm is read or changed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.slurm.cluster import CannotStart, Cluster  # noqa: E402

SITE = "rendezvous_host: 127.0.0.1\nexport: [HOME, PATH]\n"
STEPS_BEFORE = 3
"""Steps that the run makes before it is interrupted."""


def main(config: str, overrides: list[str]) -> int:
    """Returns the exit code: 0 when the interrupted run has finished."""
    cluster = Cluster()
    with tempfile.TemporaryDirectory(prefix="longstride-site-") as folder:
        (Path(folder) / "longstride").mkdir()
        (Path(folder) / "longstride" / "site.yaml").write_text(SITE)
        env = {**cluster.env, "XDG_CONFIG_HOME": folder}
        try:
            say("bringing up Slurm with two virtual nodes")
            cluster.up()
            return show(cluster, env, config, overrides)
        except CannotStart as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        finally:
            say("taking Slurm down")
            cluster.down()


def show(cluster: Cluster, env: dict[str, str], config: str, overrides: list[str]) -> int:
    """Submit, interrupt, wait for the end."""
    name = f"slurm-demo-{time.strftime('%Y%m%d-%H%M%S')}"
    if longstride(env, "submit", config, f"run.name={name}", *overrides, "--device", "cpu", "--nodes", "2", "--time", "4:00:00"):
        return 1
    run = Path("runs") / name
    job = json.loads((run / "slurm" / "submission.json").read_text())["job_id"]
    wait(cluster, job, lambda: steps(run) >= STEPS_BEFORE)
    longstride(env, "runs", name)
    say("Slurm warns of the time limit (scancel --batch --signal=USR1): the run saves, and the job is requeued")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait(cluster, job, lambda: cluster.restarts(job) == 1)
    longstride(env, "runs", name)
    say("it goes on by itself")
    wait(cluster, job, lambda: cluster.state(job) == "COMPLETED")
    longstride(env, "runs", name)
    print((run / "slurm" / f"job_{job}.log").read_text())
    return 0


def wait(cluster: Cluster, job: str, condition: Callable[[], bool]) -> None:
    """Until ``condition``; raises CannotStart when the job has failed."""
    while not condition():
        state = cluster.state(job)
        if state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL") and not condition():
            raise CannotStart(f"the job ended as {state} too early to show anything; its log is in runs/")
        time.sleep(0.5)


def steps(run: Path) -> int:
    """Lines of metrics so far."""
    return len((run / "metrics.jsonl").read_bytes().splitlines()) if (run / "metrics.jsonl").exists() else 0


def longstride(env: dict[str, str], *arguments: str) -> int:
    """Run the command as a person would; its exit code."""
    print(f"$ longstride {' '.join(arguments)}", flush=True)
    return subprocess.run([sys.executable, str(ROOT / "longstride.py"), *arguments], env=env).returncode


def say(text: str) -> None:
    """A line between the commands."""
    print(f"--- {text}", flush=True)


if __name__ == "__main__":
    os.environ.pop("SLURM_CONF", None)
    words = sys.argv[1:]
    named = words[:1] if words and "=" not in words[0] else ["quickstart"]
    sys.exit(main(named[0], words[1:] if words[:1] == named else words))
