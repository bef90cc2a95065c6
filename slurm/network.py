"""Over which network interface the ranks of a job talk, and what they say of it, where the site's settings name none. Imports no torch.

gloo takes the interface of the node's own host name, which on many distributions is the loopback address (Debian: 127.0.1.1): ranks on
several nodes then never meet. The interface that leads to the other nodes, by the addresses that Slurm itself uses, is the one they share.
NCCL finds fast interfaces by itself; it is only told to say why it fails. ``environment`` in site.yaml wins over all of it.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping

import psutil

from models.errors import UserError
from slurm import client

LOOPBACK = "lo"
ASKED = 8
"""Other nodes whose way is looked at: each asks for a name, on every node, and a cluster's nodes share one network."""
_ANY_PORT = 9
"""Nothing is sent there: connecting a datagram socket only chooses a route."""


def variables(environment: Mapping[str, str], gpus: int) -> dict[str, str]:
    """What to add to ``environment``, a step's of Slurm, for ranks on this node, with ``gpus`` GPUs (0: on CPU)."""
    found = {}
    if interface := _interface(environment):
        found["GLOO_SOCKET_IFNAME"] = interface  # NCCL runs have gloo beside it, for what is in host memory
    if gpus:
        found["NCCL_DEBUG"] = "WARN"
    return {name: value for name, value in found.items() if name not in environment}


def _interface(environment: Mapping[str, str]) -> str | None:
    """The interface on the way to the job's other nodes, the loopback one where there is none; None if that cannot be told."""
    if environment.get("SLURM_JOB_NUM_NODES", "1") == "1":
        return LOOPBACK if LOOPBACK in psutil.net_if_addrs() else None
    try:
        addresses = client.node_addresses(environment.get("SLURM_JOB_NODELIST", ""))
    except UserError:  # the controller is busy or away: gloo's own choice stands
        return None
    own = environment.get("SLURMD_NODENAME", "")
    others = [address for name, address in addresses.items() if name != own]
    found = {interface_to(address) for address in others[:ASKED]}
    return found.pop() if len(found) == 1 else None


def interface_to(address: str) -> str | None:
    """The interface through which this node reaches ``address``, a name or number; None where it cannot."""
    with contextlib.suppress(OSError):
        family, _, _, _, place = socket.getaddrinfo(address, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as asking:
            asking.connect(place)
            own = asking.getsockname()[0]
        return next((name for name, known in psutil.net_if_addrs().items() if any(one.address.split("%")[0] == own for one in known)), None)
    return None
