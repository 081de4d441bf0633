"""When a run validates, and the learning rate at each step: a linear warm-up, then a schedule.

cosine     half a cosine down to the smallest rate, at the last step
constant   no decay: a run can go on for more steps at any time
wsd        warm-up, stable, decay (Hu et al., MiniCPM, arXiv 2404.06395): constant, then down in a
           straight line over the last steps; before that the run can be given other steps
"""

import math
from collections.abc import Callable

from demo.config.schema import OptimConfig, TrainConfig


def steps_between_validations(config: TrainConfig) -> int:
    """On the way; 0 for none."""
    every = config.trainer.validate_every
    return max(1, config.optim.steps // 10) if every is None else every


def warmup_steps(optim: OptimConfig) -> int:
    """How many there are; those of a preset that do not fit are as good as none given."""
    steps = optim.warmup_steps
    return min(40, optim.steps // 10) if steps is None or steps > optim.steps else steps


def learning_rate_factor(optim: OptimConfig) -> Callable[[int], float]:
    """What to multiply the learning rate by at a step, counted from 0."""
    floor = optim.min_learning_rate_ratio
    if optim.min_learning_rate is not None:
        floor = optim.min_learning_rate / optim.learning_rate
    warmup, decay = warmup_steps(optim), optim.decay_steps
    if decay is None:
        decay = optim.steps // 5

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if optim.schedule == "constant":
            return 1.0
        first = optim.steps - decay if optim.schedule == "wsd" else warmup
        progress = min(1.0, max(0, step - first) / max(1, optim.steps - first))
        left = 1 - progress
        if optim.schedule == "cosine":
            left = (1 + math.cos(math.pi * progress)) / 2
        return floor + (1 - floor) * left

    return factor
