"""One run of the quality comparison: the small byte-level language model, its text, and training it with one optimizer.

The model is longstride's own decoder with plain attention (four layers of width 128, 857,216 parameters, 92 percent of them in matrices of
hidden layers, as in a model of 1B). The text is novels; one that is never trained on judges.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.batch import Batch, Bounds
from models.config import ModelConfig
from models.transformer import Transformer, init_weights
from optim.build import build_optimizer
from optim.clip import clip_grad_norm
from optim.config import OptimConfig
from optim.placement import storage_bytes
from optim.schedule import learning_rate

BYTES = 256
HELD_OUT = "moby-dick.txt"


@dataclass(frozen=True)
class Protocol:
    """What all runs of one comparison share."""

    steps: int = 400
    batch: int = 16
    seq_len: int = 128
    d_model: int = 128
    d_ff: int = 344
    layers: int = 4
    heads: int = 4
    warmup_steps: int = 40
    schedule: str = "cosine to a tenth"
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    rank: int = 32
    update_gap: int = 25
    judged_on: str = f"{HELD_OUT}: 512 windows of 128 bytes, after the last step"

    def config(self, preset: str, settings: dict[str, Any], lr: float, rest_lr: float | None) -> OptimConfig:
        """The optimizer's settings."""
        shared = {"lr": lr, "rest_lr": rest_lr, "betas": self.betas, "weight_decay": self.weight_decay, "clip_norm": self.clip_norm}
        schedule = {"kind": "cosine", "warmup_steps": self.warmup_steps, "min_lr_ratio": 0.1}
        return OptimConfig.model_validate({"preset": preset, **shared, "schedule": schedule, **settings})

    def as_json(self) -> dict[str, Any]:
        """As it is in a file and comes back from one."""
        return {**asdict(self), "betas": list(self.betas)}


VALIDATION_WINDOWS, VALIDATION_BATCH = 512, 64


class Text:
    """The training text and the windows that judge, bytes."""

    def __init__(self, books: Path, protocol: Protocol) -> None:
        """Raises FileNotFoundError where the books are not."""
        files = sorted(books.glob("*.txt"))
        if not any(file.name == HELD_OUT for file in files) or len(files) < 2:
            raise FileNotFoundError(f"{books} has no {HELD_OUT} and other novels beside it")
        self.length, self.batch = protocol.seq_len + 1, protocol.batch
        self.training = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files if f.name != HELD_OUT)), dtype=torch.uint8)
        held_out = torch.frombuffer(bytearray((books / HELD_OUT).read_bytes()), dtype=torch.uint8)
        starts = torch.linspace(0, len(held_out) - self.length, VALIDATION_WINDOWS).long().tolist()
        self.judging = torch.stack([held_out[at : at + self.length] for at in starts]).long()

    def sample(self, generator: torch.Generator) -> Tensor:
        """Windows for one step, [batch, seq_len + 1]."""
        starts = torch.randint(len(self.training) - self.length, (self.batch,), generator=generator).tolist()
        return torch.stack([self.training[at : at + self.length] for at in starts]).long()


def _batch(windows: Tensor) -> Batch:
    rows, length = windows.shape[0], windows.shape[1] - 1
    positions = torch.arange(length).expand(rows, -1)
    return Batch(windows[:, :-1], windows[:, 1:], positions, Bounds.whole(rows, length))


def small_model(protocol: Protocol, seed: int) -> Transformer:
    """The language model, filled by ``seed``."""
    shape: dict[str, Any] = {"d_model": protocol.d_model, "d_ff": protocol.d_ff, "n_layers": protocol.layers, "n_heads": protocol.heads}
    model = Transformer(ModelConfig(layers=("full",), **shape), BYTES)
    init_weights(model, seed)
    return model


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of everything in the optimizer's state, by storage."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum({tensor.untyped_storage().data_ptr(): storage_bytes(tensor) for tensor in tensors}.values())


def train(text: Text, protocol: Protocol, config: OptimConfig, seed: int) -> dict[str, Any]:
    """Train from ``seed`` (weights and order of the text, the same for every optimizer); what came of it.

    ``loss``: nats per byte of the held-out novel after the last step, None where training left the finite numbers.
    """
    started, in_optimizer = time.process_time(), []
    model, generator = small_model(protocol, seed), torch.Generator().manual_seed(seed)
    optimizer = build_optimizer(model, config)
    parameters = list(model.parameters())
    loss = math.nan
    for step in range(1, protocol.steps + 1):
        nll = model(_batch(text.sample(generator))).mean()
        nll.backward()
        loss = float(nll.detach())
        if not math.isfinite(loss):
            break
        clip_grad_norm(parameters, config.clip_norm, None)
        for group in optimizer.param_groups:
            group["lr"] = group["fixed_lr"] if "fixed_lr" in group else learning_rate(step, config, protocol.steps) * group["lr_factor"]
        before = time.process_time()
        optimizer.step()
        in_optimizer.append(time.process_time() - before)
        optimizer.zero_grad(set_to_none=True)
    judged = validation_loss(model, text) if math.isfinite(loss) else math.nan
    return {
        "loss": judged if math.isfinite(judged) else None,
        "state_bytes": state_bytes(optimizer),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "optimizer_milliseconds": round(1e3 * sum(in_optimizer) / max(1, len(in_optimizer)), 3),
        "cpu_seconds": round(time.process_time() - started, 1),
    }


@torch.no_grad()
def validation_loss(model: Transformer, text: Text) -> float:
    """Nats per byte of the held-out novel."""
    parts = [model(_batch(windows)).mean() for windows in text.judging.split(VALIDATION_BATCH)]
    return float(torch.stack(parts).mean())
