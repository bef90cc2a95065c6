"""Measure a device's achieved rates in a few seconds, for the cost model: ``longstride plan --calibrate``.

Measured: matrix products and attention (forward and backward) per dtype at a few sizes, many small products, elementwise operations
with and without exponentials at a few sizes, copies to and from host memory (page-locked on CUDA), the cost of one more operation, and
all-gathers when a process group runs. Outputs are allocated anew each time, as a training step does. What was not measured (links
without a process group, how many devices share a host link) is taken from the device table. Only this file of the cost model imports torch.

Try alone: ``python -m memory_mgmt.calibration``.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from memory_mgmt.cost_rates import CALIBRATION_FORMAT, Curve, Rates, cpu_rates, dtype_name, rates_from_dict, rates_to_dict
from memory_mgmt.devices import MIB, device_from_torch_name
from models.kernels import CAUSAL, block_attention, block_attention_backward

_SECONDS_EACH = 0.06
"""Aimed at for one measurement; a few dozen make a calibration."""
_CHAIN = 64
_POOL = 96 * MIB
"""Bytes of tensors that elementwise operations go through: more than a core's share of any cache."""
_Size = tuple[int, int, int]


@dataclass(frozen=True)
class _Sizes:
    """What is measured on a kind of device: enough work to be typical, little enough to be quick."""

    matmul: tuple[_Size, ...]
    """(rows, inner, columns): rows are tokens."""
    batched: tuple[tuple[int, int], ...]
    """(products, side of the squares)."""
    attention: tuple[tuple[int, int, int], ...]
    """(heads, tokens, head size)."""
    elementwise: tuple[int, ...]
    """Bytes of one operand."""
    copy: int
    gathered: tuple[int, int]
    """Bytes of a small and a large all-gather."""


_CPU = _Sizes(
    ((64, 64, 64), (512, 128, 128), (4096, 128, 384), (2048, 1024, 1024)),
    ((64, 32), (128, 64), (32, 256)),
    ((2, 256, 32), (2, 1024, 64), (2, 4096, 64)),
    (32 * 1024, MIB, 8 * MIB, 64 * MIB),
    64 * MIB,
    (4096, 8 * MIB),
)
_CUDA = _Sizes(
    ((512, 512, 512), (4096, 1024, 1024), (8192, 4096, 4096), (16384, 8192, 8192)),
    ((256, 64), (1024, 128), (256, 1024)),
    ((8, 2048, 128), (16, 16384, 128)),
    (MIB, 32 * MIB, 512 * MIB),
    512 * MIB,
    (65536, 256 * MIB),
)


@dataclass(frozen=True)
class Calibration:
    """Measured rates, and what they are of."""

    device: str
    """What torch or the system calls it."""
    torch: str
    date: str
    """UTC, ISO 8601."""
    threads: int
    seconds: float
    """That measuring took."""
    rates: Rates


def calibrate(device: torch.device, *, ranks_per_node: int = 1, clock: Callable[[], float] = time.perf_counter) -> Calibration:
    """Measure ``device`` for a few seconds.

    ``clock``: on a CPU that is busy with other things, ``time.process_time`` counts this process's own time (with one thread).
    With a process group, every rank must call it at the same time (collective); links are measured, and a CPU's rates are those of
    the whole machine: this rank's times ``ranks_per_node``.
    """
    started = time.perf_counter()
    cuda = device.type == "cuda"
    sizes = _CUDA if cuda else _CPU
    dtypes = (torch.bfloat16, torch.float32) if cuda else (torch.float32, torch.bfloat16, torch.float64)
    measure = _Measure(device, clock)
    launch = measure.launch_in_a_chain()
    base = _unmeasured(device)
    rates = replace(
        base,
        matmul={dtype_name(str(t)): measure.matmul(t, sizes.matmul) for t in dtypes},
        batched_matmul={dtype_name(str(t)): measure.batched(t, sizes.batched) for t in dtypes},
        elementwise=measure.elementwise(lambda x: x + x, sizes.elementwise),
        math=measure.elementwise(torch.nn.functional.silu, sizes.elementwise),
        launch_seconds=launch,
        host_bandwidth=math.inf if base.shared else base.host_bandwidth,
    )
    attention = {dtype_name(str(t)): measure.attention(t, sizes.attention) for t in dtypes}
    rates = replace(
        rates,
        attention_forward={name: pair[0] for name, pair in attention.items()},
        attention_backward={name: pair[1] for name, pair in attention.items()},
        **measure.copies(sizes.copy),
        **_links(device, sizes.gathered, ranks_per_node),
    )
    if base.shared and ranks_per_node > 1:
        rates = _times(rates, ranks_per_node)
    seconds = time.perf_counter() - started
    return Calibration(
        _name(device), torch.__version__, datetime.now(UTC).isoformat(timespec="seconds"), torch.get_num_threads(), seconds, rates
    )


