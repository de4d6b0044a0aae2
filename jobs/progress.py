"""Progress of long work: a live bar on a terminal, a plain line every few seconds elsewhere; both with rate and time left."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

PLAIN_INTERVAL_S = 10.0


class Progress:
    """Counts `total` units of work. `done` units that an earlier run finished count as done, not towards the rate."""

    def __init__(self, label: str, *, total: int, unit: str, done: int = 0, stream: TextIO | None = None) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._before, self._done = done, done
        self._start = self._printed = time.monotonic()
        self._stream = stream if stream is not None else sys.stderr
        self._bar: RichProgress | None = None
        if self._stream.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
            more = (TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self._bar = RichProgress(*columns, *more, console=Console(file=self._stream))
            self._task = self._bar.add_task(label, total=total, completed=done, note="")
            self._bar.start()

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more units are done; `note` (loss, accuracy, last shard) is shown beside them."""
        self._done += count
        if self._bar is not None:
            self._bar.update(self._task, advance=count, note=f"{self._rate()} {note}")
        elif time.monotonic() - self._printed >= PLAIN_INTERVAL_S or (count and self._done >= self._total):
            self._print(note)

    def _rate(self) -> str:
        elapsed = max(time.monotonic() - self._start, 1e-9)
        return f"{(self._done - self._before) / elapsed:.2f} {self._unit}/s"

    def _print(self, note: str) -> None:
        self._printed = time.monotonic()
        elapsed = max(self._printed - self._start, 1e-9)
        rate = (self._done - self._before) / elapsed
        left = f", {_clock((self._total - self._done) / rate)} left" if rate > 0 and self._done < self._total else ""
        suffix = f" · {note}" if note else ""
        counted = f"{self._label}: {self._done}/{self._total} {self._unit}, {self._rate()}"
        print(f"{counted}, {_clock(elapsed)}{left}{suffix}", file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
