"""The arithmetic of the canonical form: which size, which way up, which frame when. Pure, so that it can be tested without a video."""

import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path
from typing import Generic, Self, TypeVar

from pipeline.quarantine import Reason, RejectedError

MULTIPLE = 16  # both sides become multiples of it: only then does NVDEC reuse its decoding session

SLACK_S = 0.0005

Frame = TypeVar("Frame")


def canonical_size(width: int, height: int, sample_aspect: Fraction, short_side: int) -> tuple[int, int]:
    """Width and height (multiples of 16) of a video of square pixels that neither enlarges a side nor exceeds `short_side`.

    Rounds to the nearest multiple of 16 that fits the source, so the aspect ratio may change by some per cent.
    """
    aspect = sample_aspect if Fraction(1, 8) <= sample_aspect <= 8 else Fraction(1)
    display = (width * aspect, Fraction(height))
    scale = min(width / display[0], height / display[1], short_side / min(display))
    return _nearest(display[0] * scale, width), _nearest(display[1] * scale, height)


def _nearest(wanted: Fraction, limit: int) -> int:
    multiple = math.floor(wanted / MULTIPLE + Fraction(1, 2)) * MULTIPLE
    return max(MULTIPLE, min(multiple, limit // MULTIPLE * MULTIPLE))


def orientation(matrix: bytes) -> tuple[bool, bool, bool]:
    """(transpose, then flip rows, flip columns): what a display matrix (9 int32, FFmpeg's) asks for, to the nearest quarter turn.

    It maps a source pixel (x, y) to (a x + c y, b x + d y). Empty: nothing to do.
    """
    if not matrix:
        return False, False, False
    a, b, _, c, d = struct.unpack("=9i", matrix[:36])[:5]
    if abs(a) >= abs(b):
        return False, d < 0, a < 0
    return True, b < 0, c < 0


@dataclass(frozen=True, slots=True)
class Timed(Generic[Frame]):
    """A frame, its time in seconds from the stream's start, and its stated duration in seconds."""

    frame: Frame
    time: Fraction
    duration: Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Which frames of a source a canonical video shows, by their times in seconds from the source's start.

    decoded: of all frames decoded within the wanted window. shown: of the one that each canonical frame shows; the same unless resampled.
    end_s: where the last decoded one ends. width, height: of the decoded picture in pixels, turned upright.
    """

    decoded: list[float]
    shown: list[float]
    end_s: float
    width: int
    height: int

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="ascii")

    @classmethod
    def read(cls, path: Path) -> Self:
        return cls(**json.loads(path.read_text(encoding="ascii")))


def within(frames: Iterable[Timed[Frame]], start_s: float | None, end_s: float | None) -> Iterator[Timed[Frame]]:
    """Frames in [start_s, end_s); stops reading behind the end. Half a millisecond off still counts as on the bound.

    Containers round timestamps to milliseconds, and 0.4 has no exact binary form.
    """
    for each in frames:
        if end_s is not None and each.time >= end_s - SLACK_S:
            return
        if start_s is None or each.time >= start_s - SLACK_S:
            yield each


def resample(frames: Iterator[Timed[Frame]], rate: Fraction, max_frames: int) -> Iterator[Timed[Frame]]:
    """Shows each frame from its own time, rounded to a tick of `rate`, to the next one's: repeats and drops as needed.

    Raises RejectedError past `max_frames`, which one wild timestamp could otherwise ask for.
    """
    first = next(frames, None)
    if first is None:
        return
    start, tick = first.time, 0
    for each, following in pairwise(chain([first], frames, [None])):
        assert each is not None
        until = following.time if following is not None else each.time + each.duration
        end = math.floor((until - start) * rate + Fraction(1, 2))
        end = max(end, 1) if following is None else end  # even the shortest video keeps a frame
        if end > max_frames:
            raise RejectedError(Reason.TOO_MANY_FRAMES, f"{end} at {float(rate):g} per second, limits.max_frames is {max_frames}")
        for _ in range(tick, end):
            yield each
        tick = max(tick, end)
