"""Compile a run's blocks once its engine is built (``trainer/compile_rules.py`` says which)."""

from __future__ import annotations

from models.compiled import compile_blocks
from models.transformer import Transformer
from trainer.compile_rules import compile_lines, compiled_layers
from trainer.config import RunConfig


def compiled(config: RunConfig, model: Transformer) -> list[str]:
    """Install what ``train.compile`` asks for on ``model``, whose tensors are real (a trace is of plain blocks); the lines that say so."""
    if layers := compiled_layers(config):
        compile_blocks(model, layers)
    return compile_lines(config)
