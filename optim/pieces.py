"""Elementwise work in pieces: the temporaries of a piece fit a core's caches and bound what is needed beside the tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from models.repeat import turns

_CPU_PIECE = 1 << 18
_ACCELERATOR_PIECE = 1 << 24


def piece_elements(device: torch.device) -> int:
    """Worked on at a time: enough that a piece's work outweighs starting it (about 30 calls from Python on CPU, launches elsewhere)."""
    return _CPU_PIECE if device.type == "cpu" else _ACCELERATOR_PIECE


def row_chunks(rows: int, columns: int, elements: int, x: Tensor) -> Iterator[slice]:
    """``rows`` of ``columns`` elements in runs of about ``elements``, at least a row each. Whoever decodes, computes and encodes by
    such runs needs no float copy of the whole tensor, and gets the same bits. ``x``: a tensor that is worked on; a fake one is followed
    through a few runs that stand for all (``models/repeat.py``): 8 billion parameters are 8,000 runs."""
    step = max(1, elements // max(columns, 1))
    runs = [slice(first, min(first + step, rows)) for first in range(0, rows, step)]
    return turns(runs, x, lambda run: run.stop - run.start)
