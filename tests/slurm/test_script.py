"""The job script: whatever stands in names, paths and the site file is data to bash; what cannot be data is refused."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.errors import UserError
from slurm.script import Job, directive, render
from slurm.site import Site, read_site

JOB = Job("name", "0123", Path("/runs/name"), Path("/runs/name/code/longstride.py"), "/venv/bin/python", Path("/work"), 2, 4, gpus=True)
NASTY = [
    "$(touch PWNED)",
    "`touch PWNED`",
    "a b",
    "'; touch PWNED; '",
    '"; touch PWNED; "',
    "-rf",
    "--wrap=x",
    "\\",
    "a\\",
    "%x/%j",
    "#",
    "é~*",
]


def told(script: str, folder: Path) -> list[str]:
    """What bash makes of the values of a script: everything before the first attempt, with cd and export printing their argument."""
    head = script.split("attempt=$(")[0]
    prefix = "cd() { printf '%s\\0' \"$2\"; }\nmodule() { printf '%s\\0' \"$2\"; }\n"
    suffix = '\nprintf "%s\\0" "$run" "$longstride" "$python" "${VALUE:-}"'
    env = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash"], input=prefix + head + suffix, cwd=folder, env=env, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.split("\0")[:-1]


def check(text: str, folder: Path) -> None:
    path = Path("/" + text.replace("\\", ""))
    job = dataclasses.replace(
        JOB, name=text, run=path, longstride=path / "l.py", python=text, submit_dir=path, partition=text, dependency=text
    )
    site = Site(environment={"VALUE": text}, modules=(text,), rendezvous_host=text)
    script = render(job, site)
    assert told(script, folder) == [str(path), text, str(path), str(path / "l.py"), text, text]
    assert not list(folder.iterdir())
    assert all(line.startswith("#SBATCH --") for line in script.splitlines()[2:] if line.startswith("#SBATCH"))


@pytest.mark.parametrize("text", NASTY)
def test_nasty_values_are_data(text: str, tmp_path: Path) -> None:
    check(text, tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(text=st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" "), min_size=1, max_size=60))
def test_any_text_is_data(text: str, tmp_path: Path) -> None:
    check(text, tmp_path)


@pytest.mark.parametrize("text", ["two\nlines", "bell\a", "nul\0", "cr\r", "\x1b[31m", "next\x85line", "\u2028"])
def test_control_characters_are_refused_by_name(text: str) -> None:
    for field in ("name", "partition", "dependency", "python"):
        with pytest.raises(UserError, match="line break or another character"):
            render(dataclasses.replace(JOB, **{field: text}), Site())
    with pytest.raises(UserError, match="site.setup"):
        render(JOB, Site(setup=(text,)))


def test_percent_signs_and_backslashes_in_the_place_of_a_run() -> None:
    assert '--output="/a %%x/slurm/job_%j.log"' in render(dataclasses.replace(JOB, run=Path("/a %x")), Site())
    with pytest.raises(UserError, match="backslash"):
        render(dataclasses.replace(JOB, run=Path("/a\\b")), Site())


def test_places_inside_values_are_not_filled() -> None:
    assert "@RUN@" in render(dataclasses.replace(JOB, python="@RUN@"), Site())


def test_the_script_asks_for_what_the_job_needs() -> None:
    site = Site(sbatch=("--constraint=h100 nvme", "--exclusive"), warn_seconds=300, export=("HOME", "MY_DIR"))
    script = render(dataclasses.replace(JOB, cpus_per_node=16), site)
    lines = {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert {
        '--job-name="name"',
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=4",
        "--cpus-per-task=16",
        "--signal=B:USR1@300",
        "--requeue",
        '--constraint="h100 nvme"',
        "--exclusive",
        '--export="HOME,MY_DIR"',
        '--chdir="/runs/name"',
        '--output="/runs/name/slurm/job_%j.log"',
    } <= lines
    assert "--nproc-per-node=4 " in script
    assert "gpus" not in render(dataclasses.replace(JOB, gpus=False), Site())
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert directive("--a", 'q"\\') == '--a="q\\"\\\\"'


def test_modules_are_loaded_in_a_shell_that_has_none_of_them(tmp_path: Path) -> None:
    """A batch script is no login shell, and is given no functions of the one that submits."""
    (tmp_path / "init").mkdir()
    (tmp_path / "init" / "bash").write_text('echo "$NOT_SET_ANYWHERE"; module() { echo "module $*"; [ "$2" != absent ]; }')
    (tmp_path / "python").write_text("#!/bin/bash\necho done\n")
    (tmp_path / "python").chmod(0o755)
    job = dataclasses.replace(JOB, run=tmp_path, submit_dir=tmp_path, python=str(tmp_path / "python"))
    env = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7", "MODULESHOME": str(tmp_path)}

    def output(*modules: str) -> str:
        script = render(job, Site(modules=modules, setup=('echo "$NOT_SET_EITHER"',)))
        return subprocess.run(["bash"], input=script, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60).stdout

    assert "module load cuda/12.8\nmodule load a b\n" in (shown := output("cuda/12.8", "a b")) and "the run is done already" in shown
    assert "cannot load module absent" in (shown := output("absent", "cuda")) and "load cuda" not in shown and "done already" not in shown


def test_notes_are_made_whatever_slurm_sends_meanwhile(tmp_path: Path) -> None:
    """Every program that makes a note gets SIGTERM, as in a preemption: the job still hears what it has to do."""
    programs = {
        "python": 'kill -TERM $$; kill -USR1 $$; case $2 in _job_start) echo 1 ;; _job_end) echo "requeue: $6" ;; esac',
        "srun": 'echo "cpus $SRUN_CPUS_PER_TASK"; exit 3',
        "squeue": "[ -e requeued ] && echo PENDING || echo RUNNING",
        "scontrol": "touch requeued",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = dataclasses.replace(JOB, run=tmp_path, submit_dir=tmp_path, python=str(tmp_path / "python"))
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}
    env |= {"SLURM_JOB_CPUS_PER_NODE": "64(x2)"}
    script = render(job, Site(rendezvous_host="127.0.0.1"))
    done = subprocess.run(["bash"], input=script, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and (tmp_path / "requeued").exists(), done.stdout + done.stderr
    assert "cpus 64\n" in done.stdout, "of each node, as the job has them"
    assert "attempt 1" in done.stdout and "the ranks ended with exit code 3: requeue: 3" in done.stdout


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("partitoin: gpu", ["unknown key 'partitoin'", "did you mean 'partition'?"]),
        ("frobnicate: 3", ["unknown key 'frobnicate'", "known keys: device"]),
        ("modules: cuda", ["modules: cuda is not a list", "write [cuda]"]),
        ("environment: {OMP_NUM_THREADS: 8}", ["environment.OMP_NUM_THREADS: 8", 'in quotes: "8"']),
        ("environment: {HF_TOKEN: hf_x}", ["environment", "HF_TOKEN looks like a secret", "source FILE"]),
        ("export: [AWS_SECRET_ACCESS_KEY]", ["export", "looks like a secret"]),
        ("export: ['HOME;rm']", ["is not the name of a variable"]),
        ("sbatch: ['constraint=h100']", ["sbatch", "is not an option"]),
        ("sbatch: ['--export=ALL']", ["sbatch", "--export has a key of its own: export"]),
        ("sbatch: ['--time=1']", ["sbatch", "--time has a key of its own: time"]),
        ("sbatch: ['--no-requeue']", ["sbatch", "--no-requeue follows from what is submitted"]),
        ("setup: ['cd /; export HF_TOKEN=hf_x']", ["setup", "HF_TOKEN looks like a secret", "source FILE"]),
        ("health: ['PASSWORD=\"x\" check']", ["health", "PASSWORD looks like a secret"]),
        ("setup: ['export HF_TOKEN=${HF_TOKEN:-hf_x}']", ["setup", "HF_TOKEN looks like a secret"]),
        ("setup: ['export AUTHORIZATION=x']", ["setup", "AUTHORIZATION looks like a secret"]),
        ("idle_attempts: 0", ["idle_attempts"]),
        ("warn_seconds: soon", ["warn_seconds"]),
        ("partition: 3", ["partition"]),
        ("a: b: c", ["site.yaml:1"]),
        ("!!python/object/apply:os.system ['touch PWNED']", ["YAML tags"]),
    ],
)
def test_a_bad_site_file_names_the_key(text: str, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        read_site(tmp_path / "site.yaml")
    for part in ["site.yaml", *parts]:
        assert part in str(error.value)


def test_secrets_may_be_read_in_the_job() -> None:
    lines = ("source ~/.secrets", "export HF_TOKEN=$(cat ~/.hf)", 'export WANDB_API_KEY="$(cat ~/.wandb)"', "unset HF_TOKEN", "X=1 y")
    lines += ("export TOKENIZERS_PARALLELISM=false HF_TOKEN_PATH=/x AUTHOR=me", "SSH_AUTH_SOCK=/x", 'HF_TOKEN="${HF_TOKEN:-$OTHER}"')
    assert Site(setup=lines).setup == lines


def test_a_site_file_and_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.site.user_config_dir", lambda name: str(tmp_path / name))
    assert read_site() == Site()
    (tmp_path / "longstride").mkdir()
    (tmp_path / "longstride" / "site.yaml").write_text("device: h100\nmodules: [cuda/12.8]\nenvironment: {NCCL_DEBUG: WARN}\n")
    assert read_site() == Site(device="h100", modules=("cuda/12.8",), environment={"NCCL_DEBUG": "WARN"})
