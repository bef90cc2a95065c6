"""Devices a run can be planned for: memory, data-sheet rates, what of them is reached, and the node around the device.

Every number comes from a data sheet, a published measurement, or is called an assumption beside it. ``cost_model.Rates`` makes
usable rates of them; a calibration (``calibration.py``) replaces them by what was measured. Imports no torch.
Try alone: ``python -c "from memory_mgmt.devices import device_named; print(device_named('h100'))"``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

GIB = 2**30
MIB = 2**20
GB = 10**9

Precision = Literal["bf16", "fp32", "fp64"]


@dataclass(frozen=True)
class AttentionReached:
    """Share of the bf16 peak that one attention kernel reaches on long sequences with heads of 128. Forward is counted as two
    matrix products over the visible scores, backward as five (the scores are computed again)."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Reached:
    """What software reaches of the data sheet."""

    matmul: float
    """Share of the peak of a large matrix product, of any precision."""
    memory: float
    """Share of the memory bandwidth of an elementwise operation."""
    link: float
    """Share of NVLink in a collective (bus bandwidth)."""
    network: float
    """Share of the network line rate in a collective."""
    host_link: float
    """Share of the host link's line rate in a large copy from page-locked memory."""
    attention: dict[str, AttentionReached]
    """By kernel: ``flash2`` (what torch brings), ``flash3``, ``flash4``, ``cudnn``."""


@dataclass(frozen=True)
class Node:
    """The machine around the devices. Bandwidths in bytes/s, one direction."""

    devices: int
    """Per node."""
    link: float
    """NVLink (or what else joins the devices of a node) per device."""
    network: float
    """To other nodes, per device."""
    host_link: float
    """PCIe or chip-to-chip link between a device, or ``devices_per_host_link`` of them together, and host memory."""
    devices_per_host_link: int
    host_bytes: int
    """Host memory."""
    numa_nodes: int
    host_bandwidth: float
    """Of host memory, per NUMA node, that copies of its devices can use together."""
    link_latency: float = 5e-6
    """Seconds of one hop inside a node."""
    network_latency: float = 15e-6
    """Seconds of one hop between nodes."""


@dataclass(frozen=True)
class Device:
    """One kind of device.

    ``memory_bytes`` is what a process can use (the driver's own share of the data-sheet capacity is gone); None: ask the
    machine. ``peak_tflops`` are dense data-sheet rates in TFLOP/s by precision; a missing precision has no known peak.
    ``context_bytes`` is what a CUDA process takes outside the caching allocator (context, kernels, library handles).
    """

    name: str
    memory_bytes: int | None
    peak_tflops: dict[str, float]
    torch_name_parts: tuple[str, ...] = ()
    context_bytes: int = 0
    memory_bandwidth: float = 0.0
    """Bytes/s of the device's memory (data sheet); 0: not known."""
    launch_seconds: float = 0.0
    """Between the end of one kernel and the start of the next."""
    reached: Reached | None = None
    """None: not known, so times can be predicted from a calibration only."""
    node: Node | None = field(default=None)
    """The usual node with this device; None: not known."""

    @property
    def is_cuda(self) -> bool:
        """True for a GPU: CUDA allocator semantics, fused CUDA kernels, NCCL buffers."""
        return bool(self.torch_name_parts)

    @property
    def capability(self) -> tuple[int, int] | None:
        """CUDA compute capability; None: not known, or none."""
        return _CAPABILITIES.get(self.torch_name_parts[0]) if self.is_cuda else None


_CAPABILITIES = {"A100": (8, 0), "A800": (8, 0), "H100": (9, 0), "H200": (9, 0), "B200": (10, 0)}


# --- what software reaches --------------------------------------------------------------------------------------------------

# Ampere. Matrix products: assumption, cuBLAS bf16 at the sizes of a transformer (large squares reach 0.85). Attention:
# FlashAttention-2 paper (arXiv 2307.08691), section 4.1: forward up to 73 percent of an A100's peak, backward up to 63; a little less
# than "up to" is assumed. Elementwise: assumption (a copy reaches 0.9). NVLink: NCCL's all-gather bus bandwidth of about 230 of
# 300 GB/s on DGX A100; network and host link: assumptions (25 of 32 GB/s with PCIe 4, as bandwidthTest shows).
_AMPERE = Reached(0.75, 0.80, 0.77, 0.80, 0.78, {"flash2": AttentionReached(0.70, 0.60)})

# Hopper. Matrix products: assumption; power limits keep large bf16 products at 650 to 720 of 989 TFLOP/s. Attention: FlashAttention-3
# paper (arXiv 2407.08608), figures 5 and 6, H100 SXM5, heads of 128, 16K tokens, TFLOP/s forward and backward: FlashAttention-2
# 370 and 322, cuDNN 595 and 516, FlashAttention-3 648 and 561. (Causal masks cost 10 percent at 16K tokens and nothing at a million.)
# NVLink: about 360 of 450 GB/s bus bandwidth with NCCL on 8 devices; network: assumption; PCIe 5: 52 to 55 of 64 GB/s.
_HOPPER = Reached(
    0.68,
    0.85,
    0.80,
    0.85,
    0.83,
    {"flash2": AttentionReached(0.374, 0.325), "cudnn": AttentionReached(0.601, 0.521), "flash3": AttentionReached(0.655, 0.567)},
)

# Blackwell. Assumptions throughout: large bf16 products reach about 1.5 of 2.25 PFLOP/s; FlashAttention-4 reports up to 71 percent
# forward; kernels made for Ampere (flash2) run without the new tensor memory, at about Hopper's absolute rate.
_BLACKWELL = Reached(
    0.68,
    0.85,
    0.80,
    0.85,
    0.83,
    {"flash2": AttentionReached(0.17, 0.15), "cudnn": AttentionReached(0.62, 0.48), "flash4": AttentionReached(0.62, 0.48)},
)

