"""Which items of a dataset are the same, found from their digests (`likeness`), and the table that keeps both.

Finding them takes no comparison of all with all. Any sum of the 64 values of a still with signs, divided by 64, differs by STILL at most
between items that are alike; a few such sums make a grid, in which only items of neighbouring cells are compared. Nothing is missed by it.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.likeness import CONTENT_BYTES, SIDE, SOURCE_BYTES, STEPS, STILL_BYTES, Bytes
from pipeline.order import mix

VERSION = 1  # of the digests: those of different versions are not compared
STILL, MOTION, NOISE = 2.0, 0.2, 0.1  # levels of 255; a share; levels. All of mean absolute differences
NUM_SUMS = 5
BLOCK = 1 << 16  # rows that are looked at in one go
PAIRS = 1 << 17  # pairs that are compared in one go

Groups = npt.NDArray[np.int32]

COLUMNS = (
    pa.field("bytes", pa.binary(SOURCE_BYTES)),  # of the file and the wanted part of it; null where it is not known
    pa.field("content", pa.binary(CONTENT_BYTES)),  # of what is seen; null where it is not known
)
GROUP = pa.field("group", pa.int32(), nullable=False)  # the first row that is the same, or -1 where no other is


def same_bytes(sources: Bytes) -> Groups:
    """(n,): the first row with the same digest, its own where it is the only one. sources: (n, 16)."""
    return _first_equal(sources)


def alike(contents: Bytes) -> Groups:
    """(n,): the first row that an item is alike to, directly or by way of others; its own where there is none. contents: (n, 576)."""
    first = _first_equal(contents)
    distinct = np.flatnonzero(first == np.arange(len(first)))
    values = contents[distinct]
    groups = np.arange(len(distinct), dtype=np.int64)
    for left, right in _neighbours(values):
        near = _near(values[left], values[right])
        _unite(groups, left[near], right[near])
    return distinct[groups[np.searchsorted(distinct, first)]].astype(np.int32)


def _near(left: Bytes, right: Bytes) -> npt.NDArray[np.bool_]:
    """(n,): which of the pairs are alike. left, right: (n, 576)."""

    def mean(values: npt.NDArray[np.int16]) -> npt.NDArray[np.float64]:
        return np.asarray(np.abs(values).mean(axis=1))

    stills = [each[:, :STILL_BYTES].astype(np.int16) for each in (left, right)]
    motions = [each[:, STILL_BYTES:].view(np.int8).astype(np.int16) for each in (left, right)]
    moving = (mean(motions[0]) + mean(motions[1])) / 2
    return (mean(stills[0] - stills[1]) <= STILL) & (mean(motions[0] - motions[1]) <= MOTION * moving + NOISE * STEPS)


def groups_of(sources: Bytes, contents: Bytes, known: npt.NDArray[np.bool_]) -> Groups:
    """(n,): the first row of each item's group, -1 where it is the only one in it. known: (n,), False where there are no digests."""
    rows = np.flatnonzero(known)
    groups = np.arange(len(rows), dtype=np.int64)
    if not known.all():
        sources, contents = sources[rows], contents[rows]
    for first in (same_bytes(sources), alike(contents)):
        _unite(groups, first.astype(np.int64), np.arange(len(rows)))
    found = np.full(len(known), -1, dtype=np.int32)
    several = np.bincount(groups, minlength=len(rows))[groups] > 1
    found[rows[several]] = rows[groups[several]]
    return found


def _first_equal(rows: Bytes) -> Groups:
    if not len(rows):
        return np.empty(0, dtype=np.int32)
    if rows.shape[1] > SOURCE_BYTES:  # sorting copies twice what it sorts
        rows = np.frombuffer(b"".join(hashlib.blake2b(row, digest_size=SOURCE_BYTES).digest() for row in rows), np.uint8)
    values = np.ascontiguousarray(rows).view(np.dtype((np.void, SOURCE_BYTES))).reshape(-1)
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int32)


