"""What changes from step to step, as pure functions of the step, so that a resumed run needs no scheduler state."""

import math

from cluster.options import OptimizerOptions


def learning_rate(step: int, total_steps: int, options: OptimizerOptions) -> float:
    """Rate of optimizer step `step` in [0, total_steps): linear warm-up, then what `options.schedule` says.

    Step 0 has `warmup_lr` (or `lr` without warm-up), the end of the warm-up `lr`. Then, down to `min_lr` at most:
    cosine: half a cosine that reaches `min_lr` at step `total_steps` (Loshchilov & Hutter, 2017);
    step: `lr` times `gamma` for each share of `milestones` that is behind;
    wsd: `lr` until the last `cooldown` of all steps, then a line that reaches `min_lr` at step `total_steps` (Hu et al., 2024).
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step: got {step}, expected 0 to {total_steps - 1}")
    warm = round(options.warmup * total_steps)
    if step < warm:
        return options.warmup_lr + (options.lr - options.warmup_lr) * step / warm
    if options.schedule == "step":
        passed = sum(step >= round(share * total_steps) for share in options.milestones)
        return max(options.lr * options.gamma**passed, min(options.min_lr, options.lr))
    if options.schedule == "wsd":
        left = max(1, min(round(options.cooldown * total_steps), total_steps - warm))
        return options.min_lr + (options.lr - options.min_lr) * min(1.0, (total_steps - step) / left)
    progress = (step - warm) / (total_steps - warm)
    return options.min_lr + (options.lr - options.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def average_decay(step: int, options: OptimizerOptions) -> float | None:
    """Share of the old average of the weights that remains after optimizer step `step` (from 0); None without an average.

    min(ema, (1 + step) / (10 + step)): it is small at first, so that the initial weights are soon forgotten (as TensorFlow's
    ExponentialMovingAverage has it for `num_updates`).
    """
    return min(options.ema, (1 + step) / (10 + step)) if options.ema else None
