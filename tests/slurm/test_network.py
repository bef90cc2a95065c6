"""The interface that a job's ranks are given where the site names none."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil
import pytest

from slurm import client
from slurm.network import interface_to, variables

TWO = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURMD_NODENAME": "n1"}


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path / "scontrol"


def answer(scontrol: Path, addresses: dict[str, str], code: int = 0) -> None:
    lines = "".join(f"NodeName={name} Arch=x86_64 NodeAddr={at} NodeHostName=host_{name} OS=Linux\\n" for name, at in addresses.items())
    scontrol.write_text(f"""#!/bin/sh\nprintf '{lines}'\necho "$*" > "$0.calls"\nexit {code}\n""")
    scontrol.chmod(0o755)


def own_addresses() -> dict[str, str]:
    """IPv4 address of every interface of this machine that is up."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return {
        name: one.address for name, known in psutil.net_if_addrs().items() for one in known if name in up and one.family == socket.AF_INET
    }


def test_one_node_talks_to_itself(scontrol: Path) -> None:
    assert variables({"SLURM_JOB_NUM_NODES": "1"}, gpus=0) == {"GLOO_SOCKET_IFNAME": "lo"}
    assert variables({"GLOO_SOCKET_IFNAME": "ib0"}, gpus=0) == {}


def test_several_nodes_take_the_interface_that_leads_to_the_others(scontrol: Path) -> None:
    answer(scontrol, {"n1": "does.not.matter.invalid", "n2": "localhost"})
    assert client.node_addresses("n[1-2]") == {"n1": "does.not.matter.invalid", "n2": "localhost"}
    assert (scontrol.parent / "scontrol.calls").read_text() == "--oneliner show nodes n[1-2]\n"
    assert variables(TWO, gpus=0) == {"GLOO_SOCKET_IFNAME": "lo"}
    # This machine's own addresses are reached over loopback; a network behind one of its interfaces is reached through that.
    assert all(interface_to(address) is not None for address in own_addresses().values())


def test_what_cannot_be_told_is_left_to_gloo(scontrol: Path) -> None:
    answer(scontrol, {"n1": "localhost", "n2": "no.such.host.invalid"})
    assert variables(TWO, gpus=0) == {}
    answer(scontrol, {}, code=1)
    assert variables(TWO, gpus=0) == {}


def test_nccl_says_why_it_fails_unless_the_site_wants_another_level(scontrol: Path) -> None:
    assert variables({}, gpus=8)["NCCL_DEBUG"] == "WARN"
    assert "NCCL_DEBUG" not in variables({"NCCL_DEBUG": "INFO"}, gpus=8) and "NCCL_DEBUG" not in variables({}, gpus=0)
