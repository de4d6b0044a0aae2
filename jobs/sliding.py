"""Which stretches of a video are judged: the whole, and of a long one also windows that slide over it."""

import math
from dataclasses import dataclass

from jobs.errors import JobError
from pipeline.options import ClipOptions

LONG = 4.0  # a video more than so many windows long gets a timeline by itself
MAX_WINDOWS = 20_000  # of one video


@dataclass(frozen=True, slots=True, kw_only=True)
class Sliding:
    """What was asked for, in seconds. window: None for what one clip was trained to see; hop: None for half a window; more
    than a window leaves gaps, which is how a day of video is looked through.

    always: also for videos that are not long. Raises JobError for values that no window can have.
    """

    window: float | None = None
    hop: float | None = None
    always: bool = False

    def __post_init__(self) -> None:
        for name in ("window", "hop"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise JobError(f"--{name}: got {value}, expected a positive number of seconds.")

    def over(self, num_frames: int, fps: float, typical_s: float | None) -> list[tuple[int, int]]:
        """Windows [begin, end) in frames of a video, ascending; the last one ends with it. None where one look is enough.

        typical_s: seconds that one clip was trained to see; None where that is unknown. Raises JobError where they would be too many.
        """
        seconds = self.window or typical_s
        wanted = self.always or self.window is not None or self.hop is not None
        if seconds is None:
            return [(0, num_frames)] if wanted else []
        if not wanted and num_frames <= LONG * seconds * fps:
            return []
        hop_s = seconds / 2 if self.hop is None else self.hop
        length, hop = max(1, round(seconds * fps)), max(1, round(hop_s * fps))
        if length >= num_frames:
            return [(0, num_frames)]
        count = -(-(num_frames - length) // hop) + 1
        if count > MAX_WINDOWS:
            raise JobError(f"{count} windows, at most {MAX_WINDOWS} are judged of one video. Use a longer --hop.")
        return [(begin, begin + length) for begin in (min(i * hop, num_frames - length) for i in range(count))]


def clip_seconds(clip: ClipOptions, fps: float) -> float | None:
    """Seconds that one clip covers; None where a clip spreads over the whole video, whatever its length."""
    if clip.sampling != "dense":
        return None
    stride_s = clip.stride / fps if clip.stride_s is None else clip.stride_s
    return (clip.num_frames - 1) * stride_s + 1 / fps
