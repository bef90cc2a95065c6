"""The batch script of a run: one template, and every value in it quoted so that it is data to Slurm and to bash. Imports no torch."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from models.errors import UserError
from slurm.site import Site
from slurm.submission import comment_of

TEMPLATE = Path(__file__).with_name("job.sbatch")
MODULE_INITS = (
    '"${MODULESHOME:-}/init/bash"',
    '"${LMOD_PKG:-}/init/bash"',
    "/etc/profile.d/lmod.sh",
    "/etc/profile.d/z00_lmod.sh",
    "/etc/profile.d/modules.sh",
    "/usr/share/lmod/lmod/init/bash",
    "/usr/share/modules/init/bash",
)
"""Where ``module`` comes from in a shell that is no login shell and was not given the submitter's functions."""
_PLACE = re.compile(r"@([A-Z_]+)@")


@dataclass(frozen=True)
class Job:
    """One submission: what is asked of Slurm, and what runs. Text may hold anything but control characters."""

    name: str
    token: str
    """Stands in the job's comment: job ids are given again, this is not."""
    run: Path
    """Absolute path of the run directory."""
    longstride: Path
    """longstride.py of the code that runs."""
    python: str
    submit_dir: Path
    """Where relative paths of the settings begin."""
    nodes: int
    ranks_per_node: int
    gpus: bool
    time: str | None = None
    partition: str | None = None
    qos: str | None = None
    account: str | None = None
    dependency: str | None = None
    cpus_per_node: int | None = None
    mem: str | None = None
    tasks: int = 0
    """Of a job array; task i runs the run in ``run``-i with the code in it. 0: no array."""
    at_once: int | None = None
    """Tasks of the array that run at the same time at most."""


def render(job: Job, site: Site) -> str:
    """The script. Raises UserError for a value with control characters."""
    values = {
        "DIRECTIVES": "\n".join(f"#SBATCH {line}" for line in _directives(job, site)),
        "RUN": _word("run directory", f"{job.run}-") + '"$SLURM_ARRAY_TASK_ID"' if job.tasks else _word("run directory", str(job.run)),
        "LONGSTRIDE": '"$run/code/longstride.py"' if job.tasks else _word("code", str(job.longstride)),
        "GPUS": str(job.ranks_per_node if job.gpus else 0),
        "PYTHON": _word("python", job.python),
        "SUBMIT_DIR": _word("working directory", str(job.submit_dir)),
        "RANKS_PER_NODE": str(job.ranks_per_node),
        "RENDEZVOUS_HOST": '"$(hostname)"' if site.rendezvous_host is None else _word("site.rendezvous_host", site.rendezvous_host),
        "SETUP": "\n".join(_setup(site)),
    }
    return _PLACE.sub(lambda place: values[place[1]], TEMPLATE.read_text())


def directive(option: str, value: str) -> str:
    """``--option="value"`` as Slurm reads it behind #SBATCH: in double quotes, where a backslash takes the next character as it is."""
    escaped = re.sub(r'(["\\])', r"\\\1", _printable(option, value))
    return f'{option}="{escaped}"'


def _directives(job: Job, site: Site) -> list[str]:
    lines = [
        directive("--job-name", job.name),
        directive("--comment", comment_of(job.token)),
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
    ]
    if job.gpus:
        lines.append(f"--gpus-per-node={job.ranks_per_node}")
    if job.cpus_per_node is not None:
        lines.append(f"--cpus-per-task={job.cpus_per_node}")
    asked = {
        "--mem": job.mem,
        "--time": job.time,
        "--partition": job.partition,
        "--qos": job.qos,
        "--account": job.account,
        "--dependency": job.dependency,
    }
    lines += [directive(option, value) for option, value in asked.items() if value is not None]
    if job.tasks:
        lines.append(f"--array=0-{job.tasks - 1}" + (f"%{job.at_once}" if job.at_once is not None else ""))
    lines += [directive(*option.split("=", 1)) if "=" in option else option for option in site.sbatch]
    lines += [
        f"--signal=B:USR1@{site.warn_seconds}",
        "--requeue",
        "--open-mode=append",
        directive("--chdir", str(job.run.parent if job.tasks else job.run)),
        directive("--output", _output(job.run, array=bool(job.tasks))),
        directive("--export", ",".join(site.export) or "NONE"),
    ]
    return lines


def _output(run: Path, array: bool) -> str:
    """The pattern of the script's log. Slurm fills %x and the like wherever they stand in the path; the job's name is not in it: there
    a name would be a path."""
    if "\\" in str(run):
        raise UserError(f"run directory {run}: Slurm cannot write its log below a name with a backslash; choose another run.root")
    place = str(run).replace("%", "%%")
    return f"{place}-%a/slurm/job_%A_%a.log" if array else f"{place}/slurm/job_%j.log"


def _setup(site: Site) -> list[str]:
    lines = []
    if site.modules:
        lines.append(f"command -v module >/dev/null || for init in {' '.join(MODULE_INITS)}; do")
        lines.append('    if [ -r "$init" ]; then . "$init"; break; fi')
        lines.append("done")
        modules = [_word("site.modules", module) for module in site.modules]
        lines += [f"module load {module} || {{ say cannot load module {module}; exit 1; }}" for module in modules]
    lines += [f"export {name}={_word(f'site.environment.{name}', value)}" for name, value in site.environment.items()]
    lines += [_printable("site.setup", line) for line in site.setup]
    # What clusters and people write reads variables that are not set.
    return ["set +u", *lines, "set -u"] if lines else [": # site.yaml names no modules, environment or setup"]


def _word(name: str, value: str) -> str:
    """One word of bash."""
    return shlex.quote(_printable(name, value))


def _printable(name: str, value: str) -> str:
    if not value.isprintable():
        raise UserError(f"{name}: {value!r} holds a line break or another character that cannot stand in a job script; choose another")
    return value
