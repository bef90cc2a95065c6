"""The time of one traced operation: a roofline for computation, volume and latency for communication, link speed for copies.

Classes come from the operation's name (``op_class``). Modelled: work at the achieved rate for its size, traffic at the achieved
bandwidth (the slower of the two counts), one launch; collectives by the bytes that cross the slower of NVLink and network, plus one
latency per step of a ring; host copies at the link's speed, divided among the ranks that copy over it and over the memory of their NUMA
node. Not modelled: congestion by other jobs, stragglers, kernels that fuse, caches on a GPU. Imports no torch.
"""

from __future__ import annotations

import math
from typing import Literal

from memory_mgmt.cost_rates import Rates, Topology
from memory_mgmt.trace import TracedOp

OpClass = Literal[
    "nothing",
    "matmul",
    "batched_matmul",
    "attention_forward",
    "attention_backward",
    "math",
    "elementwise",
    "all_gather",
    "reduce_scatter",
    "all_reduce",
    "all_to_all",
    "broadcast",
    "send",
    "receive",
    "copy_out",
    "copy_in",
]
COMMUNICATION: frozenset[OpClass] = frozenset(("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "send", "receive"))
COPIES: frozenset[OpClass] = frozenset(("copy_out", "copy_in"))

_NOTHING = frozenset(("_unsafe_view", "_reshape_alias"))
"""Views that their signature does not show as such."""
_MATMUL = frozenset(("mm", "addmm", "linear", "matmul", "mv", "addmv", "_scaled_mm", "mkldnn_linear", "_addmm_activation"))
_BATCHED = frozenset(("bmm", "baddbmm", "einsum", "convolution", "convolution_backward", "linalg_solve_triangular"))
_EXPONENTIALS = {"exp", "exp2", "expm1", "logsumexp", "softmax", "sigmoid", "logsigmoid", "silu", "gelu", "tanh", "softplus", "mish", "elu"}
_MATH_WORDS = _EXPONENTIALS | {"log", "log2", "log1p", "erf", "pow", "sin", "cos"}
_COLLECTIVES: tuple[tuple[str, OpClass], ...] = (
    ("reducescatter", "reduce_scatter"),
    ("allgather", "all_gather"),
    ("allreduce", "all_reduce"),
    ("alltoall", "all_to_all"),
    ("broadcast", "broadcast"),
    ("barrier", "all_reduce"),
    ("send", "send"),
    ("recv", "receive"),
)


def op_class(op: TracedOp) -> OpClass:
    """What kind of work an operation is. Raises ValueError for a collective of unknown name: its cost would be a guess."""
    if op.stream in ("copy_out", "copy_in"):
        return op.stream  # pyright: ignore[reportReturnType]
    space, _, full_name = op.name.rpartition("::")
    name = full_name.partition(".")[0].rstrip("_")
    if space in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
        return _collective_class(op, name)
    if "attention" in name and ("flash" in name or "efficient" in name or "cudnn" in name or "scaled_dot_product" in name):
        return "attention_backward" if "backward" in name else "attention_forward"
    if name in _NOTHING:
        return "nothing"
    if name in _MATMUL:
        return "matmul"
    if name in _BATCHED:
        return "batched_matmul"
    if _MATH_WORDS.intersection(name.split("_")):
        return "math"
    return "elementwise"


def _collective_class(op: TracedOp, name: str) -> OpClass:
    plain = name.replace("_", "").lower()
    if plain == "waittensor":
        return "nothing"
    for part, kind in _COLLECTIVES:
        if part in plain:
            return kind if op.group_size > 1 else "elementwise"
    raise ValueError(f"the cost of the collective {op.name} (group of {op.group_size}) is not known")


def op_seconds(op: TracedOp, rates: Rates, topology: Topology) -> float:
    """Seconds that ``op`` with all its repeats takes on one rank while all ranks do the same.

    Raises ValueError for a dtype or collective without a rate.
    """
    kind = op_class(op)
    if kind == "nothing":
        return 0.0
    if kind in COMMUNICATION:
        return op.repeats * communication_seconds(kind, op.message_bytes // op.repeats, op.group_size, rates, topology, op.group_stride)
    if kind in COPIES:
        return op.repeats * copy_seconds(kind, moved_bytes(op) // op.repeats, rates, topology)
    traffic = (rates.math if kind == "math" else rates.elementwise).seconds(op.bytes * _passes(op) / op.repeats)
    work = 0.0
    if kind in ("matmul", "batched_matmul", "attention_forward", "attention_backward") and op.flops:
        work = rates.of(getattr(rates, kind), op.dtype).seconds(op.flops / op.repeats)
    sharing = topology.ranks_per_node if rates.shared else 1
    return op.repeats * (max(work, traffic) * sharing + rates.launch_seconds)


def moved_bytes(op: TracedOp) -> int:
    """What a host copy moves. Read on one side and written on the other: half of the traffic, where it is not said."""
    return op.message_bytes or op.bytes // 2


def _passes(op: TracedOp) -> int:
    """How often an operation goes through the bytes it is given. torch's logsumexp reads for the maximum, reads and writes for the
    difference, again for the exponential, and reads for the sum: six times what it reads and writes by its signature."""
    return 6 if op.name.partition("::")[2].partition(".")[0] == "logsumexp" else 1


def copy_seconds(kind: OpClass, moved: int, rates: Rates, topology: Topology) -> float:
    """Copying ``moved`` bytes between device and host while all ranks of the node do the same."""
    alone = rates.copy_out if kind == "copy_out" else rates.copy_in
    if rates.shared:
        return moved / (alone / topology.ranks_per_node) + rates.launch_seconds
    on_link = min(rates.devices_per_host_link, topology.ranks_per_node)
    on_numa_node = math.ceil(topology.ranks_per_node / rates.numa_nodes)
    return moved / min(alone / on_link, rates.host_bandwidth / on_numa_node) + rates.launch_seconds


def communication_seconds(kind: OpClass, message: int, group_size: int, rates: Rates, topology: Topology, stride: int = 0) -> float:
    """Time of one collective or one send/receive on an idle network.

    n ranks in the group, m of them per node, k = n / m nodes, message of M bytes (gathered, unreduced, or all that a rank sends):
      all-gather, reduce-scatter   NVLink carries M (n-1)/n, the m adapters of a node together M (k-1)/k; n-1 steps
      all-reduce                   a reduce-scatter and an all-gather, in at most 2 log2(n) steps (trees) for small messages
      all-to-all                   of M, NVLink carries M (m-1)/n, each rank's adapter M (n-m)/n; one step to every other rank
      broadcast                    M over the slowest link, log2(n) steps
      send, receive                M over NVLink, or over one adapter when the group spans nodes; one step
    """
    if group_size < 2:
        return 0.0
    members = topology.members_per_node(group_size, kind in ("send", "receive"), stride)
    crosses = members < group_size
    latency = rates.network_latency if crosses else rates.link_latency
    nodes = group_size / members
    if kind in ("all_gather", "reduce_scatter", "all_reduce"):
        inside = message * (group_size - 1) / group_size / rates.link if members > 1 else 0.0
        between = message * (nodes - 1) / nodes / (members * rates.network) if crosses else 0.0
        once = max(inside, between)
        if kind == "all_reduce":
            return 2 * once + 2 * math.ceil(math.log2(group_size)) * latency
        return once + (group_size - 1) * latency
    if kind == "all_to_all":
        inside = message * (members - 1) / group_size / rates.link
        between = message * (group_size - members) / group_size / rates.network
        return max(inside, between) + (group_size - 1) * latency
    bandwidth = rates.network if crosses else rates.link
    steps = math.ceil(math.log2(group_size)) if kind == "broadcast" else 1
    return message / bandwidth + steps * latency
