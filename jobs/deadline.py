"""Durations as people write them, and when a run with a time limit must stop to have saved in time. Pure."""

import math
import re
import time
from collections import deque
from collections.abc import Callable

ASSUMED_BYTES_PER_S = 50e6  # of a first save, before one was measured
MARGIN_S = 5.0  # for the workers and the driver to end
_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_DURATION = re.compile(r"(?:(\d+)d)?\s*(?:(\d+)h)?\s*(?:(\d+)m)?\s*(?:(\d+(?:\.\d+)?)s)?", re.IGNORECASE)


def seconds(value: object) -> float:
    """Seconds of "3h30m", "1d 12h", "90s", or a number of seconds. Raises ValueError unless it is positive and finite."""
    found = math.nan
    if isinstance(value, str) and (match := _DURATION.fullmatch(value.strip())) and match[0]:
        found = sum(float(part) * unit for part, unit in zip(match.groups(), _UNITS.values(), strict=True) if part)
    elif re.fullmatch(r"\d+(\.\d+)?", str(value).strip()):
        found = float(str(value))
    if not (math.isfinite(found) and found > 0):
        raise ValueError("expected a duration such as 3h30m or 90s, or a positive number of seconds")
    return found


class Deadline:
    """Says when to stop so that the run is over by `end`, seconds since 1970 (None: never), with its last save.

    What must still fit in: the rest of this step and one more (each as long as the longest of the last ones), a save (one and a half
    times the longest so far; before the first, `state_bytes` at 50 MB/s) and MARGIN_S.
    """

    def __init__(self, end: float | None, state_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self._end, self._clock = end, clock
        self._steps: deque[float] = deque(maxlen=50)
        self._save = state_bytes / ASSUMED_BYTES_PER_S
        self._measured = False

    def step(self, duration_s: float) -> None:
        """A step has taken so long."""
        self._steps.append(duration_s)

    def saved(self, duration_s: float) -> None:
        """A save has taken so long, from gathering the state to the commit."""
        self._save = max(self._save, duration_s) if self._measured else duration_s
        self._measured = True

    def near(self) -> bool:
        """Whether the step under way must be the last. Of the first step that is never asked too early: a call gets on by one at least."""
        reserve = 2 * max(self._steps, default=0.0) + 1.5 * self._save + MARGIN_S
        return self._end is not None and self._clock() + reserve >= self._end
