"""Boxes of keyframes: as label files say them, as a dataset stores them, and as a crop shows them.

    label files    rows of LABELLED, packed per video: a box and one of its labels a row
    boxes.arrow    the same per item, corners as fractions of the frame, sorted by the item's row in the index; memory-mapped
    a batch        the boxes of its clips, cropped and flipped as their frames are

A box with several labels is several rows with the same number, so that all columns are plain and are looked up without a copy.
"""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.canonical import SLACK_S, Trace
from pipeline.errors import DatasetError
from pipeline.keyed import Roi
from pipeline.order import mix
from pipeline.quarantine import Reason

VERSION = 1  # of boxes.arrow
SLACK_PX = 1.0  # that a box may stick out of the frame: annotation tools round, and count from 0 or from 1
NO_PERSON = -1
CORNERS = ("x1", "y1", "x2", "y2")
LABELLED = np.dtype([("time", "<f8"), *((name, "<f4") for name in CORNERS), ("person", "<i4"), ("label", "<i4")])
STORED = np.dtype([("box", "<i4"), *((name, "<f4") for name in CORNERS), ("label", "<i4"), ("person", "<i4")])
SCHEMA = pa.schema(
    [
        pa.field("row", pa.uint32(), nullable=False),  # of the index, ascending
        pa.field("box", pa.int32(), nullable=False),  # number of the box in its item, from 0
        *(pa.field(name, pa.float32(), nullable=False) for name in CORNERS),  # fractions of the frame, from its top left corner
        pa.field("label", pa.int32(), nullable=False),  # index into DatasetInfo.classes
        pa.field("person", pa.int32(), nullable=False),  # the label file's number of the person, or -1
    ],
    {b"version": str(VERSION).encode()},
)
_KEYFRAME = re.compile(r"~[tf]\d+$")  # at the end of an item's key, behind the key of the video that it is a frame of

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Rows = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True, kw_only=True)
class Boxes:
    """What labels say of one video. packed: rows of LABELLED, without doubles, sorted by their fields in order.

    timed: `time` is in seconds, of which the video begins at `origin_s`; otherwise it is the number of a frame, from 0.
    in_pixels: corners are in pixels of the decoded picture, turned upright; otherwise in fractions of it.
    """

    packed: bytes
    timed: bool
    in_pixels: bool
    origin_s: float = 0.0

    @classmethod
    def of(cls, rows: Rows, *, timed: bool, in_pixels: bool, origin_s: float = 0.0) -> Self:
        return cls(packed=np.unique(rows).tobytes(), timed=timed, in_pixels=in_pixels, origin_s=origin_s)

    @property
    def rows(self) -> Rows:
        return np.frombuffer(self.packed, LABELLED)

    def relabelled(self, labels: Ints) -> "Boxes":
        """The same with labels[i] instead of label i; the labels keep their order or the rows are sorted anew."""
        rows = self.rows.copy()
        rows["label"] = labels[rows["label"]]
        return replace(self, packed=np.unique(rows).tobytes())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Keyframe:
    """One keyframe in a canonical video. name: as the labels call it, the end of an item's key. frame: of that video. rows: of STORED."""

    name: str
    frame: int
    rows: Rows

    @property
    def label(self) -> int:
        """The class that most of its boxes have, of equals the first."""
        return int(np.bincount(self.rows["label"]).argmax())


def video_key(key: str) -> str:
    """The key of the video that an item is a keyframe of, which is the name of its members in the tar; of other items their own."""
    return _KEYFRAME.sub("", key)


def keyframes(boxes: Boxes, trace: Trace) -> tuple[list[Keyframe], list[tuple[Reason, str]]]:
    """(the keyframes of a video, in their order; why others are not in). trace: of the video as it was written."""
    kept: list[Keyframe] = []
    refused: list[tuple[Reason, str]] = []
    rows = boxes.rows
    begins = np.flatnonzero(np.r_[True, rows["time"][1:] != rows["time"][:-1]])
    same = trace.shown == trace.decoded
    for group in np.split(rows, begins[1:]):
        time = float(group["time"][0])
        text = f"second {time:g}" if boxes.timed else f"frame {time:.0f}"
        frame = _frame(time - boxes.origin_s, trace) if boxes.timed else _numbered_frame(int(time), trace, same)
        if frame is None:
            refused.append((Reason.KEYFRAME_OUTSIDE, f"{text}: {_extent(boxes, trace)}"))
            continue
        corners, outside = _fractions(group, boxes.in_pixels, trace)
        if outside is not None:
            box = ", ".join(f"{group[name][outside]:g}" for name in CORNERS)
            refused.append((Reason.BOX_OUTSIDE, f"{text}: the box {box} in a frame of {trace.width}x{trace.height}"))
            continue
        name = f"~t{round(1000 * time):09d}" if boxes.timed else f"~f{int(time):06d}"
        kept.append(Keyframe(name=name, frame=frame, rows=_stored(group, corners)))
    return kept, refused


