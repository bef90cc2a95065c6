"""The memory plan of a run configuration: which device, which vocabulary, then arithmetic. Imports no torch.

Try alone: ``longstride plan debug_cpu``.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from memory_mgmt.devices import DEVICES, Device, device_from_torch_name, device_named
from memory_mgmt.estimate import estimate
from memory_mgmt.plan import MemoryPlan
from models.errors import UserError
from trainer.config import RunConfig
from trainer.data.tokenizers import load_tokenizer

VOCAB_MULTIPLE = 64
"""Embedding rows are rounded up to a multiple of this, so that they shard and tile evenly."""
_DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def plan_run(config: RunConfig, device_name: str | None = None) -> MemoryPlan:
    """What one rank of ``config`` will hold on ``device_name`` (None: this machine's device under train.device).

    Raises UserError for an unknown device or a vocabulary that does not fit the tokenizer.
    """
    try:
        device = this_machine(config.train.device) if device_name is None else device_named(device_name)
    except ValueError as error:
        raise UserError(f"--device: {error}") from None
    return estimate(
        config.model,
        config.parallel,
        config.memory,
        config.optim,
        seq_len=config.data.seq_len,
        micro_batch_size=config.train.micro_batch_size,
        grad_accum=config.train.grad_accum,
        precision=config.train.precision,
        vocab_size=model_vocab_size(config, load_tokenizer(config.data.tokenizer).vocab_size),
        layout=config.layout,
        device=device,
        device_bytes=None if device.is_cuda else host_bytes() // _local_ranks(config),
    )


def model_vocab_size(config: RunConfig, tokenizer_vocab: int) -> int:
    """Rows of the embedding; raises UserError when model.vocab_size is too small for the tokenizer."""
    configured = config.model.vocab_size
    if configured is None:
        return -(-tokenizer_vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if configured < tokenizer_vocab:
        raise UserError(
            f"model.vocab_size: {configured} is smaller than the {tokenizer_vocab} tokens of data.tokenizer '{config.data.tokenizer}'; "
            "leave it null or raise it"
        )
    return configured


def this_machine(setting: str) -> Device:
    """The device a rank gets here under ``train.device``: the first GPU that the driver lists, if torch can use one, else the CPU."""
    gpu = _first_gpu()
    if setting == "cpu" or gpu is None or _torch_without_cuda():
        return DEVICES["cpu"]
    return device_from_torch_name(gpu) or Device(gpu, None, {}, (gpu,))


def host_bytes() -> int:
    """Memory of this machine or container."""
    limits = [psutil.virtual_memory().total]
    for path in _CGROUP_LIMITS:
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def _local_ranks(config: RunConfig) -> int:
    return config.parallel.dp_replicate * config.parallel.dp_shard * config.parallel.cp


def _first_gpu() -> str | None:
    """What the driver calls the first GPU, without asking CUDA."""
    for file in sorted(_DRIVER_GPUS.glob("*/information")):
        for line in file.read_text().splitlines():
            key, _, value = line.partition(":")
            if key == "Model":
                return value.strip()
    return None


def _torch_without_cuda() -> bool:
    try:
        return version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False
