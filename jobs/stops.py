"""The times a run was stopped and resumed, and what each cost, as its metrics tell it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.charts import duration
from jobs.curves import Attempt, History


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """A gang that ended before its work was done, and what that cost.

    reached, resumed: the last step it had finished, and the one its successor started after. redone, redone_s: steps done again and
    the seconds they had taken. pause_s: from its last finished step to the next one of the run, NaN while there is none.
    """

    what: str
    reached: int
    resumed: int
    redone: int
    redone_s: float
    pause_s: float
    workers: str
    at: float  # seconds since the run began

    def __str__(self) -> str:
        left = self.reached - self.resumed - self.redone
        cost = f"{self.redone} steps ({duration(self.redone_s)} of work) done again" if self.redone else "no step lost" if left <= 0 else ""
        cost = ", ".join(filter(None, [cost, f"{left} steps to do again" if left > 0 else ""]))
        pause = "" if math.isnan(self.pause_s) else f", {duration(self.pause_s)} from its last step to the next"
        return f"{self.what} after step {self.reached}: resumed from step {self.resumed}, {cost}{pause}"


def stops(history: History) -> list[Stop]:
    """Every end of a gang that another one followed, oldest first."""
    alive = [attempt for attempt in history.attempts if attempt.number]
    return [_stop(history, alive[: i + 1], alive[i + 1 :]) for i in range(len(alive) - 1)]


def _stop(history: History, before: Sequence[Attempt], after: Sequence[Attempt]) -> Stop:
    attempt, successor = before[-1], after[0]
    last_times = [a.last_time for a in before if not math.isnan(a.last_time)]
    next_times = [a.first_time for a in after if not math.isnan(a.first_time)]
    pause = max(0.0, next_times[0] - last_times[-1]) if last_times and next_times and attempt.last else math.nan
    if attempt.reason is not None:
        what = attempt.reason[:1].upper() + attempt.reason[1:]
    else:
        what = "Continued after its end" if attempt.ended else "The run was stopped and started again"
    sizes = [str(a.world_size or "?") for a in (attempt, successor)]
    return Stop(
        what=what,
        reached=attempt.reached,
        resumed=successor.start,
        redone=attempt.redone,
        redone_s=attempt.redone_s,
        pause_s=pause,
        workers=sizes[0] if sizes[0] == sizes[1] else " to ".join(sizes),
        at=(last_times[-1] if last_times else history.began) - history.began,
    )
