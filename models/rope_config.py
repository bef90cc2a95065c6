"""Settings of the rotary position embedding. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from models.section import PositiveInt, Section


class RopeConfig(Section):
    """Rotary position embedding."""

    theta: float = Field(default=10_000.0, gt=1.0)
    """Base of the rotation frequencies."""
    scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"
    """How a model is stretched past its original length."""
    factor: float = Field(default=1.0, ge=1.0)
    """Stretch: new length over original length (used by every scaling except none)."""
    original_max_positions: PositiveInt = 8192
    """Positions the unscaled rotation was meant for (used by yarn and llama3)."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """llama3: pairs that turn fewer times than this within the original length are slowed down by the whole factor."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """llama3: pairs that turn more often than this are left as they are."""
    beta_fast: float = Field(default=32.0, gt=0)
    """yarn: pairs that turn more often than this within the original length are left as they are."""
    beta_slow: float = Field(default=1.0, gt=0)
    """yarn: pairs that turn fewer times than this are slowed down by the whole factor."""
    attention_factor: float | None = Field(default=None, gt=0)
    """yarn: factor on the rotated q and k; null means 0.1 ln(factor) + 1."""

    @model_validator(mode="after")
    def _check_bands(self) -> RopeConfig:
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(f"{low} {getattr(self, low)} is not below {high} {getattr(self, high)}")
        return self
