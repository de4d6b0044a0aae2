"""From `metrics.jsonl` to curves that a page can hold: read twice as a stream, in memory that does not grow with the run.

The first reading finds the attempts (how far each came, and when), the second puts every step into one of at most MAX_BINS bins
that keep the least and the greatest value, so that a single outlier among 10^6 steps stays visible. A step that a later attempt
did again is work lost, not a point of a curve: of several attempts the newest says what a step was, as in `merge_steps`.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

MAX_BINS = 480
METRICS = ("loss", "lr", "grad_norm", "clips_per_s", "data_wait", "step_s", "flops_share")
SMOOTH = 0.06  # share of a curve that its smoothed line averages over


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One gang's life as its metrics tell it. Steps count from 1; times are seconds since 1970, NaN where unknown.

    start: the step it resumed after (0: from the beginning). first, last: the steps it finished, 0 for none.
    redone, redone_s: how many of its steps a later attempt did again, and how long they had taken. reason: why it was restarted.
    """

    number: int
    start: int = 0
    world_size: int | None = None
    first: int = 0
    last: int = 0
    first_time: float = math.nan
    last_time: float = math.nan
    redone: int = 0
    redone_s: float = 0.0
    reason: str | None = None
    ended: bool = False

    @property
    def reached(self) -> int:
        return max(self.start, self.last)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Values over x in bins of ascending x: their least, greatest and mean. Bins without a number are left out."""

    x: list[float]
    low: list[float]
    high: list[float]
    mean: list[float]

    def smooth(self) -> list[float]:
        """For each bin the mean over the bins around it, SMOOTH of the curve in all."""
        half = max(1, round(len(self.x) * SMOOTH / 2))
        sums = list(accumulate(self.mean, initial=0.0))
        windows = [(max(0, i - half), min(len(self.x), i + half + 1)) for i in range(len(self.x))]
        return [(sums[end] - sums[begin]) / (end - begin) for begin, end in windows]

    def path(self) -> list[tuple[float, float]]:
        """Points of a line through the extremes of every bin."""
        points: list[tuple[float, float]] = []
        for x, low, high in zip(self.x, self.low, self.high, strict=True):
            near_high = points and abs(points[-1][1] - high) < abs(points[-1][1] - low)
            points += [(x, low)] if low == high else [(x, high), (x, low)] if near_high else [(x, low), (x, high)]
        return points


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What a run's metrics say. curves: metric -> values over steps. progress: steps over seconds since `began`.

    last_step, epoch: how far the run is. busy_s: seconds of the steps that count; waited_s: of these, waiting for data; clips: in them.
    nonfinite: steps whose loss was no finite number.
    parts: part of a step, "checkpoint" or "validation" -> seconds of rank 0 in it, of the steps that count; {} where nobody measured.
    choice: step -> share right in a validation while training, of several attempts the newest. choice_loss: likewise, nats.
    checkpoints, checkpoint_bytes: number saved, size of the last. torn: lines that are no event, as a kill leaves them.
    """

    attempts: list[Attempt]
    curves: Mapping[str, Curve]
    progress: Curve
    began: float
    last_step: int
    epoch: float
    busy_s: float
    waited_s: float
    clips: float
    nonfinite: int
    checkpoints: int
    checkpoint_bytes: int
    torn: int
    parts: Mapping[str, float]
    choice: Curve
    choice_loss: Curve


def read_events(path: Path) -> Iterator[dict[str, object] | None]:
    """The events of a JSON-lines file, one at a time, in file order; None for a line that is no event. Nothing without a file."""
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:
                yield None
            else:
                yield event if isinstance(event, dict) and "event" in event else None


def read_history(path: Path) -> History:
    """Reads `metrics.jsonl`; a missing, empty or torn file is a short history, not an error."""
    attempts: dict[int, Attempt] = {}
    kinds: Counter[str] = Counter()
    size = 0
    began = math.inf
    validations: dict[int, dict[str, object]] = {}
    pauses = {"checkpoint": 0.0, "validation": 0.0}  # between steps
    for event in read_events(path):
        kinds[str(event["event"]) if event else ""] += 1
        if event:
            began = min(began, number(event, "time", math.inf))
            size = whole(event, "bytes", size) if event["event"] == "checkpoint" else size
            _note(attempts, event)
            if (name := str(event["event"])) in pauses:
                pauses[name] += number(event, "seconds", 0.0)
            if event["event"] == "validation":
                validations[whole(event, "step")] = event
    ordered = [attempts[key] for key in sorted(attempts)]
    began = began if math.isfinite(began) else 0.0
    steps = _read_steps(path, ordered, began)
    return History(
        attempts=ordered,
        curves={name: bins.curve() for name, bins in steps.bins.items()},
        progress=steps.progress.curve(),
        began=began,
        last_step=max((attempt.last for attempt in ordered), default=0),
        epoch=steps.epoch,
        busy_s=steps.busy_s,
        waited_s=steps.waited_s,
        clips=steps.clips,
        nonfinite=steps.nonfinite,
        checkpoints=kinds["checkpoint"],
        checkpoint_bytes=size,
        torn=kinds[""],
        parts=steps.parts | {name: seconds for name, seconds in pauses.items() if seconds and steps.parts},
        choice=_points({step: number(event, "top1") for step, event in validations.items()}),
        choice_loss=_points({step: number(event, "loss") for step, event in validations.items()}),
    )


