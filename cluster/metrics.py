"""What happened in a run: `metrics.jsonl`, one JSON object a line, appended and flushed line by line.

Every event has `event` (its kind), `time` (seconds since 1970) and `attempt`. A kill can tear the last line: the writer mends it
when it opens the file, the reader skips it. A restarted gang repeats the steps after its checkpoint: `merge_steps` keeps, for each
step, what the newest attempt said.
"""

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self


class MetricsWriter:
    """Appends events of one attempt. Several processes may append to one file: a line is a single write."""

    def __init__(self, path: Path, attempt: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._attempt = attempt
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            os.write(self._descriptor, b"\n")  # ends the torn line, which the reader then skips as one

    def write(self, event: str, **values: object) -> None:
        """Appends one event. Values are JSON; NaN and infinities are written as null, which JSON can hold."""
        record = {"event": event, "time": time.time(), "attempt": self._attempt, **values}
        os.write(self._descriptor, (json.dumps(_finite(record), ensure_ascii=False) + "\n").encode())

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_metrics(path: Path) -> list[dict[str, object]]:
    """All whole events in the order in which they were written; none if there is no file. Torn lines are skipped."""
    if not path.exists():
        return []
    events = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "event" in event:
                events.append(event)
    return events


def merge_steps(events: Iterable[dict[str, object]]) -> list[dict[str, object]]:
    """The events of kind "step", one per step, ascending: of several attempts the newest wins, of one attempt the last."""
    newest: dict[int, dict[str, object]] = {}
    for event in events:
        if event.get("event") != "step":
            continue
        step, attempt = int(str(event["step"])), int(str(event["attempt"]))
        known = newest.get(step)
        if known is None or int(str(known["attempt"])) <= attempt:
            newest[step] = event
    return [newest[step] for step in sorted(newest)]
