"""The Makefile, the installer and CI: what they call, and the one line they say when something is missing."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GATES = [ROOT / "Makefile", ROOT / ".ci" / "run", ROOT / "pyproject.toml", *(ROOT / "scripts").iterdir(), *(ROOT / "constraints").iterdir()]


def make(*arguments: str) -> str:
    return subprocess.run(["make", "-n", "-B", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_targets_call_what_they_promise() -> None:
    assert "scripts/install.sh .venv\n" in make("install")
    assert ".venv/bin/longstride train quickstart" in make("quickstart")
    assert ".venv/bin/python scripts/screenshots.py\n" in make("screenshots")
    tests = make("test")
    for gate in ("ruff check", "ruff format --check", "pyright", "lint-imports", "-m pytest"):
        assert gate in tests
    assert tests.index("lint-imports") < tests.index("-m pytest")


def test_million_takes_the_book_only_where_it_is() -> None:
    assert "data.source=text data.path=book.txt" in make("million", "BOOK=book.txt")
    assert "data.source" not in make("million", "BOOK=")


def test_ci_runs_exactly_make_test() -> None:
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make")]
    assert commands == ["make test"]
    for script in (ROOT / ".ci" / "run", ROOT / "scripts" / "install.sh"):
        assert script.stat().st_mode & stat.S_IXUSR
        assert "set -euo pipefail" in script.read_text()


def test_pins_satisfy_the_project() -> None:
    from packaging.requirements import Requirement

    pins = {}
    for file in ("torch.txt", "packages.txt"):
        for line in (ROOT / "constraints" / file).read_text().splitlines():
            if line and not line.startswith("#"):
                name, version = line.split("==")
                pins[name] = version
    assert f"torch=={pins['torch']}+cpu" in (ROOT / "constraints" / "torch-cpu.txt").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        if not text.count("=="):
            assert requirement.specifier.contains(pins[requirement.name]), text


@pytest.mark.parametrize("path", GATES, ids=lambda path: path.name)
def test_no_package_host_is_written_down(path: Path) -> None:
    hosts = re.findall(r"https?://[^\s'\"]+", path.read_text())
    assert hosts == []


def install(tmp_path: Path, python: str) -> subprocess.CompletedProcess[str]:
    fake = tmp_path / "python3"
    fake.write_text(python)
    fake.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "PYTHON": str(fake), "HOME": str(tmp_path)}
    return subprocess.run(
        [str(ROOT / "scripts" / "install.sh"), str(tmp_path / "venv")], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )


def test_an_old_python_is_refused_in_one_line(tmp_path: Path) -> None:
    done = install(tmp_path, "#!/bin/sh\nexit 1\n")
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: no Python 3\.11 or newer found at PYTHON=.*apt-get install python3 python3-venv\n", done.stderr)


def test_a_missing_venv_module_is_refused_in_one_line(tmp_path: Path) -> None:
    done = install(tmp_path, '#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexit 0\n')
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: .* has no venv module; on Debian or Ubuntu: apt-get install python3-venv\n", done.stderr)
    assert not (tmp_path / "venv").exists()