def _frame(time_s: float, trace: Trace) -> int | None:
    """The frame that is shown at a time."""
    inside = trace.shown[0] - SLACK_S <= time_s < trace.end_s
    return max(0, bisect_right(trace.shown, time_s + SLACK_S) - 1) if inside else None


def _numbered_frame(number: int, trace: Trace, same: bool) -> int | None:
    """Frame `number` of the source; where time was resampled, the one that is shown at its time."""
    if number >= len(trace.decoded):
        return None
    return number if same else bisect_right(trace.shown, trace.decoded[number] + SLACK_S) - 1


def _extent(boxes: Boxes, trace: Trace) -> str:
    if not boxes.timed:
        return f"the video has {len(trace.decoded)} frames"
    begin, end = trace.shown[0] + boxes.origin_s, trace.end_s + boxes.origin_s
    advice = "" if boxes.origin_s else "; for videos that were cut at second 900, set data.format=ava_cut"
    return f"what there is of the video goes from {begin:.3f} to {end:.3f} s{advice}"


def _fractions(group: Rows, in_pixels: bool, trace: Trace) -> tuple[Floats, int | None]:
    """(corners (n, 4) as fractions of the frame, the first box that is not in it)."""
    corners = np.stack([group[name] for name in CORNERS], axis=1).astype(np.float64)
    size = np.array([trace.width, trace.height] * 2, dtype=np.float64)
    slack = SLACK_PX / size
    if in_pixels:
        corners = corners / size
    clipped = np.clip(corners, 0, 1)
    out = ((corners < -slack) | (corners > 1 + slack)).any(axis=1) | (clipped[:, 2:] <= clipped[:, :2]).any(axis=1)
    return clipped.astype(np.float32), int(np.flatnonzero(out)[0]) if out.any() else None


def _stored(group: Rows, corners: Floats) -> Rows:
    new = np.r_[False, np.any([group[name][1:] != group[name][:-1] for name in (*CORNERS, "person")], axis=0)]
    stored = np.empty(len(group), STORED)
    stored["box"], stored["label"], stored["person"] = np.cumsum(new), group["label"], group["person"]
    for place, name in enumerate(CORNERS):
        stored[name] = corners[:, place]
    return stored


def write_table(file: BinaryIO, parts: Iterable[pa.Table]) -> pa.Table:
    """Writes tables of SCHEMA, whose rows of the index ascend from one to the next, as one Arrow file; returns all of them as one."""
    whole = pa.concat_tables(parts).combine_chunks().replace_schema_metadata(SCHEMA.metadata)
    with pa.ipc.new_file(file, whole.schema) as writer:
        writer.write_table(whole)
    return whole


def table_of(packed: Iterable[bytes], first_row: int) -> pa.Table:
    """The boxes of items that follow each other in the index from `first_row`; packed: rows of STORED of each."""
    items = [np.frombuffer(each, STORED) for each in packed]
    counts = [len(each) for each in items]
    rows = np.repeat(np.arange(first_row, first_row + len(items), dtype=np.uint32), counts)
    stored = np.concatenate(items) if items else np.empty(0, STORED)
    return pa.table([rows, *(np.ascontiguousarray(stored[name]) for name in SCHEMA.names[1:])], schema=SCHEMA)


def most_classes(table: pa.Table) -> int:
    """The most different classes that the boxes of one item have."""
    rows, labels = table.column("row").to_numpy(), table.column("label").to_numpy()
    pairs = np.unique(rows.astype(np.uint64) << np.uint64(32) | labels.astype(np.uint64))
    return int(np.unique(pairs >> np.uint64(32), return_counts=True)[1].max(initial=0))


def digests(table: pa.Table, names: Sequence[str]) -> npt.NDArray[np.uint64]:
    """A number per item, equal for equal boxes in whatever order, (num_items,). names: of the classes."""
    columns = {name: table.column(name).to_numpy() for name in SCHEMA.names}
    classes = [int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) for name in names]
    words = np.array(classes, dtype=np.uint64)[columns["label"]]
    for name in (*CORNERS, "person"):
        words = mix(words ^ columns[name].view(np.uint32))
    rows = columns["row"]
    return np.asarray(np.add.reduceat(words, np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]])))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ItemBoxes:
    """The n boxes of an item or a clip. corners: float32 (n, 4), x1 y1 x2 y2, fractions. persons: int32 (n,), -1 for none.

    labels: bool (n, K), which of the K classes each has.
    """

    corners: Floats
    persons: Ints
    labels: npt.NDArray[np.bool_]

    def __getitem__(self, chosen: npt.NDArray[np.bool_] | slice) -> "ItemBoxes":
        """Some of them."""
        return ItemBoxes(corners=self.corners[chosen], persons=self.persons[chosen], labels=self.labels[chosen])


