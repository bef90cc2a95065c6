"""What the benchmarks share: where they ran, cases in processes of their own, and result files beside the script."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from trainer.run_dir import write_atomic

ROOT = Path(__file__).resolve().parent.parent


def machine(*packages: str) -> dict[str, Any]:
    """Where and with which ``packages`` something is measured, and how busy the machine is beside it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "load_average_at_start": round(os.getloadavg()[0], 1),
    }


def where(measured_on: Mapping[str, Any], *packages: str) -> str:
    """``machine`` in words: processor, cores, memory; versions."""
    m = measured_on
    versions = [f"{package} {m[package]}" for package in packages] + [f"Python {m['python']}"]
    return f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB; {', '.join(versions)}"


def python(*arguments: str | Path, environment: Mapping[str, str] | None = None, cwd: str | Path | None = None) -> tuple[str, str]:
    """Run Python in a process of its own, with this one's environment unless told otherwise; returns (what it printed, why it failed).

    The reason is empty when it went well, else its exit code and the last line of its errors, or its only line where it says ``error:``.
    """
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    if not done.returncode:
        return done.stdout, ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "no output")
    return done.stdout, f"exit {done.returncode}: {said.strip()[-300:]}"


def longstride(*arguments: str, cwd: str | Path) -> tuple[str, str]:
    """Run a command of this repository's longstride in ``cwd``, as ``python`` does."""
    return python(ROOT / "longstride.py", *arguments, cwd=cwd)


def write_results(script: str, report: Any, text: str) -> None:
    """Write the figures (JSON) and the page for people (Markdown) beside ``script``, its ``__file__``; each whole or not at all."""
    beside = Path(script).resolve()
    write_atomic(beside.with_suffix(".json"), (json.dumps(report, indent=2) + "\n").encode())
    write_atomic(beside.with_suffix(".md"), text.encode())
