"""The peak rate that MFU is measured against.

MFU = tokens/s x model FLOPs per token (``models/flops.py``, nothing counted for recomputation) / peak FLOP/s of all devices.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from memory_mgmt.devices import device_from_torch_name
from trainer.config import RunConfig

_MATMUL_SIZE = 512
"""Small enough that one product fits in a scheduler's time slice: on a machine shared with others the best one is undisturbed."""
_MEASURE_SECONDS = 0.2


def peak_flops(config: RunConfig, device: torch.device) -> float:
    """Peak FLOP/s of this rank's device: ``train.peak_tflops`` if set, the data-sheet rate of a known GPU at
    ``train.precision``, else the best rate of a square matmul measured here with all ranks busy at once (collective)."""
    precision = config.train.precision
    if config.train.peak_tflops is not None:
        return config.train.peak_tflops * 1e12
    if device.type == "cuda":
        known = device_from_torch_name(torch.cuda.get_device_name(device))
        if known is not None and precision in known.peak_tflops:
            return known.peak_tflops[precision] * 1e12
    rate = torch.tensor(_measure_matmul(precision, device), dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(rate)
        rate /= dist.get_world_size()
    return float(rate)


def _measure_matmul(precision: str, device: torch.device) -> float:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[precision]
    a = torch.ones(_MATMUL_SIZE, _MATMUL_SIZE, dtype=dtype, device=device)
    best, deadline = float("inf"), time.perf_counter() + _MEASURE_SECONDS
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        product = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
        del product
    return 2 * _MATMUL_SIZE**3 / best
