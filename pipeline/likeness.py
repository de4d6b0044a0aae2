"""Which videos are the same: equal bytes, or equal to look at whatever the container, the codec and the size.

Two digests of each item are taken while it is transcoded. `source_digest` is of the file's bytes and of the wanted part of it. `Likeness`
is of what is seen: luma averaged over 8 x 8 equal parts of the frame, once over the whole time (the still) and once over each of 8 equal
spans of it, as differences from the still (the motion). Two items are alike when their stills differ by STILL levels or less and their
motion by less than MOTION of what moves, beside what encoding again changes. One scene filmed twice has the same still and another motion.
Cropping, trimming, mirroring and captions change more than that: such copies are not found. docs/benchmarks.md says how often it errs.

`duplicates` finds what is the same. This file is also for the child process that reads a video: it imports NumPy alone.
"""

import hashlib
from collections.abc import Sequence
from io import BufferedReader
from itertools import pairwise

import numpy as np
import numpy.typing as npt

SIDE, SPANS = 8, 8
STILL_BYTES = SIDE * SIDE
CONTENT_BYTES = (1 + SPANS) * STILL_BYTES
SOURCE_BYTES = 16
STEPS = 4  # of motion in one level

Bytes = npt.NDArray[np.uint8]


def source_digest(file: BufferedReader, start_s: float | None, end_s: float | None) -> bytes:
    """16 bytes, equal for equal files of which the same part is wanted."""
    whole = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=SOURCE_BYTES)).digest()
    return hashlib.blake2b(whole + repr((start_s, end_s)).encode(), digest_size=SOURCE_BYTES).digest()


def joined_digest(digests: Sequence[bytes]) -> bytes:
    """16 bytes for a source of several files, in their order; of one, its own."""
    return digests[0] if len(digests) == 1 else hashlib.blake2b(b"".join(digests), digest_size=SOURCE_BYTES).digest()


class Likeness:
    """Sees all frames of an item, one by one, and then says its digest."""

    def __init__(self) -> None:
        self._frames: list[npt.NDArray[np.float32]] = []

    def add(self, luma: Bytes) -> None:
        """luma: (H, W) of a frame, both sides multiples of 8."""
        height, width = luma.shape
        rows = luma.reshape(SIDE, height // SIDE, width).sum(axis=1, dtype=np.uint32)
        sums = rows.reshape(SIDE, SIDE, width // SIDE).sum(axis=2, dtype=np.uint32)
        self._frames.append(sums.astype(np.float32) * np.float32(SIDE * SIDE / (height * width)))

    def digest(self) -> bytes:
        """576 bytes, of at least one frame, from the top left: the still in levels, then each span's motion in int8 quarters of a level."""
        frames = np.stack(self._frames)  # (T, 8, 8)
        edges = [span * len(frames) / SPANS for span in range(SPANS + 1)]
        spans = np.stack([frames[int(begin) : max(int(end), int(begin) + 1)].mean(axis=0) for begin, end in pairwise(edges)])
        still = spans.mean(axis=0)
        motion = np.clip(np.rint((spans - still) * STEPS), -127, 127).astype(np.int8)
        return bytes(np.rint(still).astype(np.uint8).tobytes() + motion.tobytes())
