"""Items of a dataset as the viewer lists them: filters on the index's mapped columns, a page of rows at a time, and checked bytes.

A filter reads whole columns block by block and keeps row numbers only; cells become Python values for the rows of one page.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs import quarantine_list
from pipeline.errors import SampleError
from pipeline.index import SPLIT_PREFIX, Dataset
from pipeline.location import Location
from pipeline.overlay import Kind
from pipeline.reader import open_reader

PAGE = 24  # items of a page
BLOCK = 1 << 20  # rows that a text search looks at in one go
CACHED_FILTERS = 2  # of at most 4 bytes per item each
CACHED_BYTES = 128 << 20  # of videos: a browser asks for one in several ranges, and every read is checked whole

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """label: index into the classes. split: (column, code), code -1 for items in none. text: part of the key or source, in any case.

    overlay: "exclude" for items that are left out, "relabel" for items with another label than they were built with, "" for any.
    """

    label: int | None = None
    split: tuple[str, int] | None = None
    text: str = ""
    overlay: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What is shown of an item. splits: of every split column that it is in. damage: what is wrong with its bytes, "" when nothing is.

    changed: what overlays say of it, "" when nothing. boxes: of a keyframe, corners in per cent of the frame and classes.
    """

    row: int
    key: str
    source: str
    group: str
    label: str
    splits: dict[str, str]
    shard: str
    offset: int
    size: int
    crc32: int
    begin: int
    end: int
    fps: float
    width: int
    height: int
    codec: str
    damage: str
    changed: str
    keyframe: int | None = None
    boxes: tuple[str, ...] = ()

    @property
    def shown(self) -> int:
        """The frame from which it plays."""
        return self.begin if self.keyframe is None else self.keyframe

    @property
    def seconds(self) -> float:
        return (self.end - self.begin) / self.fps if self.fps > 0 else 0.0


class Cache(Generic[Value]):
    """The most recently used values up to a total weight; one that is heavier alone is not kept. For any number of threads."""

    def __init__(self, limit: int, weight: Callable[[Value], int]) -> None:
        self._limit, self._weight = limit, weight
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()  # without the lock: two threads may make the same, neither waits for another's
        with self._lock:
            self._values[key] = value
            while sum(map(self._weight, self._values.values())) > self._limit:
                self._values.popitem(last=False)
        return value


class Items:
    """The viewer's access to one dataset, for any number of threads. Close it when done."""

    def __init__(self, root: Location) -> None:
        self.dataset = Dataset.open(root)
        self.info = self.dataset.info
        self._table = self.dataset.table
        self._reader, self._boxes = open_reader(self.dataset), self.dataset.boxes()
        self._found: Cache[npt.NDArray[np.uint32]] = Cache(CACHED_FILTERS, lambda _: 1)
        self._videos: Cache[bytes] = Cache(CACHED_BYTES, len)
        self.quarantined = quarantine_list.read(self.dataset)
        self.causes = quarantine_list.causes(self.quarantined)

    def __len__(self) -> int:
        return len(self.dataset)

    def page(self, wanted: Filter, number: int) -> tuple[int, list[int]]:
        """(how many items pass, the rows of page `number`, from 0, in the order of the index)."""
        if wanted == Filter():
            return len(self), list(range(len(self))[number * PAGE : (number + 1) * PAGE])
        rows = self._found.get(wanted, lambda: self._rows(wanted))
        return len(rows), rows[number * PAGE : (number + 1) * PAGE].tolist()

    def _rows(self, wanted: Filter) -> npt.NDArray[np.uint32]:
        mask = np.ones(len(self), dtype=np.bool_)
        if wanted.label is not None:
            mask &= self.dataset.column("label") == wanted.label
        if wanted.split is not None:
            mask &= self.dataset.column(SPLIT_PREFIX + wanted.split[0]) == wanted.split[1]
            if wanted.split[1] >= 0:
                mask[self.dataset.overlay.excluded] = False
        if wanted.overlay:
            rows = self.dataset.overlay.excluded if wanted.overlay == Kind.EXCLUDE else self.dataset.overlay.relabelled
            there = np.zeros(len(self), dtype=np.bool_)
            there[rows] = True
            mask &= there
        if wanted.text:
            for begin in range(0, len(mask), BLOCK):
                block = self._table.slice(begin, BLOCK)
                either = pc.or_(*(contains(block.column(name), wanted.text) for name in ("key", "source")))
                mask[begin : begin + BLOCK] &= either.combine_chunks().to_numpy(zero_copy_only=False)
        return np.flatnonzero(mask).astype(np.uint32)

    def row(self, number: int) -> Row:
        """All that is shown of row `number`, which exists; its bytes are read and checked."""
        cells = {name: self._table.column(name)[number].as_py() for name in self._table.column_names}
        splits = {column: names[code] for column, names in self.info.splits.items() if (code := cells.pop(SPLIT_PREFIX + column)) >= 0}
        built = cells["label"]
        cells["label"] = self.dataset.overlay.label(number, built)
        changed = self._changed(number, cells["label"], built)
        cells |= {"label": self.info.classes[cells["label"]], "shard": self.info.shards[cells["shard"]].file}
        try:
            self.video(number)
            damage = ""
        except SampleError as error:
            damage = str(error)
        return Row(row=number, splits=splits, damage=damage, changed=changed, boxes=self._boxes_of(number), **cells)

    def _boxes_of(self, number: int) -> tuple[str, ...]:
        if self._boxes is None:
            return ()
        found = self._boxes.of(number)
        places = [", ".join(f"{100 * edge:.1f}" for edge in corners) for corners in found.corners.tolist()]
        classes = [", ".join(self.info.classes[label] for label in np.flatnonzero(marks).tolist()) for marks in found.labels]
        return tuple(f"{place} %: {names}" for place, names in zip(places, classes, strict=True))

    def _changed(self, number: int, label: int, built: int) -> str:
        """Of the newest file that says so."""
        for each in reversed(self.dataset.overlay.files):
            if number in each.rows and (each.kind == Kind.EXCLUDE or label != built):
                text = "left out" if each.kind == Kind.EXCLUDE else f"built as {self.info.classes[built]}"
                return f"{text}{f': {each.reason}' if each.reason else ''} ({each.file})"
        return ""

    def video(self, number: int) -> bytes:
        """The stored file of row `number`, checked. Raises SampleError when it is not the one that was built."""
        return self._videos.get(number, lambda: self._reader.read(self.dataset.item(number)))

    def rejects(self, reason: str, text: str, number: int) -> tuple[int, list[dict[str, object]]]:
        """(how many videos of the quarantine list pass, those of page `number`). reason: "" for all. text: part of the path."""
        table = self.quarantined
        if reason:
            table = table.filter(pc.equal(table.column("reason"), reason))
        if text:
            table = table.filter(contains(table.column("path"), text))
        return table.num_rows, table.slice(number * PAGE, PAGE).to_pylist()

    def close(self) -> None:
        self._reader.close()


def contains(column: pa.ChunkedArray, text: str) -> pa.ChunkedArray:
    """Whether each text of a column holds `text`, taken literally, in any case."""
    return pc.match_substring(column, text, ignore_case=True)