def save(calibration: Calibration, path: Path) -> None:
    """Write as JSON under a temporary name, sync, rename: a reader sees the old file or the whole new one."""
    data = {"format_version": CALIBRATION_FORMAT, **vars(calibration), "rates": rates_to_dict(calibration.rates)}
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(data, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def load(path: Path) -> Calibration:
    """Read what ``save`` wrote. Raises ValueError for anything else."""
    rates = Rates.from_calibration(path)  # checks the format
    data = json.loads(path.read_text())
    try:
        fields = {name: data[name] for name in ("device", "torch", "date", "threads", "seconds")}
    except KeyError as error:
        raise ValueError(f"{path}: not a calibration (no {error})") from None
    return Calibration(**fields, rates=replace(rates_from_dict(data["rates"]), source=rates.source))


def describe(calibration: Calibration) -> list[str]:
    """The measured rates as lines for people."""
    rates = calibration.rates
    lines = [f"{calibration.device}, torch {calibration.torch}, {calibration.threads} thread(s), {calibration.date}"]
    for label, table in (
        ("matrix products", rates.matmul),
        ("many small products", rates.batched_matmul),
        ("attention forward", rates.attention_forward),
        ("attention backward", rates.attention_backward),
    ):
        shown = ", ".join(f"{name} {curve.points[0][1] / 1e9:.0f} to {curve.points[-1][1] / 1e9:.0f}" for name, curve in table.items())
        lines.append(f"{label}, GFLOP/s: {shown}")
    for label, curve in (("elementwise", rates.elementwise), ("with exponentials", rates.math)):
        lines.append(f"{label}, GB/s: " + ", ".join(f"{rate / 1e9:.1f} at {size / MIB:.2g} MiB" for size, rate in curve.points))
    lines.append(f"host copies, GB/s: {rates.copy_out / 1e9:.1f} out, {rates.copy_in / 1e9:.1f} in")
    lines.append(
        f"one more operation: {rates.launch_seconds * 1e6:.1f} us; link {rates.link / 1e9:.1f} GB/s, {rates.link_latency * 1e6:.0f} us"
    )
    return lines


# --- measuring ----------------------------------------------------------------------------------------------------------------


class _Measure:
    """Times operations on one device."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self.device, self.clock = device, clock
        tiny = torch.ones(16, device=device)
        self.launch = self.shortest(lambda: tiny + tiny)

    def shortest(self, work: Callable[[], object], repeats: int = 1) -> float:
        """Shortest time of one of the ``repeats`` operations of ``work``: other processes can only add to it."""
        work()
        _settle(self.device)
        times: list[float] = []
        deadline = time.perf_counter() + _SECONDS_EACH
        while len(times) < 3 or time.perf_counter() < deadline:
            started = self.clock()
            work()
            _settle(self.device)
            times.append(self.clock() - started)
        return min(times) / repeats

    def seconds(self, work: Callable[[], object], repeats: int = 1) -> float:
        """The same without the cost of launching; where that is nearly all of it, a quarter is taken to be work."""
        shortest = self.shortest(work, repeats)
        return max(shortest - self.launch, shortest / 4)

    def launch_in_a_chain(self) -> float:
        """What one more small operation costs in a differentiated chain, forward and backward."""
        x = torch.ones(16, device=self.device, requires_grad=True)

        def chain() -> None:
            y = x
            for _ in range(_CHAIN):
                y = y * 1.0
            y.backward(torch.ones_like(y))

        return self.shortest(chain, 2 * _CHAIN)

    def _random(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.rand(*shape, device=self.device).to(dtype)

    def matmul(self, dtype: torch.dtype, sizes: Iterable[_Size]) -> Curve:
        """FLOP/s of ``x w^T`` by its FLOPs."""

        def one(rows: int, inner: int, columns: int) -> tuple[float, float]:
            x, w = self._random(rows, inner, dtype=dtype), self._random(columns, inner, dtype=dtype)
            return 2.0 * rows * inner * columns, self.seconds(lambda: x @ w.T)

        return _curve([one(*size) for size in sizes])

    def batched(self, dtype: torch.dtype, sizes: Iterable[tuple[int, int]]) -> Curve:
        """FLOP/s of many square products by their FLOPs together."""

        def one(n: int, side: int) -> tuple[float, float]:
            x = self._random(n, side, side, dtype=dtype)
            return 2.0 * n * side**3, self.seconds(lambda: torch.bmm(x, x))

        return _curve([one(*size) for size in sizes])

    def attention(self, dtype: torch.dtype, sizes: Iterable[tuple[int, int, int]]) -> tuple[Curve, Curve]:
        """FLOP/s of causal attention, forward and backward, by their FLOPs: 4 (10) per visible score and head dimension."""
        forward, backward = [], []
        for heads, tokens, head_dim in sizes:
            q, k, v, dout = (self._random(1, heads, tokens, head_dim, dtype=dtype) for _ in range(4))
            out, lse = block_attention(q, k, v, CAUSAL)
            scores = heads * tokens * (tokens + 1) / 2
            forward.append((4.0 * scores * head_dim, self.seconds(lambda q=q, k=k, v=v: block_attention(q, k, v, CAUSAL))))
            tensors = (dout, q, k, v, out, lse)
            backward.append((10.0 * scores * head_dim, self.seconds(lambda t=tensors: block_attention_backward(*t, CAUSAL))))
        return _curve(forward), _curve(backward)

    def elementwise(self, work: Callable[[torch.Tensor], torch.Tensor], sizes: Iterable[int]) -> Curve:
        """Bytes/s by bytes of an operation that reads one float32 tensor and writes a new one.

        As in a training step neither is in the caches or in use a moment before: each turn reads another of many tensors and puts its
        result in the place of one of them.
        """

        def one(size: int) -> tuple[float, float]:
            held = [torch.ones(size // 4, device=self.device) for _ in range(max(2, min(_POOL // size, 512)))]

            def turn() -> None:
                for i in range(len(held)):
                    held[i] = work(held[i - len(held) // 2])

            return 2.0 * size, self.seconds(turn, len(held))

        return _curve([one(size) for size in sizes])

    def copies(self, size: int) -> dict[str, float]:
        """Bytes/s to and from host memory, page-locked on CUDA; on a CPU both are one copy into memory that exists."""
        here = torch.ones(size, dtype=torch.uint8, device=self.device)
        host = torch.ones(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        out = size / self.seconds(lambda: host.copy_(here, non_blocking=True))
        back = size / self.seconds(lambda: here.copy_(host, non_blocking=True))
        return {"copy_out": out, "copy_in": back}


def _curve(points: Sequence[tuple[float, float]]) -> Curve:
    """(size, seconds) as a curve of rates; more work never takes less time, whatever the clock said."""
    kept: list[tuple[float, float]] = []
    longest = 0.0
    for size, seconds in sorted(points):
        longest = max(longest, seconds)
        kept.append((size, size / longest))
    return Curve(tuple(kept))


def _links(device: torch.device, sizes: tuple[int, int], ranks_per_node: int) -> dict[str, float]:
    """Bandwidth and latency of all-gathers inside a node and, when ranks are on several, between nodes."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return {}
    world = dist.get_world_size()
    inside = min(world, ranks_per_node)
    found: dict[str, float] = {}
    if inside > 1:
        group = None if inside == world else dist.new_subgroups(inside)[0]
        small, large = (_gather_seconds(device, group, size) for size in sizes)
        found["link_latency"] = small / (inside - 1)
        found["link"] = sizes[1] * (inside - 1) / inside / max(large - small, large / 10)
    if world > inside:
        small, large = (_gather_seconds(device, None, size) for size in sizes)
        nodes = world / inside
        found["network_latency"] = small / (world - 1)
        found["network"] = sizes[1] * (nodes - 1) / nodes / inside / max(large - small, large / 10)
    return found


def _gather_seconds(device: torch.device, group: Any, size: int) -> float:
    """Median time of an all-gather of ``size`` bytes in all; the slowest rank's."""
    n = dist.get_world_size(group)
    mine = torch.ones(max(1, size // n), dtype=torch.uint8, device=device)
    whole = [torch.empty_like(mine) for _ in range(n)]
    times = []
    for _ in range(6):
        dist.barrier(group)
        started = time.perf_counter()
        dist.all_gather(whole, mine, group=group)
        _settle(device)
        times.append(time.perf_counter() - started)
    slowest = torch.tensor(statistics.median(times[1:]), dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    return float(slowest)


def _unmeasured(device: torch.device) -> Rates:
    """Rates to start from: links and the layout of the node cannot be measured by one rank."""
    if device.type == "cpu":
        return cpu_rates(torch.get_num_threads())
    known = device_from_torch_name(torch.cuda.get_device_name(device))
    if known is not None:
        return Rates.from_device(known)
    # An unknown GPU: links of the slowest kind that is common, and a host link of its own.
    return replace(cpu_rates(1), overlap=True, shared=False, link=20e9, link_latency=1e-5, network=3e9, network_latency=3e-5)


def _times(rates: Rates, factor: float) -> Rates:
    def every(table):
        return {name: curve.scaled(factor) for name, curve in table.items()}

    return replace(
        rates,
        matmul=every(rates.matmul),
        batched_matmul=every(rates.batched_matmul),
        attention_forward=every(rates.attention_forward),
        attention_backward=every(rates.attention_backward),
        elementwise=rates.elementwise.scaled(factor),
        math=rates.math.scaled(factor),
        copy_out=rates.copy_out * factor,
        copy_in=rates.copy_in * factor,
    )


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores"


if __name__ == "__main__":
    print("\n".join(describe(calibrate(torch.device("cuda" if torch.cuda.is_available() else "cpu")))))
