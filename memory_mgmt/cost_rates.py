"""Achieved rates of a device and its links, and where ranks sit: the inputs of the cost model. Imports no torch.

Try alone: ``python -c "from memory_mgmt.cost_rates import cpu_rates; print(cpu_rates(2))"``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from memory_mgmt.devices import GB, Device
from parallel.dims import ParallelDims

CALIBRATION_FORMAT = 1
_DTYPES = {"bfloat16": "bf16", "float32": "fp32", "float64": "fp64", "float16": "bf16", "half": "bf16", "fp16": "bf16", "float": "fp32"}
"""float16 runs at bf16's rates on every device here."""


@dataclass(frozen=True)
class Curve:
    """A rate that depends on the size of the work: (size, rate) points by rising size, straight lines between them on logarithmic
    axes, level beyond both ends. Raises ValueError for points that are not positive and rising."""

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.points]
        if not sizes or sizes != sorted(set(sizes)) or any(not (0 < x < math.inf) for point in self.points for x in point):
            raise ValueError(f"points of a rate must be positive with rising sizes, not {self.points}")

    @staticmethod
    def level(rate: float) -> Curve:
        """The same rate at every size."""
        return Curve(((1.0, rate),))

    def at(self, size: float) -> float:
        """The rate for work of this size."""
        (first, rate), last = self.points[0], self.points[-1]
        if size <= first:
            return rate
        if size >= last[0]:
            return last[1]
        upper = next(i for i, (point, _) in enumerate(self.points) if point >= size)
        (a, rate_a), (b, rate_b) = self.points[upper - 1], self.points[upper]
        share = math.log(size / a) / math.log(b / a)
        return rate_a * (rate_b / rate_a) ** share

    def seconds(self, size: float) -> float:
        """Time for work of this size."""
        return size / self.at(size) if size > 0 else 0.0

    def scaled(self, factor: float) -> Curve:
        """All rates times ``factor``."""
        return Curve(tuple((size, rate * factor) for size, rate in self.points))


@dataclass(frozen=True)
class Rates:
    """What is achieved, in FLOP/s and bytes/s. Bandwidths of links are of one direction.

    Sizes of curves: FLOPs of one operation for ``matmul``, ``batched_matmul`` and attention, bytes read and written for the others.
    Attention backward counts five matrix products over the visible scores where forward counts two.
    """

    matmul: Mapping[str, Curve]
    """By dtype (bf16, fp32, fp64)."""
    batched_matmul: Mapping[str, Curve]
    """Many small products in one operation."""
    attention_forward: Mapping[str, Curve]
    attention_backward: Mapping[str, Curve]
    elementwise: Curve
    math: Curve
    """Elementwise operations with exponentials and the like: on a CPU these are slower than memory."""
    launch_seconds: float
    """Added to every operation."""
    copy_out: float
    """Device to host memory, one rank alone."""
    copy_in: float
    devices_per_host_link: int
    numa_nodes: int
    """Per node."""
    host_bandwidth: float
    """Of one NUMA node, shared by the copies of its ranks; inf: not a limit."""
    link: float
    """Between ranks of a node, per rank, as collectives reach it."""
    link_latency: float
    network: float
    """To other nodes, per rank."""
    network_latency: float
    overlap: bool
    """Copies and collectives run beside computation (a GPU's own engines); False: they take the same cores."""
    shared: bool
    """The rates are of the whole machine and its ranks share them (CPU)."""
    source: str

    @staticmethod
    def from_device(device: Device, *, attention: str = "flash2", cores: int | None = None) -> Rates:
        """Data-sheet rates times what software reaches of them (``devices.py``); for the CPU, assumed rates per core.

        ``attention`` names the attention kernel. Raises ValueError for a device or kernel without known rates.
        """
        if device.name == "cpu":
            return cpu_rates(cores or 1)
        if device.reached is None or device.node is None or not device.memory_bandwidth:
            raise ValueError(f"no rates are known for device '{device.name}'; measure them there with `longstride plan --calibrate`")
        reached, node = device.reached, device.node
        if attention not in reached.attention:
            raise ValueError(f"no attention kernel '{attention}' is known on {device.name}; known: {', '.join(reached.attention)}")
        kernel = reached.attention[attention]
        peaks = {name: tflops * 1e12 for name, tflops in device.peak_tflops.items()}
        matmul = {name: Curve.level(peak * reached.matmul) for name, peak in peaks.items()}
        elementwise = Curve.level(device.memory_bandwidth * reached.memory)
        return Rates(
            matmul=matmul,
            batched_matmul=matmul,
            attention_forward={name: Curve.level(peak * kernel.forward) for name, peak in peaks.items()},
            attention_backward={name: Curve.level(peak * kernel.backward) for name, peak in peaks.items()},
            elementwise=elementwise,
            math=elementwise,
            launch_seconds=device.launch_seconds,
            copy_out=node.host_link * reached.host_link,
            copy_in=node.host_link * reached.host_link,
            devices_per_host_link=node.devices_per_host_link,
            numa_nodes=node.numa_nodes,
            host_bandwidth=node.host_bandwidth,
            link=node.link * reached.link,
            link_latency=node.link_latency,
            network=node.network * reached.network,
            network_latency=node.network_latency,
            overlap=True,
            shared=False,
            source=f"data sheet of {device.name} with assumed efficiencies, attention kernel {attention}",
        )

    @staticmethod
    def from_calibration(path: Path) -> Rates:
        """The rates measured by ``calibration.py``. Raises ValueError for anything but a calibration file."""
        try:
            data = json.loads(path.read_text())
            if data["format_version"] != CALIBRATION_FORMAT:
                raise ValueError(
                    f"{path}: calibration of format version {data['format_version']}; this longstride reads {CALIBRATION_FORMAT}"
                )
            return replace(
                rates_from_dict(data["rates"]), source=f"calibration of {data['device']} on {data['date']}, torch {data['torch']}"
            )
        except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a calibration ({error!r})") from None

    def of(self, table: Mapping[str, Curve], dtype: str) -> Curve:
        """The curve of a dtype in one of the tables. Raises ValueError for a dtype without a rate."""
        name = dtype_name(dtype)
        if name not in table:
            raise ValueError(f"no rate for {dtype} operations; {self.source} has {', '.join(table)}")
        return table[name]