class BoxTable:
    """boxes.arrow, mapped: a search per item, no memory per box."""

    def __init__(self, table: pa.Table, num_classes: int) -> None:
        self.table, self._num_classes = table, num_classes
        self._columns = {
            field.name: np.frombuffer(table.column(field.name).chunk(0).buffers()[1], dtype=field.type.to_pandas_dtype())[: len(table)]
            for field in SCHEMA
        }

    def __len__(self) -> int:
        """How many boxes, each counted once however many labels it has."""
        rows, boxes = self._columns["row"], self._columns["box"]
        return int(((rows[1:] != rows[:-1]) | (boxes[1:] != boxes[:-1])).sum()) + 1 if len(rows) else 0

    def of(self, row: int) -> ItemBoxes:
        """The boxes of the item at `row` of the index, as fractions of the frame."""
        begin, end = np.searchsorted(self._columns["row"], np.array([row, row + 1], dtype=np.uint32)).tolist()
        cells = {name: column[begin:end] for name, column in self._columns.items()}
        numbers, firsts = np.unique(cells["box"], return_index=True)
        labels = np.zeros((len(numbers), self._num_classes), dtype=np.bool_)
        labels[cells["box"], cells["label"]] = True
        corners = np.stack([cells[name][firsts] for name in CORNERS], axis=1)
        return ItemBoxes(corners=corners, persons=cells["person"][firsts], labels=labels)


def open_table(path: Path, num_items: int, num_classes: int) -> BoxTable:
    """boxes.arrow of a dataset with so many items and classes, mapped. Raises DatasetError when it is damaged or of another version."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise DatasetError(f"{path} is damaged or missing ({error}).") from None
    version = (table.schema.metadata or {}).get(b"version", b"none").decode(errors="replace")
    if version != str(VERSION):
        raise DatasetError(f"{path}: format version {version}, expected {VERSION}. Install the version that wrote it.")
    if not table.schema.remove_metadata().equals(SCHEMA.remove_metadata()) or not len(table):
        raise DatasetError(f"{path}: {len(table)} rows of {table.column_names}, expected {SCHEMA.names}.")
    if int(table.column("row")[len(table) - 1].as_py()) != num_items - 1:
        raise DatasetError(f"{path} is of another index: its last row is {table.column('row')[len(table) - 1]}, expected {num_items - 1}.")
    return BoxTable(table, num_classes)


def in_crop(boxes: ItemBoxes, roi: Roi, flip: bool, *, width: int, height: int) -> ItemBoxes:
    """Boxes of a frame of `width` x `height` pixels as its crop shows them: fractions of the crop, clipped to it, mirrored where it is.

    roi: the crop (y0, x0, y1, x1) in pixels. Boxes of which nothing is left in the crop are dropped.
    """
    y0, x0, y1, x1 = roi
    pixels = boxes.corners.astype(np.float64) * [width, height, width, height]
    # Subtracted before it is divided, so that a box that only touches the crop has no sliver of rounding in it.
    corners = np.clip((pixels - [x0, y0, x0, y0]) / [x1 - x0, y1 - y0, x1 - x0, y1 - y0], 0, 1)
    if flip:
        corners = np.stack([1 - corners[:, 2], corners[:, 1], 1 - corners[:, 0], corners[:, 3]], axis=1)
    shown = replace(boxes, corners=corners.astype(np.float32))
    return shown[(shown.corners[:, 0] < shown.corners[:, 2]) & (shown.corners[:, 1] < shown.corners[:, 3])]


def checked(table: BoxTable, num_classes: int) -> Iterator[tuple[int, str, str, str]]:
    """(row of the index, what, expected, got) of what is wrong in the columns."""
    columns = {name: table.table.column(name).to_numpy() for name in SCHEMA.names}
    x1, y1, x2, y2 = (columns[name] for name in CORNERS)
    inside = (x1 >= 0) & (y1 >= 0) & (x2 <= 1) & (y2 <= 1) & (x1 < x2) & (y1 < y2)
    for place in np.flatnonzero(~inside).tolist():
        got = f"{x1[place]:g} {y1[place]:g} {x2[place]:g} {y2[place]:g}"
        yield int(columns["row"][place]), "box", "fractions with x1 < x2 and y1 < y2", got
    for place in np.flatnonzero((columns["label"] < 0) | (columns["label"] >= num_classes)).tolist():
        yield int(columns["row"][place]), "label of a box", f"below {num_classes}", str(columns["label"][place])
    steps = np.diff(columns["row"].astype(np.int64))
    for place in np.flatnonzero((steps < 0) | (steps > 1)).tolist():
        yield int(columns["row"][place]), "next row with boxes", "the next row", str(columns["row"][place + 1])