# --- nodes ------------------------------------------------------------------------------------------------------------------

# DGX A100 user guide: 8 devices; NVLink 3 at 600 GB/s both ways; one 200 Gb/s HDR adapter per device; PCIe 4 x16 (32 GB/s one way), two
# devices behind one switch and so one uplink; two EPYC 7742 in four NUMA nodes each; 2 TB of memory in the larger version; 8 channels of
# DDR4-3200 per socket (204.8 GB/s), of which copies are assumed to use three quarters, spread over four NUMA nodes.
_DGX_A100 = Node(8, 300 * GB, 25 * GB, 32 * GB, 2, 2000 * GB, 8, 38 * GB)
# The same with A800: NVLink cut to 400 GB/s both ways (eight links instead of twelve).
_HGX_A800 = Node(8, 200 * GB, 25 * GB, 32 * GB, 2, 2000 * GB, 8, 38 * GB)
# DGX H100 and H200 user guides: NVLink 4 at 900 GB/s both ways; one 400 Gb/s adapter per device; PCIe 5 x16 (64 GB/s one way), assumed to
# be one uplink per device; two Xeon 8480C, one NUMA node each; 2 TB; 8 channels of DDR5-4800 per socket (307 GB/s), three quarters of it.
_DGX_H100 = Node(8, 450 * GB, 50 * GB, 64 * GB, 1, 2000 * GB, 2, 230 * GB)
# DGX B200 user guide: NVLink 5 at 1.8 TB/s both ways; one 400 Gb/s adapter per device; PCIe 5 x16; two Xeon 8570; 2 TB (up to 4); 8
# channels of DDR5-5600 per socket (358 GB/s), three quarters of it.
_DGX_B200 = Node(8, 900 * GB, 50 * GB, 64 * GB, 1, 2000 * GB, 2, 268 * GB)

# Peak rates: dense (no 2:4 sparsity) tensor-core bf16; fp32 is the ordinary fp32 rate, since torch leaves TF32 off by default;
# fp64 is the fp64 tensor-core rate. Memory: what torch.cuda.get_device_properties().total_memory shows on such a card, rounded
# down to a whole GiB. Context: about 0.5 GiB on these cards with one process (CUDA context, cuBLAS and cuDNN handles).
# Launch: assumption, the gap between dependent kernels of one stream on an idle queue.
_DEVICES = (
    # A CPU's rates depend on cores, clock and memory: the trainer measures a matmul for the peak, cost_model.cpu_rates assumes rates per
    # core, a calibration measures them; memory is asked from the machine.
    Device("cpu", None, {}),
    # NVIDIA A100 data sheet (nvidia-a100-datasheet-us-nvidia-1758950): 80 GB HBM2e at 2039 GB/s; BF16 312, FP32 19.5, FP64 tensor 19.5.
    Device("a100-80", 79 * GIB, {"bf16": 312.0, "fp32": 19.5, "fp64": 19.5}, ("A100",), GIB // 2, 2039 * GB, 3e-6, _AMPERE, _DGX_A100),
    # NVIDIA A800 data sheet: an A100 80 GB with NVLink at 400 GB/s; same rates and memory.
    Device("a800", 79 * GIB, {"bf16": 312.0, "fp32": 19.5, "fp64": 19.5}, ("A800",), GIB // 2, 2039 * GB, 3e-6, _AMPERE, _HGX_A800),
    # NVIDIA H100 SXM data sheet: 80 GB HBM3 at 3.35 TB/s; BF16 1979 with sparsity = 989.5 dense, FP32 67, FP64 tensor 67.
    Device("h100", 79 * GIB, {"bf16": 989.5, "fp32": 67.0, "fp64": 67.0}, ("H100",), GIB // 2, 3350 * GB, 3e-6, _HOPPER, _DGX_H100),
    # NVIDIA H200 SXM data sheet: 141 GB HBM3e at 4.8 TB/s; the compute die of the H100.
    Device("h200", 139 * GIB, {"bf16": 989.5, "fp32": 67.0, "fp64": 67.0}, ("H200",), GIB // 2, 4800 * GB, 3e-6, _HOPPER, _DGX_H100),
    # NVIDIA HGX B200 (1000 W) data sheet: 180 GB HBM3e usable at 7.7 TB/s; BF16 2250 dense, FP32 75, FP64 tensor 37.
    Device("b200", 178 * GIB, {"bf16": 2250.0, "fp32": 75.0, "fp64": 37.0}, ("B200",), GIB // 2, 7700 * GB, 3e-6, _BLACKWELL, _DGX_B200),
)

DEVICES: dict[str, Device] = {device.name: device for device in _DEVICES}


def device_named(name: str) -> Device:
    """The device called ``name`` (case does not matter). Raises ValueError naming the known ones."""
    try:
        return DEVICES[name.lower()]
    except KeyError:
        raise ValueError(f"unknown device '{name}'; known: {', '.join(DEVICES)}") from None


def device_from_torch_name(torch_name: str) -> Device | None:
    """The device whose name occurs in what ``torch.cuda.get_device_name()`` says, or None (an unknown GPU).

    A 40 GB A100 and the PCIe and NVL variants have other memory or rates; they are told apart by their names and not matched.
    """
    words = torch_name.upper().replace("-", " ").replace("_", " ").split()
    if any(word in ("40GB", "PCIE", "NVL", "MIG") for word in words):
        return None
    for device in _DEVICES:
        if any(part in words for part in device.torch_name_parts):
            return device
    return None
