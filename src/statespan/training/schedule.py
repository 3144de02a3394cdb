"""The learning rate over a run: linear warm-up, then cosine, warmup-stable-decay, or constant.

Time is the progress p in (0, 1], the share of the run done when an update is made: (step + 1) / max_steps, or the
share of max_seconds used, or the larger where both limit the run. So one schedule serves runs of steps and of minutes.
"""

import math

from statespan.training.config import ScheduleConfig


def learning_rate_factor(progress: float, config: ScheduleConfig) -> float:
    """Learning rate / peak learning rate at progress p, with w the warm-up, f the final ratio, d the decay share.

    warm-up   p / w                                      for p < w
    cosine    f + (1 - f) (1 + cos(pi (p - w) / (1 - w))) / 2     (arXiv 1608.03983)
    wsd       1, then f + (1 - f) (1 - p) / d             for p > 1 - d   (arXiv 2404.06395, linear decay)
    constant  1

    Args:
        progress: share of the run done, 0 to 1; more counts as 1.
        config: kind and shares.

    Example:
        >>> learning_rate_factor(1.0, ScheduleConfig(final_ratio=0.1))
        0.1
    """
    p, w, f, d = min(progress, 1.0), config.warmup_fraction, config.final_ratio, config.decay_fraction
    if p < w:
        return p / w
    match config.kind:
        case "cosine":
            share = (p - w) / (1 - w) if w < 1 else 1.0
            return f + (1 - f) * (1 + math.cos(math.pi * share)) / 2
        case "wsd":
            return f + (1 - f) * (1 - p) / d if p > 1 - d else 1.0
        case "constant":
            return 1.0


def progress(step: int, seconds: float, max_steps: int | None, max_seconds: float | None) -> float:
    """The share of the run done after `step` steps and `seconds` seconds of training; 1 or more: the run is over."""
    by_steps = step / max_steps if max_steps is not None else 0.0
    by_seconds = seconds / max_seconds if max_seconds is not None else 0.0
    return max(by_steps, by_seconds)