def _points(values: Mapping[int, float]) -> Curve:
    """A curve of few values, each its own bin."""
    known = sorted((step, value) for step, value in values.items() if not math.isnan(value))
    x, y = [float(step) for step, _ in known], [value for _, value in known]
    return Curve(x=x, low=y, high=y, mean=y)


def number(event: Mapping[str, object], name: str, default: float = math.nan) -> float:
    """A finite number of an event, else `default`."""
    value = event.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else default


def whole(event: Mapping[str, object], name: str, default: int = 0) -> int:
    """A whole number of an event, else `default`."""
    value = event.get(name)
    return value if isinstance(value, int) else default


def _note(attempts: dict[int, Attempt], event: Mapping[str, object]) -> None:
    """First reading: what one event says about its attempt."""
    key = whole(event, "attempt")
    attempt = attempts.get(key)
    if attempt is None:
        attempt = attempts[key] = Attempt(number=key)
    match event["event"]:
        case "step":
            step = whole(event, "step")
            if not attempt.first:
                attempt.first, attempt.first_time = step, number(event, "time")
            attempt.last, attempt.last_time = max(attempt.last, step), number(event, "time")
        case "attempt":
            attempt.start, attempt.world_size = whole(event, "step"), whole(event, "world_size") or None
        case "restart" if attempt.reason is None:
            attempt.reason = str(event.get("reason", "unknown"))
        case "end":
            attempt.ended = True


class _Bins:
    """Least, greatest, sum and number of values over x in [begin, end]."""

    def __init__(self, begin: float, end: float, num: int) -> None:
        self._begin, self._num = begin, num
        self._scale = num / (end - begin) if end > begin else 0.0
        self._low, self._high = [math.inf] * num, [-math.inf] * num
        self._sum, self._x, self._count = [0.0] * num, [0.0] * num, [0] * num

    def add(self, x: float, value: float) -> None:
        i = min(int((x - self._begin) * self._scale), self._num - 1)
        self._count[i] += 1
        self._sum[i] += value
        self._x[i] += x
        if value < self._low[i]:
            self._low[i] = value
        if value > self._high[i]:
            self._high[i] = value

    def curve(self) -> Curve:
        used = [i for i, count in enumerate(self._count) if count]
        return Curve(
            x=[self._x[i] / self._count[i] for i in used],
            low=[self._low[i] for i in used],
            high=[self._high[i] for i in used],
            mean=[self._sum[i] / self._count[i] for i in used],
        )


@dataclass(slots=True, kw_only=True)
class _Steps:
    bins: dict[str, _Bins]
    progress: _Bins
    epoch: float = 0.0
    busy_s: float = 0.0
    waited_s: float = 0.0
    clips: float = 0.0
    nonfinite: int = 0
    parts: dict[str, float] = field(default_factory=dict)


def _add_parts(total: dict[str, float], event: Mapping[str, object]) -> None:
    """Adds where a step's time went; what nobody marked is "other"."""
    parts = event.get("parts")
    if not isinstance(parts, dict):
        return
    left = number(event, "step_s", 0.0)
    for name in parts:
        seconds = number(parts, name, 0.0)
        total[name], left = total.get(name, 0.0) + seconds, left - seconds
    total["other"] = total.get("other", 0.0) + max(0.0, left)


def _read_steps(path: Path, attempts: list[Attempt], began: float) -> _Steps:
    """Second reading: every step into its bin, or onto the bill of the attempt that lost it."""
    done = [attempt for attempt in attempts if attempt.first]
    low, high = (min(a.first for a in done), max(a.last for a in done)) if done else (0, 0)
    span = max((a.last_time - began for a in done if math.isfinite(a.last_time)), default=0.0)
    num = max(1, min(MAX_BINS, high - low + 1))
    steps = _Steps(bins={name: _Bins(low, high + 1, num) for name in METRICS}, progress=_Bins(0.0, span, MAX_BINS))
    known = {attempt.number: attempt for attempt in done}
    later = {attempt.number: [a for a in done if a.number > attempt.number] for attempt in done}
    for event in read_events(path):
        attempt = known.get(whole(event, "attempt")) if event and event["event"] == "step" else None
        if not event or attempt is None:
            continue
        step = min(max(whole(event, "step"), low), high)
        steps.progress.add(min(max(number(event, "time", began) - began, 0.0), span), step)
        seconds = number(event, "step_s", 0.0)
        if any(a.first <= step <= a.last for a in later[attempt.number]):
            attempt.redone += 1
            attempt.redone_s += seconds
            continue
        steps.busy_s += seconds
        steps.waited_s += seconds * number(event, "data_wait", 0.0)
        steps.clips += seconds * number(event, "clips_per_s", 0.0)
        steps.epoch = max(steps.epoch, number(event, "epoch", 0.0))
        _add_parts(steps.parts, event)
        steps.nonfinite += math.isnan(number(event, "loss"))
        for name, bins in steps.bins.items():
            value = number(event, name)
            if not math.isnan(value):
                bins.add(step, value)
    return steps
