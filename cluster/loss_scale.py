"""The factor by which a loss is multiplied so that its gradients stay representable in fp16, and how it finds itself.

Powers of two, so that scaling loses nothing. A step whose gradients overflow halves it and is passed over; GROWTH good steps in a row
double it (as torch's GradScaler does).
"""

GROWTH = 2000
FIRST, LEAST, MOST = 2.0**16, 1.0, 2.0**24


class LossScale:
    """value: the factor. good: steps since it last changed. overflows: steps of the run that were passed over. The whole state."""

    def __init__(self) -> None:
        self.value, self.good, self.overflows = FIRST, 0, 0

    @property
    def may_shrink(self) -> bool:
        """Whether a gradient that is not finite may be the scale's fault."""
        return self.value > LEAST

    def applied(self) -> None:
        """A step was finite."""
        self.good += 1
        if self.good >= GROWTH and self.value < MOST:
            self.value, self.good = self.value * 2, 0

    def overflowed(self) -> None:
        """A step was not, and was passed over."""
        self.value, self.good, self.overflows = max(LEAST, self.value / 2), 0, self.overflows + 1
