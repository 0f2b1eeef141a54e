"""What changes over a training: the learning rate and the depth of the recursion, pure functions of the
step."""

import math
from collections.abc import Sequence


def learning_rate(step: int, base: float, warmup_steps: int, total_steps: int, min_ratio: float) -> float:
    """Linear warm-up to `base`, then a half cosine down to `min_ratio * base` at `total_steps` (min_ratio 1:
    constant).

    `step` counts updates from 1, so that the first update already moves.
    """
    if step < warmup_steps:
        return base * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return base * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def cycles_at(step: int, stages: Sequence[Sequence[float]], total_steps: int) -> tuple[int, int]:
    """H and L cycles of the update after `step` others.

    stages: [share of the training at which it begins, H cycles, L cycles] each, in order, the first from 0.
    Source: the curriculum of depth of CGAR (arXiv 2511.08653).
    """
    begun = [stage for stage in stages if step >= stage[0] * total_steps]
    _, answers, latent = begun[-1]
    return int(answers), int(latent)
