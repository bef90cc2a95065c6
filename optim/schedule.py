"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from optim.config import OptimConfig


def learning_rate(step: int, config: OptimConfig, total_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (the first is 1) of ``total_steps``.

    Linear warm-up reaches ``config.lr`` at step ``warmup_steps``; the last step has ``lr * min_lr_ratio`` (wsd, cosine).
    """
    schedule = config.schedule
    if step < schedule.warmup_steps:
        return config.lr * step / schedule.warmup_steps
    if schedule.kind == "constant":
        return config.lr
    span = total_steps - schedule.warmup_steps
    if schedule.kind == "wsd":
        span = min(span, round(schedule.decay_fraction * total_steps))
    if span <= 0:
        return config.lr
    progress = min(1.0, max(0.0, 1.0 - (total_steps - step) / span))
    shape = 1.0 - progress if schedule.kind == "wsd" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * shape)
