"""This room's C++ sources, compiled on first use (``models/native.py``). Imports no torch."""

from __future__ import annotations

from pathlib import Path

from models import native
from models.native import NoCompiler, cache_dir

__all__ = ["NoCompiler", "build", "cache_dir"]
HERE = Path(__file__).resolve().parent


def build(source: str, *, with_torch: bool, with_cuda: bool = False) -> Path:
    """The shared library of ``memory_mgmt/<source>``; see ``models.native.build``."""
    return native.build(HERE / source, with_torch=with_torch, with_cuda=with_cuda)
