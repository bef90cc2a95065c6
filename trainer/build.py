"""Build a run from its configuration: mesh, model, engine, data, checkpoints, metrics - in the order they depend on one another.

``train`` is what every rank executes; the front door starts the ranks.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist

from memory_mgmt.apply import apply_memory_settings
from models.errors import UserError
from models.transformer import Transformer, init_weights
from optim.build import build_optimizer
from parallel.dims import ParallelDims
from parallel.mesh import Mesh, build_mesh
from parallel.parallelize import parallelize
from trainer.config import RunConfig
from trainer.engine import Engine

_DTYPES = {"bf16": torch.float32, "fp32": torch.float32, "fp64": torch.float64}
VOCAB_MULTIPLE = 64
"""Embedding rows are rounded up to a multiple of this, so that they shard and tile evenly."""


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


def build_model(config: RunConfig, vocab_size: int, mesh: Mesh | None, device: torch.device) -> Transformer:
    """The model on ``device`` with initial weights: built without memory, wrapped, split and sharded, then materialised."""
    with torch.device("meta"):
        model = Transformer(config.model, vocab_size).to(_DTYPES[config.train.precision])
    apply_memory_settings(model, config.memory)
    if mesh is not None:
        parallelize(model, mesh, config.layout)
    model.to_empty(device=device)
    init_weights(model, config.train.seed)
    return model


def build_engine(config: RunConfig, vocab_size: int, mesh: Mesh | None, device: torch.device) -> Engine:
    """Model and optimizer of ``config`` on this rank."""
    model = build_model(config, vocab_size, mesh, device)
    optimizer = build_optimizer(model, config.optim)
    return Engine(model, optimizer, mesh, device, config.train.precision, config.layout, config.optim.clip_norm)


def mesh_for(config: RunConfig, device: torch.device) -> Mesh | None:
    """The mesh of ``config`` over the running process group; None for a single process without one."""
    if not dist.is_initialized():
        ParallelDims.from_config(config.parallel, world_size=1)
        return None
    return build_mesh(ParallelDims.from_config(config.parallel, dist.get_world_size()), device.type)
