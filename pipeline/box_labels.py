"""Label files of boxes, gathered by video: AVA's, and CSV with a box a row. They are streamed; a row takes 56 bytes until all is read.

What cannot be right whatever the video is an error that names the line: no number, a fraction outside 0 to 1, a box without area. What
depends on the video, whether a keyframe is in it and a box in its frame, is the build's to see.
"""

import math
import sys
from array import array
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.boxes import CORNERS, LABELLED, NO_PERSON, Boxes
from pipeline.errors import ManifestError
from pipeline.label_file import Table

CUT_S = 900.0  # where the usual preparation of AVA cuts its videos; their labels count from the whole video's begin
MAX_TIME = 1e7  # seconds or frames
SHOWN = 60  # characters of a cell in a message
_FIELDS = len(LABELLED.names or ())


@dataclass(slots=True, kw_only=True)
class _Video:
    """line: of the first row. cells: LABELLED's fields of each row, one after the other."""

    line: int
    splits: tuple[str, ...]
    group: str
    cells: "array[float]" = field(default_factory=lambda: array("d"))


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoBoxes:
    """What a file says of one video. line: where it names it first. boxes: their labels are numbers of `BoxLabels.names`."""

    video: str
    line: int
    splits: tuple[str, ...]
    group: str
    boxes: Boxes

    def time_range(self) -> tuple[float, float]:
        """Of its first and last keyframe, as the labels say it."""
        times = self.boxes.rows["time"]
        return float(times[0]), float(times[-1])


class BoxLabels:
    """Reads files of boxes. names: the labels as the files write them, in the order in which they are met.

    excluded: keyframes (video, second) that are passed over.
    """

    def __init__(self, excluded: Container[tuple[str, float]] = frozenset()) -> None:
        self._excluded = excluded
        self._numbers: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        return list(self._numbers)

    def read(self, table: Table, path: Path, columns: Sequence[str], split: str, known: Container[str] | None) -> list[VideoBoxes]:
        """The videos of one file, in its order. columns: the split columns; split: of the whole file, "" for none. known: labels that
        may be, None for any. Raises ManifestError naming the line.
        """
        place = {name: number for number, name in enumerate(table.columns)}
        timed, in_pixels = table.format != "boxes", "x1" in place and table.format == "boxes"
        when = "time" if timed else "frame"
        corners = [place.get(name, place.get(f"{name}_frac", 0)) for name in CORNERS]
        own = [place[name] for name in columns if name in place]
        videos: dict[str, _Video] = {}
        for line, record in table.records:
            where = f"{path}, {table.unit} {line}"
            name, label = record[place["path"]].strip(), record[place["label"]].strip()
            time = _time(where, when, record[place[when]])
            if not name or not label:
                raise ManifestError(f"{where}: its {'label' if name else 'video'} is empty.")
            if known is not None and label not in known:
                raise ManifestError(f"{where}: label '{label[:SHOWN]}' is not in the file that numbers the classes.")
            splits = tuple(record[at].strip() for at in own) if own else (split,) * len(columns)
            group = record[place["group"]].strip() if "group" in place else ""
            video = videos.get(name)
            if video is None:
                video = videos[name] = _Video(line=line, splits=splits, group=group)
            elif (splits, group) != (video.splits, video.group):
                raise ManifestError(f"{where}: '{name}' has another split or group here than in line {video.line}. A video has one.")
            box = _box(where, [record[at] for at in corners], in_pixels)
            if (name, time) not in self._excluded:
                person = _person(where, record[place["person"]]) if "person" in place else NO_PERSON
                number = self._numbers.setdefault(sys.intern(label), len(self._numbers))
                video.cells.extend((time, *box, person, number))
        origin_s = CUT_S if table.format == "ava_cut" else 0.0
        return [
            VideoBoxes(
                video=name,
                line=video.line,
                splits=video.splits,
                group=video.group,
                boxes=_packed(video.cells, timed=timed, in_pixels=in_pixels, origin_s=origin_s),
            )
            for name, video in videos.items()
            if video.cells
        ]


def _packed(cells: "array[float]", *, timed: bool, in_pixels: bool, origin_s: float) -> Boxes:
    values = np.frombuffer(cells, np.float64).reshape(-1, _FIELDS)
    rows = np.empty(len(values), LABELLED)
    for place, name in enumerate(LABELLED.names or ()):
        rows[name] = values[:, place]
    return Boxes.of(rows, timed=timed, in_pixels=in_pixels, origin_s=origin_s)


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _time(where: str, name: str, text: str) -> float:
    """A whole number of milliseconds, or of frames."""
    value = _float(text)
    if not 0 <= value < MAX_TIME or (name == "frame" and value != int(value)):
        expected = "a whole number from 0" if name == "frame" else "seconds from 0"
        raise ManifestError(f"{where}: its {name} is '{text[:SHOWN]}', expected {expected}.")
    return round(value, 3)


def _box(where: str, texts: Sequence[str], in_pixels: bool) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (_float(text) for text in texts)
    got = ", ".join(text[:SHOWN] for text in texts)
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise ManifestError(f"{where}: the box is '{got}', expected four numbers, x1, y1, x2, y2.")
    if not in_pixels and (min(x1, y1) < 0 or max(x2, y2) > 1):
        raise ManifestError(
            f"{where}: the box {got} is not in the frame: expected fractions from 0 to 1. A list with boxes in pixels has a header with "
            "path,frame,x1,y1,x2,y2,label."
        )
    if x1 >= x2 or y1 >= y2:
        raise ManifestError(f"{where}: the box {got} has no area: expected x1 below x2 and y1 below y2.")
    return x1, y1, x2, y2


def _person(where: str, text: str) -> int:
    text = text.strip()
    if text and not (text.isdecimal() and int(text) < 2**31):
        raise ManifestError(f"{where}: person is '{text[:SHOWN]}', expected a whole number from 0, or nothing.")
    return int(text) if text else NO_PERSON


def read_excluded(path: Path) -> Iterator[tuple[str, float]]:
    """The keyframes (video, second) of AVA's list of excluded timestamps. Raises ManifestError naming the line."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                video, _, text = line.strip().partition(",")
                yield video, _time(f"{path}, line {number}", "time", text)
