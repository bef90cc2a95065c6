"""What is the same for every job of a cluster: ``~/.config/longstride/site.yaml``. Imports no torch.

A value given on the command line wins. Secrets have no place in it: what Slurm exports, and what stands in a script, other people
and backups can read.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated

from platformdirs import user_config_dir
from pydantic import Field, ValidationError, field_validator

from models.config import PositiveInt, Section
from models.errors import UserError
from trainer.config_file import describe, read_mapping

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET = re.compile(
    r"TOKEN(?!IZER|_PATH)|SECRET|PASSW|CREDENTIAL|PRIVATE|API_?KEY|ACCESS_KEY|_KEY$|^KEY$|AUTH(?!ORS?$|_SOCK)", re.IGNORECASE
)
"""Names of variables that hold secrets as a rule."""
ASSIGNED = re.compile(r"(?:^|[\s;&(])([A-Za-z_][A-Za-z0-9_]*)=(?![\"']?\$(?!\{\w+:?[-=][^}$])|\s|$)")
"""Variables that a line of bash gives a value that stands in it, if only in case there is no other: ``${NAME:-value}``."""
OF_SITE = {
    "--partition": "partition", "--account": "account", "--qos": "qos", "--time": "time", "--mem": "mem", "--export": "export",
    "--cpus-per-task": "cpus_per_node", "--signal": "warn_seconds",
}  # fmt: skip
"""Options of sbatch that have a key of their own: among ``sbatch`` they would win over the command line, or be lost."""
OF_JOB = (
    "--job-name", "--comment", "--nodes", "--ntasks", "--ntasks-per-node", "--array", "--dependency", "--requeue", "--no-requeue",
    "--open-mode", "--chdir", "--output",
)  # fmt: skip
"""Options that every job has from what is submitted."""


class Site(Section):
    """Defaults of one cluster."""

    device: str | None = None
    """What the nodes compute on, as for longstride plan --device: h100, a100, cpu, ..."""
    ranks_per_node: PositiveInt | None = None
    """Ranks on one node where --nodes is not given: GPUs of a node."""
    partition: str | None = None
    """sbatch --partition."""
    account: str | None = None
    """sbatch --account."""
    qos: str | None = None
    """sbatch --qos."""
    time: str | None = None
    """sbatch --time."""
    cpus_per_node: PositiveInt | None = None
    """sbatch --cpus-per-task, of the one task on each node."""
    mem: str | None = None
    """sbatch --mem, per node."""
    sbatch: tuple[str, ...] = ()
    """Further options, one each: "--constraint=h100"."""
    modules: tuple[str, ...] = ()
    """Environment modules to load; a job whose modules do not load fails before it starts."""
    environment: dict[str, str] = {}
    """Variables set in the job. No secrets: they would be written into the run directory."""
    export: tuple[str, ...] = ("HOME", "USER", "LANG", "PATH")
    """Names of the variables that sbatch takes along from where longstride submit is called; nothing else is."""
    setup: tuple[str, ...] = ()
    """Lines of bash, run as they are on the first node before training; "source ~/.secrets" is the place for tokens."""
    node_check: bool = True
    """Look at every node before training: devices, free memory, disk, bandwidth, clock. A node that is not fit is left out."""
    health: tuple[str, ...] = ()
    """Lines of bash that have to succeed on every node too, such as "dcgmi diag -r 1"."""
    rendezvous_host: str | None = None
    """Name by which all nodes reach the first one; null: its own host name."""
    warn_seconds: PositiveInt = 120
    """How long before the time limit the run is saved and requeued; at least twice a step and a save."""
    idle_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """Attempts in a row without a new checkpoint after which a run is no longer requeued."""

    @field_validator("environment", "export")
    @classmethod
    def _check_names(cls, names: dict[str, str] | tuple[str, ...]) -> dict[str, str] | tuple[str, ...]:
        for name in names:
            if not VARIABLE.fullmatch(name):
                raise ValueError(f"'{name}' is not the name of a variable")
            if SECRET.search(name):
                raise ValueError(
                    f"{name} looks like a secret, and others can read Slurm's records; load it in the job: setup: [source FILE]"
                )
        return names

    @field_validator("sbatch")
    @classmethod
    def _check_options(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            if not re.fullmatch(r"--[a-z][a-z0-9-]*(=.*)?", option):
                raise ValueError(f"'{option}' is not an option such as --constraint=h100")
            name = option.split("=")[0]
            if name in OF_SITE:
                raise ValueError(f"{name} has a key of its own: {OF_SITE[name]}")
            if name in OF_JOB:
                raise ValueError(f"{name} follows from what is submitted, and cannot be set here")
        return options

    @field_validator("setup", "health")
    @classmethod
    def _check_lines(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        secret = next((name for line in lines for name in ASSIGNED.findall(line) if SECRET.search(name)), None)
        if secret is not None:
            raise ValueError(
                f"{secret} looks like a secret, and what stands here stands in the job's script; keep it in a file that only you can read: "
                "setup: [source FILE]"
            )
        return lines


def site_path() -> Path:
    """Where a user's defaults are looked for."""
    return Path(user_config_dir("longstride")) / "site.yaml"


def read_site(path: Path | None = None) -> Site:
    """The settings of ``path`` (None: the user's own file, if there is one). Raises UserError naming file and key."""
    if path is None:
        path = site_path()
        if not path.exists():
            return Site()
    values = read_mapping(path)
    try:
        return Site.model_validate({key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            close = difflib.get_close_matches(key, Site.model_fields, n=1)
            said = f"unknown key '{key}'" + (f"; did you mean '{close[0]}'?" if close else f"; known keys: {', '.join(Site.model_fields)}")
        else:
            said = describe(key, first)
        raise UserError(f"{path}: {said}") from None
