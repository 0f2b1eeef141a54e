"""The learning-rate schedule, a pure function of the step."""

import math


def learning_rate(step: int, base: float, warmup_steps: int, total_steps: int, min_ratio: float) -> float:
    """Linear warm-up to `base`, then a half cosine down to `min_ratio * base` at `total_steps` (min_ratio 1:
    constant).

    `step` counts updates from 1, so that the first update already moves.
    """
    if step < warmup_steps:
        return base * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return base * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