def _signs() -> npt.NDArray[np.float32]:
    """(64, NUM_SUMS) of -1 and 1: left against right, top against bottom, and finer; what real videos differ in."""
    y, x = np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij")
    half = SIDE // 2
    halves = [x < half, y < half, (x < half) ^ (y < half), (x // 2) % 3 == 0, (y // 2) % 3 == 0]
    return np.stack([np.where(each, 1, -1).reshape(-1) for each in halves], axis=1).astype(np.float32)


def _neighbours(values: Bytes) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Pairs (i, j) of rows, each pair in one of its orders or both, among them all that are alike. values: (n, 576)."""
    signs = _signs()
    stills = values[:, :STILL_BYTES]
    sums = np.concatenate([stills[i : i + BLOCK].astype(np.float32) @ signs for i in range(0, len(values), BLOCK)] or [signs[:0]])
    places = sums / np.float32(STILL_BYTES * 2 * STILL)  # in cells, which are twice as wide as items that are alike lie apart
    cells = np.floor(places).astype(np.int64)
    nearer = np.where(places - cells < 0.5, -1, 1)  # the one neighbour along each axis that can hold something near
    keys = _keys(cells)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    for step in range(1 << NUM_SUMS):
        taken = np.array([(step >> axis) & 1 for axis in range(NUM_SUMS)])
        wanted = _keys(cells + nearer * taken)
        begins, ends = np.searchsorted(ordered, wanted, "left"), np.searchsorted(ordered, wanted, "right")
        for left, right in _pairs(begins, ends, order):
            near = np.abs(sums[left] - sums[right]).max(axis=1) <= STILL_BYTES * STILL  # most of a cell's neighbours are not
            yield left[near], right[near]


def _keys(cells: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """A word for each cell. Cells that share one by accident only cost a comparison."""
    keys = np.zeros(len(cells), dtype=np.uint64)
    for axis in range(cells.shape[1]):
        keys = mix(keys ^ cells[:, axis].astype(np.uint64) + np.uint64(axis))
    return keys


def _pairs(
    begins: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], order: npt.NDArray[np.int64]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Row i with each of order[begins[i]:ends[i]] that comes behind it, some at a time."""
    counts = ends - begins
    busy = np.flatnonzero(counts)
    cuts = np.flatnonzero(np.diff(np.cumsum(counts[busy]) // PAIRS)) + 1
    for rows in np.split(busy, cuts):
        num = counts[rows]
        left = np.repeat(rows, num)
        right = order[np.arange(len(left)) - np.repeat(np.cumsum(num) - num, num) + np.repeat(begins[rows], num)]
        behind = right > left
        yield left[behind], right[behind]


def _unite(groups: npt.NDArray[np.int64], left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> None:
    """Makes both of each pair one group, named by its smallest row, in place."""
    while True:
        low = np.minimum(groups[left], groups[right])
        changed = (groups[left] != low) | (groups[right] != low)
        if not changed.any():
            return
        left, right, low = left[changed], right[changed], low[changed]
        np.minimum.at(groups, groups[left], low)
        np.minimum.at(groups, groups[right], low)
        while True:  # every row to the root of its group
            roots = groups[groups]
            if np.array_equal(roots, groups):
                break
            groups[:] = roots


def write_table(file: BinaryIO, tables: Iterable[pa.Table]) -> None:
    """Finds the groups of all rows of `tables`, of COLUMNS, and writes the three columns as one Arrow file."""
    whole = pa.concat_tables(tables).combine_chunks()
    known = whole.column("content").is_valid().to_numpy()
    sources, contents = (_matrix(whole.column(name), size) for name, size in (("bytes", SOURCE_BYTES), ("content", CONTENT_BYTES)))
    groups = groups_of(sources, contents, known)
    schema = pa.schema([*COLUMNS, GROUP]).with_metadata({b"version": str(VERSION).encode()})
    with pa.ipc.new_file(file, schema) as writer:
        writer.write_table(pa.table([*whole.columns, pa.array(groups)], schema=schema))


def read_table(path: Path) -> pa.Table | None:
    """COLUMNS and GROUP, mapped; None of another version, whose digests mean something else.

    Raises pyarrow.ArrowInvalid or OSError when it is damaged or missing.
    """
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    known = (table.schema.metadata or {}).get(b"version") == str(VERSION).encode()
    return table if known else None


def _matrix(column: pa.ChunkedArray, size: int) -> Bytes:
    """(n, size); anything where the column is null."""
    if not len(column):
        return np.empty((0, size), dtype=np.uint8)
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    start = array.offset * size
    return np.frombuffer(array.buffers()[1], dtype=np.uint8)[start : start + len(array) * size].reshape(-1, size)
