"""The learning rate as a pure function of the step: nothing to save, nothing to resume wrongly."""

from __future__ import annotations

import math

from dist_train.config import TrainSection

_WSD_DECAY = 0.2  # share of the steps over which warm-up-stable-decay decays (Hu et al., 2024, use 10 to 20 %)


def learning_rate(step: int, train: TrainSection) -> float:
    """Learning rate of optimizer step `step`, counted from 0: linear warm-up to the peak, then the named schedule."""
    peak, floor = train.learning_rate, train.learning_rate * train.final_learning_rate
    if step < train.warmup_steps:
        return peak * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(train.steps - train.warmup_steps, 1)
    match train.schedule:
        case "constant":
            return peak
        case "cosine":
            return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        case "wsd":
            return peak - (peak - floor) * max(0.0, (progress - 1 + _WSD_DECAY) / _WSD_DECAY)
