"""How often a gang is started again, and after how long: a policy that decides and does not act.

Only deaths without progress count. A gang that saved something before it died has the whole budget again and is replaced at once; one
that did not waits 0, 1, 2, 4, ... seconds before its next start, at most MAX_DELAY_S, because what kills it again and again (a full
machine, a file system that is away) may pass.
"""

from collections.abc import Callable

MAX_DELAY_S = 60.0


def no_progress() -> int:
    """For work that keeps nothing that could be counted: then every death counts."""
    return 0


class Restarts:
    """budget: restarts in a row without progress that are allowed. progress: how far the work is kept; must only grow."""

    def __init__(self, budget: int, progress: Callable[[], int]) -> None:
        self._budget, self._progress = budget, progress
        self._reached = progress()
        self._deaths = 0

    def delay_s(self) -> float | None:
        """After a death: seconds to wait before the next start; None when the budget is used up."""
        reached = self._progress()
        if reached > self._reached:
            self._reached, self._deaths = reached, 0
        self._deaths += 1
        if self._deaths > self._budget:
            return None
        return 0.0 if self._deaths == 1 else min(MAX_DELAY_S, 2.0 ** (self._deaths - 2))

    def verdict(self) -> str:
        """Why the last death was one too many."""
        return f"The workers died {self._deaths} times without getting further, more often than launch.max_restarts={self._budget} allows."
