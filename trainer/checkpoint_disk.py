"""Whether a checkpoint fits on its file system, asked before the first byte of it is written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from memory_mgmt.plan import gib
from trainer.checkpoint_ranks import DiskFull

BESIDE_BYTES = 1 << 16
"""For random states, metadata and manifest; and one percent for what tensors' files hold beside their values."""


def checkpoint_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """What the files of all ranks will take together; the same on every rank, asked of none (a DTensor's shape is the global one)."""
    values = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return values + values // 100 + BESIDE_BYTES


def check_room(folder: Path, name: str, needed: int) -> None:
    """Raise DiskFull unless the file system of ``folder`` has room for ``needed`` bytes. One that does not tell is believed to."""
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if found.f_blocks and free < needed:
        raise DiskFull(
            f"no room for {name}: it takes {gib(needed)}, and {free / 2**30:.3f} GiB are free below {folder}; older checkpoints are intact"
        )
