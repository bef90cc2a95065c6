"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from optim.config import OptimConfig


def learning_rate(step: int, config: OptimConfig, total_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (the first is 1) of ``total_steps``.

    Linear warm-up reaches ``config.lr`` at step ``warmup_steps``; the last step has ``lr * min_lr_ratio`` (wsd, cosine, infinite).
    Infinite: arXiv 2403.08763, section 7; inverse_sqrt: arXiv 1706.03762, equation 3, with ``lr`` as the rate at its peak.
    """
    schedule = config.schedule
    if step < schedule.warmup_steps:
        return config.lr * step / schedule.warmup_steps
    after = step - schedule.warmup_steps
    if schedule.kind == "constant":
        return config.lr
    if schedule.kind == "inverse_sqrt":
        peak = max(1, schedule.warmup_steps)
        return config.lr * math.sqrt(peak / max(peak, step))
    last = _last_part(step, config, total_steps)
    if schedule.kind == "cosine":
        return config.lr * (schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * _cosine(last))
    if schedule.kind == "wsd":
        return config.lr * (schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * (1.0 - last))
    stays = schedule.constant_lr_ratio
    down = _cosine(min(1.0, after / schedule.cooldown_steps)) if schedule.cooldown_steps else 0.0
    return config.lr * (stays + (1.0 - stays) * down) * (schedule.min_lr_ratio / stays) ** last


def _last_part(step: int, config: OptimConfig, total_steps: int) -> float:
    """How much of the final decay is over, 0 to 1; a cosine decays from the end of the warm-up."""
    span = total_steps - config.schedule.warmup_steps
    if config.schedule.kind != "cosine":
        span = min(span, round(config.schedule.decay_fraction * total_steps))
    if span <= 0:
        return 0.0
    return min(1.0, max(0.0, 1.0 - (total_steps - step) / span))


def _cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))
