"""Which steps are not worth taking, and how many of them a run may have. Sees reduced figures only, so all ranks decide alike.

A step is bad when its loss or gradient norm is not finite, or, with `optimizer.max_spike`, when its loss is more than that many times
the running mean of the losses before it (an exponential mean over about MEMORY steps, asked from the MEMORY-th on). A bad step leaves
weights, moments, averages and statistics as they were; its position in the stream is used up. Past `optimizer.max_skipped` bad steps
the run ends.
"""

import math

from cluster.errors import ClusterError
from cluster.options import OptimizerOptions

MEMORY = 20


class Guard:
    """mean, seen: of the losses of good steps, and how many there were; the whole state."""

    def __init__(self, options: OptimizerOptions) -> None:
        self._options = options
        self.mean, self.seen = 0.0, 0

    @property
    def bound(self) -> float:
        """The greatest loss that the next step may have."""
        if not self._options.max_spike or self.seen < MEMORY:
            return math.inf
        return self._options.max_spike * self.mean

    def judge(self, step: int, loss: float, norm: float) -> str | None:
        """What is bad about a step, as in "loss of step 7 is nan"; None for a good one, which then counts."""
        if not math.isfinite(loss):
            return f"loss of step {step} is {loss}"
        if loss > self.bound:
            return f"loss of step {step} is {loss:.4g}, {loss / self.mean:.3g} times the mean of the steps before"
        if not math.isfinite(norm):
            return f"gradient norm of step {step} is {norm}"
        self.seen += 1
        self.mean += (loss - self.mean) / min(self.seen, MEMORY)
        return None

    def skip(self, problem: str, skipped: int, rate: float) -> None:
        """Lets a bad step pass as number `skipped` of the run, or raises ClusterError."""
        if skipped <= self._options.max_skipped:
            return
        budget = f" It is bad step number {skipped}, more than optimizer.max_skipped={self._options.max_skipped} allows."
        raise ClusterError(
            f"The {problem} at learning rate {rate:.3g}: training has diverged."
            f"{budget if self._options.max_skipped else ''} "
            "Lower optimizer.lr or optimizer.clip_grad, or set engine.precision=fp32; the last checkpoint is from before."
        )
