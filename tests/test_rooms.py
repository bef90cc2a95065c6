"""The rooms are imported from this checkout, and a package of the same name elsewhere is refused by name."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longstride import ROOMS

ROOT = Path(__file__).resolve().parents[1]
CONSOLE_SCRIPT = "import sys; from longstride import main; sys.exit(main(sys.argv[1:]))"


def run(arguments: list[str], paths: list[Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    return subprocess.run([sys.executable, *arguments], env=env, cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_ours(room: str) -> None:
    spec = importlib.util.find_spec(room)
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).resolve() == ROOT / room / "__init__.py"
    assert (ROOT / room / "__init__.py").read_text() == ""


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A place with another package called ``trainer``."""
    place = tmp_path / "elsewhere"
    (place / "trainer").mkdir(parents=True)
    (place / "trainer" / "__init__.py").write_text("raise SystemExit('the foreign trainer was imported')")
    return place


def test_a_foreign_room_is_refused_naming_both_places(foreign: Path, tmp_path: Path) -> None:
    done = run(["-c", CONSOLE_SCRIPT, "runs"], [foreign, ROOT], tmp_path)
    assert done.returncode == 2, done.stderr
    assert str(foreign / "trainer") in done.stderr and str(ROOT / "trainer") in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_loaded_foreign_room_is_refused(foreign: Path, tmp_path: Path) -> None:
    (foreign / "trainer" / "__init__.py").write_text("")
    done = run(["-c", "import trainer; " + CONSOLE_SCRIPT, "runs"], [foreign, ROOT], tmp_path)
    assert done.returncode == 2 and str(foreign / "trainer") in done.stderr


def test_the_checkout_wins_when_started_from_its_file(foreign: Path, tmp_path: Path) -> None:
    done = run([str(ROOT / "longstride.py"), "runs"], [foreign], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "no runs in directory runs (--root DIR looks elsewhere)\n"


def test_python_m_is_the_console_script(tmp_path: Path) -> None:
    for arguments in (["--help"], ["train", "absent"], ["runs"]):
        module = run(["-m", "longstride", *arguments], [ROOT], tmp_path)
        script = run(["-c", CONSOLE_SCRIPT, *arguments], [ROOT], tmp_path)
        assert (module.returncode, module.stdout, module.stderr) == (script.returncode, script.stdout, script.stderr)


def test_the_declared_script_is_main() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"longstride": "longstride:main"}
    assert {name.removesuffix("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]} == set(ROOMS)
    assert set(project["tool"]["importlinter"]["root_packages"]) == set(ROOMS)


def test_an_installed_package_has_every_file_that_is_not_python() -> None:
    import tomllib

    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for room in ROOMS:
        beside = {path for path in (ROOT / room).rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
        assert beside == {path for pattern in data.get(room, ()) for path in (ROOT / room).glob(pattern)}, room
