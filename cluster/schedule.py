"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math

from cluster.options import OptimizerOptions


def learning_rate(step: int, total_steps: int, options: OptimizerOptions) -> float:
    """Rate of optimizer step `step` in [0, total_steps): linear warm-up, then half a cosine (Loshchilov & Hutter, 2017).

    Step 0 has `warmup_lr` (or `lr` without warm-up), the end of the warm-up `lr`, and `min_lr` would be step `total_steps`.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step: got {step}, expected 0 to {total_steps - 1}")
    warm = round(options.warmup * total_steps)
    if step < warm:
        return options.warmup_lr + (options.lr - options.warmup_lr) * step / warm
    progress = (step - warm) / (total_steps - warm)
    return options.min_lr + (options.lr - options.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