def dtype_name(dtype: str) -> str:
    """``torch.bfloat16``, ``bfloat16`` and ``bf16`` all as ``bf16``; other names unchanged."""
    short = dtype.removeprefix("torch.")
    return _DTYPES.get(short, short)


def rates_to_dict(rates: Rates) -> dict[str, Any]:
    """Plain data for JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, Curve):
            return [list(point) for point in value.points]
        if isinstance(value, Mapping):
            return {key: plain(entry) for key, entry in value.items()}
        return None if value == math.inf else value

    return {f.name: plain(getattr(rates, f.name)) for f in fields(Rates)}


def rates_from_dict(data: Mapping[str, Any]) -> Rates:
    """Read what ``rates_to_dict`` made."""

    def curve(points: Any) -> Curve:
        return Curve(tuple((float(size), float(rate)) for size, rate in points))

    values = dict(data)
    for name in ("matmul", "batched_matmul", "attention_forward", "attention_backward"):
        values[name] = {dtype: curve(points) for dtype, points in data[name].items()}
    for name in ("elementwise", "math"):
        values[name] = curve(data[name])
    values["host_bandwidth"] = math.inf if data["host_bandwidth"] is None else data["host_bandwidth"]
    return Rates(**values)


def cpu_rates(cores: int) -> Rates:
    """Assumed rates of ``cores`` server cores with AVX2: right within a factor of three at best. Calibrate for more."""
    flops = {"fp32": 50e9 * cores, "fp64": 25e9 * cores, "bf16": 40e9 * cores}
    bandwidth = min(6 * GB * cores, 60 * GB)
    return Rates(
        matmul={name: Curve.level(rate) for name, rate in flops.items()},
        batched_matmul={name: Curve.level(rate / 2) for name, rate in flops.items()},
        attention_forward={name: Curve.level(rate / 2) for name, rate in flops.items()},
        attention_backward={name: Curve.level(rate / 2) for name, rate in flops.items()},
        elementwise=Curve.level(bandwidth),
        math=Curve.level(bandwidth / 2),
        launch_seconds=4e-6,
        copy_out=bandwidth / 2,
        copy_in=bandwidth / 2,
        devices_per_host_link=1,
        numa_nodes=1,
        host_bandwidth=math.inf,
        link=1 * GB,  # gloo over the loopback
        link_latency=100e-6,
        network=1 * GB,
        network_latency=200e-6,
        overlap=False,
        shared=True,
        source=f"assumed rates of {cores} CPU core(s), not calibrated",
    )


@dataclass(frozen=True)
class Topology:
    """Which ranks share a node. Rank order as in ``parallel/dims.py``: ``tp`` varies fastest, then ``cp``, ``dp_shard`` and
    ``dp_replicate``."""

    ranks_per_node: int
    cp: int = 1
    dp_shard: int = 1
    dp_replicate: int = 1
    ulysses: int = 1
    """Of the cp ranks, neighbours that exchange heads; a ring joins ranks that lie so far apart."""
    tp: int = 1

    def __post_init__(self) -> None:
        if min(self.ranks_per_node, self.cp, self.dp_shard, self.dp_replicate, self.ulysses, self.tp) < 1:
            raise ValueError(f"every degree and ranks_per_node must be at least 1, not {self}")

    @staticmethod
    def of(dims: ParallelDims, ranks_per_node: int) -> Topology:
        """The topology of a mesh; a run smaller than a node uses a part of it."""
        return Topology(min(ranks_per_node, dims.world_size), dims.cp, dims.dp_shard, dims.dp_replicate, dims.ulysses, dims.tp)

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.tp * self.cp * self.dp_shard * self.dp_replicate

    @property
    def shard(self) -> int:
        """Ranks that share one copy of the parameters."""
        return self.cp * self.dp_shard

    def members_per_node(self, group_size: int, ring: bool = False, stride: int = 0) -> int:
        """How many ranks of one group are on the same node. ``ring``: of send and receive, where ring and Ulysses groups may be as large.

        Ranks of a group lie ``stride`` apart, from a node's first on. Where that is not known (0), those of a shard group or a part of
        one lie ``tp`` apart, except those of a ring of Ulysses groups (``ulysses`` times that), and those that join the copies of one
        shard: these are told by their size (``dp_replicate``, where neither ``cp`` nor the shard group has it) and lie ``shard`` times
        that apart.
        """
        if not stride:
            stride = self.tp
            if ring and self.ulysses < self.cp and group_size == self.cp // self.ulysses:
                stride *= self.ulysses
            elif group_size == self.dp_replicate and group_size not in (self.cp, self.shard):
                stride *= self.shard
        return min(group_size, max(1, self.ranks_per_node // stride))

    def crosses_nodes(self, group_size: int, ring: bool = False, stride: int = 0) -> bool:
        """Whether such a group spans several nodes."""
        return self.members_per_node(group_size, ring, stride) < group_size
