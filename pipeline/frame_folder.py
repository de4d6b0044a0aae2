"""A folder of numbered pictures as the frames of a video: which names, in which order, and whether one is missing. Pure.

Numbers may have any width and start anywhere; what stands before them is the same in all names. Of optical flow beside the frames
(`flow_x_00001.jpg`, as MMAction2 extracts it) nothing is taken.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
_STEM = re.compile(r"(.*?)([0-9]{1,18})")
SHOWN = 4  # names of series in a message


@dataclass(frozen=True, slots=True)
class Series:
    """Names of the frames in their order. problem: why they are no whole video, "" when they are one."""

    names: list[str]
    problem: str


def series_of(names: Iterable[str]) -> Series:
    """The frames among the names of a folder; empty when it holds no numbered picture."""
    found: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        stem, suffix = os.path.splitext(name)
        match = _STEM.fullmatch(stem)
        if match is not None and suffix.lower() in IMAGE_SUFFIXES:
            found.setdefault(match[1], []).append((int(match[2]), name))
    frames = {prefix: each for prefix, each in found.items() if not prefix.lower().startswith("flow")} or found
    if len(frames) > 1:
        listed = ", ".join(f"{prefix!r}" for prefix in sorted(frames)[:SHOWN])
        return Series([], f"{len(frames)} series of pictures, whose names begin with {listed}")
    numbered = sorted(next(iter(frames.values()), []))
    gaps = [(one, other) for one, other in pairwise(numbered) if other[0] != one[0] + 1]
    problem = ""
    if gaps:
        (before, first), (after, second) = gaps[0]
        twice = f"number {before} is there twice: {first}, {second}"
        missing = f"no picture has number {before + 1}" + (f" to {after - 1}" if after > before + 2 else "") + f"; {len(gaps)} gaps in all"
        problem = twice if before == after else missing
    return Series([name for _, name in numbered], problem)
