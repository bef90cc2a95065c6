"""Settings of the optimizer and the learning-rate schedule. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from models.config import Section


class ScheduleConfig(Section):
    """Learning rate as a pure function of the step."""

    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    """wsd: warm up, stay, decay linearly at the end; cosine: warm up, then half a cosine down; constant: warm up, then stay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Steps of linear warm-up from 0."""
    decay_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of train.steps spent in the final linear decay (wsd only)."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate at the last step as a fraction of optim.lr."""


class OptimConfig(Section):
    """The optimizer."""

    preset: Literal["adamw"] = "adamw"
    """Which optimizer."""
    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay on matrices; never on norms, biases, gates, convolutions and embeddings."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Global gradient norm above which gradients are scaled down; null switches clipping off."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning-rate schedule."""

    @model_validator(mode="after")
    def _check_betas(self) -> OptimConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} must lie in [0, 1)")
        return self
