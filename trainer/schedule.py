"""The learning rate's schedule."""

from __future__ import annotations

import math

from trainer.settings import Settings


def learning_rate(s: Settings, step: int) -> float:
    """Linear warm-up, then a cosine from learning_rate to min_lr at lr_decay_iters. Steps count from 0."""
    if not s.decay_lr:
        return s.learning_rate
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    if step >= s.lr_decay_iters:
        return s.min_lr
    done = (step - s.warmup_iters) / (s.lr_decay_iters - s.warmup_iters)
    return s.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (s.learning_rate - s.min_lr)
