"""Where the time of an optimizer step goes, on this rank.

Parts follow each other: whatever passes between two marks belongs to the second one's part. On a GPU the marks are events on its
stream, read when the step is over, so that nothing waits for a measurement; a part is then what the GPU's time line shows, and a
wait for data that hides behind queued work is none.
"""

import time

import torch


class StepTimer:
    """Per step: `begin`, `mark` after each part, then `split`."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def begin(self) -> None:
        self._marks = [("", self._now())]

    def mark(self, part: str) -> None:
        """What passed since the last mark was `part`."""
        self._marks.append((part, self._now()))

    def split(self) -> dict[str, float]:
        """Part -> seconds of the step that has just ended. Waits for the GPU to have ended it."""
        seconds: dict[str, float] = {}
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            seconds[part] = seconds.get(part, 0.0) + _between(before, after)
        return seconds

    def _now(self) -> "float | torch.cuda.Event":
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _between(before: "float | torch.cuda.Event", after: "float | torch.cuda.Event") -> float:
    if isinstance(before, float) and isinstance(after, float):
        return after - before
    assert isinstance(before, torch.cuda.Event)
    assert isinstance(after, torch.cuda.Event)
    after.synchronize()
    return float(before.elapsed_time(after)) / 1000.0
