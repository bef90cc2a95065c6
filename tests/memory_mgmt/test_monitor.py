"""Measured memory follows what the process really touches; each measurement in a fresh process, so that nothing else moves it."""

import json
import subprocess
import sys

import pytest
import torch

from memory_mgmt.monitor import MemoryMonitor

MIB = 2**20


def in_fresh_process(body: str) -> dict:
    """Run ``body`` (which fills the dict ``out``) and return ``out``."""
    code = f"import json, torch\nfrom memory_mgmt import monitor as m\nM = 2**20\nout = {{}}\n{body}\nprint(json.dumps(out))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_peak_growth_counts_what_was_freed_and_reset_forgets_it():
    out = in_fresh_process(
        "monitor = m.MemoryMonitor(torch.device('cpu'))\n"
        "torch.ones(256 * M // 4)\n"  # freed at once: only the peak saw it
        "first = monitor.read()\n"
        "monitor.reset()\n"
        "kept = torch.ones(64 * M // 4)\n"
        "second = monitor.read()\n"
        "out = {'first': first.peak_bytes, 'second': second.peak_bytes, 'since_reset': second.since_reset, 'source': second.source}"
    )
    assert 256 * MIB <= out["first"] <= 276 * MIB
    if not out["since_reset"]:
        assert "since process start" in out["source"]
        pytest.skip("this system does not let a process reset its peak resident set")
    assert 64 * MIB <= out["second"] <= 84 * MIB


def test_without_permission_the_peak_is_of_the_whole_process_and_says_so():
    out = in_fresh_process(
        "from pathlib import Path\n"
        "m._CLEAR_REFS = Path('/proc/self/no_such_file')\n"
        "monitor = m.MemoryMonitor(torch.device('cpu'))\n"
        "torch.ones(256 * M // 4)\n"
        "monitor.reset()\n"
        "reading = monitor.read()\n"
        "out = {'peak': reading.peak_bytes, 'since_reset': reading.since_reset, 'source': reading.source}"
    )
    assert not out["since_reset"] and "since process start" in out["source"]
    assert 256 * MIB <= out["peak"] <= 296 * MIB


def test_available_memory_obeys_a_cgroup_limit(tmp_path, monkeypatch):
    from memory_mgmt import monitor

    (tmp_path / "max").write_text("1048576\n")
    (tmp_path / "current").write_text("1000000\n")
    monkeypatch.setattr(monitor, "_CGROUP_LIMITS", ((tmp_path / "max", tmp_path / "current"),))
    assert MemoryMonitor(torch.device("cpu")).available_bytes() == 48576
    (tmp_path / "max").write_text("max\n")
    assert MemoryMonitor(torch.device("cpu")).available_bytes() > 2**20
