"""Devices a run can be planned for: memory and data-sheet peak rates.

What it does not hold: achieved rates and link bandwidths (those belong to the cost model). Imports no torch.
Try alone: ``python -c "from memory_mgmt.devices import device_named; print(device_named('h100'))"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 2**30
MIB = 2**20

Precision = Literal["bf16", "fp32", "fp64"]


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

    @property
    def is_cuda(self) -> bool:
        """True for a GPU: CUDA allocator semantics, fused CUDA kernels, NCCL buffers."""
        return bool(self.torch_name_parts)


# Peak rates: dense (no 2:4 sparsity) tensor-core bf16; fp32 is the ordinary fp32 rate, since torch leaves TF32 off by default;
# fp64 is the fp64 tensor-core rate. Memory: what torch.cuda.get_device_properties().total_memory shows on such a card, rounded
# down to a whole GiB. Context: about 0.5 GiB on these cards with one process (CUDA context, cuBLAS and cuDNN handles).
_DEVICES = (
    # A CPU's peak depends on cores and clock: the trainer measures a matmul instead; memory is asked from the machine.
    Device("cpu", None, {}),
    # NVIDIA A100 data sheet (nvidia-a100-datasheet-us-nvidia-1758950): 80 GB HBM2e; BF16 312, FP32 19.5, FP64 tensor 19.5.
    Device("a100-80", 79 * GIB, {"bf16": 312.0, "fp32": 19.5, "fp64": 19.5}, ("A100",), GIB // 2),
    # NVIDIA A800 data sheet: an A100 80 GB with NVLink at 400 GB/s; same rates and memory.
    Device("a800", 79 * GIB, {"bf16": 312.0, "fp32": 19.5, "fp64": 19.5}, ("A800",), GIB // 2),
    # NVIDIA H100 SXM data sheet: 80 GB HBM3; BF16 1979 with sparsity = 989.5 dense, FP32 67, FP64 tensor 67.
    Device("h100", 79 * GIB, {"bf16": 989.5, "fp32": 67.0, "fp64": 67.0}, ("H100",), GIB // 2),
    # NVIDIA H200 SXM data sheet: 141 GB HBM3e; the compute die of the H100.
    Device("h200", 139 * GIB, {"bf16": 989.5, "fp32": 67.0, "fp64": 67.0}, ("H200",), GIB // 2),
    # NVIDIA HGX B200 (1000 W) data sheet: 180 GB HBM3e usable; BF16 2250 dense, FP32 75, FP64 tensor 37.
    Device("b200", 178 * GIB, {"bf16": 2250.0, "fp32": 75.0, "fp64": 37.0}, ("B200",), GIB // 2),
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
