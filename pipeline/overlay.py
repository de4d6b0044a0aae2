"""What a dataset's owner changed since it was built: items left out and labels corrected, in small files beside the immutable shards.

    overlays/000001-exclude-8d3f….arrow     columns row, key: these items are left out
    overlays/000002-relabel-51c0….arrow     columns row, key, label: these items have other labels

One command is one file, written whole; removing the file takes it back. Together they mean: whatever any file excludes is out, and of
labels the file with the highest number counts. Files name rows, so that opening a dataset costs by what they hold and not by what it
holds; and keys, so that a file that was made for another index is refused. A name ends with the beginning of the file's SHA-256.
"""

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.durable import committed
from pipeline.errors import DatasetError

FOLDER = "overlays"
FORMAT_VERSION = 1
NAME = re.compile(r"(\d{6})-(exclude|relabel)-([0-9a-f]{16})\.arrow")

Rows = npt.NDArray[np.uint32]
Labels = npt.NDArray[np.int32]


class Kind(StrEnum):
    EXCLUDE = "exclude"
    RELABEL = "relabel"


def _no_rows() -> Rows:
    return np.empty(0, dtype=np.uint32)


def _no_labels() -> Labels:
    return np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OverlayFile:
    """One file. rows: (n,) of the index, ascending; keys: theirs; labels: (n,) class indices, empty in an exclusion."""

    file: str
    number: int
    kind: Kind
    reason: str
    rows: Rows
    keys: pa.ChunkedArray
    labels: Labels

    def __str__(self) -> str:
        return f"{self.file}: {len(self.rows)} items{f', {self.reason}' if self.reason else ''}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Overlay:
    """What all files mean together. excluded: (n,) rows; relabelled: (m,) other rows, and labels: (m,) their new ones; both ascending."""

    files: tuple[OverlayFile, ...] = ()
    excluded: Rows = field(default_factory=_no_rows)
    relabelled: Rows = field(default_factory=_no_rows)
    labels: Labels = field(default_factory=_no_labels)

    def label(self, row: int, built: int) -> int:
        """The label of `row`, which was `built` when the dataset was."""
        place = int(np.searchsorted(self.relabelled, row))
        return int(self.labels[place]) if place < len(self.relabelled) and self.relabelled[place] == row else built

    def fingerprint(self, base: str) -> str:
        """Of a dataset whose own is `base`: by what the files mean, not by how many there are or why."""
        if not len(self.excluded) and not len(self.relabelled):
            return base
        digest = hashlib.sha256()
        for values in (self.excluded, self.relabelled, self.labels):
            digest.update(len(values).to_bytes(8, "little") + values.astype(values.dtype.newbyteorder("<")).tobytes())
        return f"{base}+{digest.hexdigest()[:16]}"


def read_files(root: Path) -> list[OverlayFile]:
    """The overlay files of the dataset in `root`, by number. Raises DatasetError naming one that is damaged or of another version."""
    folder = root / FOLDER
    if not folder.is_dir():
        return []
    return [read_file(path) for path in sorted(folder.iterdir()) if NAME.fullmatch(path.name)]


def read_file(path: Path) -> OverlayFile:
    """One of them. Raises DatasetError."""
    name = NAME.fullmatch(path.name)
    if name is None:
        raise DatasetError(f"{path} is no overlay, by its name. Remove it.")
    number, kind, digest = name.groups()
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest()[:16] != digest:
        raise DatasetError(f"{path} was altered: its SHA-256 does not begin with {digest}. Restore it, or remove it to take it back.")
    try:
        table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
        facts = json.loads(table.schema.metadata[b"overlay"])
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{path} is no overlay ({error}). Remove it.") from None
    if facts.get("version") != FORMAT_VERSION:
        raise DatasetError(f"{path}: format version {facts.get('version')}, expected {FORMAT_VERSION}. Install the version that wrote it.")
    if not table.schema.remove_metadata().equals(_schema(Kind(kind))):
        raise DatasetError(f"{path}: got the columns {table.column_names}, expected {_schema(Kind(kind)).names}. Remove it.")
    labels = table.column("label").to_numpy() if kind == Kind.RELABEL else _no_labels()
    rows = table.column("row").to_numpy()
    if np.any(rows[1:] <= rows[:-1]):
        raise DatasetError(f"{path}: its rows are not ascending. Remove it.")
    return OverlayFile(
        file=f"{FOLDER}/{path.name}",
        number=int(number),
        kind=Kind(kind),
        reason=str(facts.get("reason", "")),
        rows=rows,
        keys=table.column("key"),
        labels=labels,
    )


def combine(files: Sequence[OverlayFile], keys: pa.ChunkedArray, built: Labels, num_classes: int) -> Overlay:
    """What `files` mean for an index with these columns key and label, (n,) each. Raises DatasetError where one is of another index."""
    excluded = _no_rows()
    labels: dict[int, int] = {}
    for each in files:
        _check(each, keys, num_classes)
        if each.kind == Kind.EXCLUDE:
            excluded = np.union1d(excluded, each.rows)
        else:
            labels.update(zip(each.rows.tolist(), each.labels.tolist(), strict=True))
    relabelled = np.array(sorted(labels), dtype=np.uint32)
    new = np.array([labels[row] for row in relabelled.tolist()], dtype=np.int32)
    counts = (new != built[relabelled]) & ~np.isin(relabelled, excluded)
    return Overlay(files=tuple(files), excluded=excluded, relabelled=relabelled[counts], labels=new[counts])


def _check(overlay: OverlayFile, keys: pa.ChunkedArray, num_classes: int) -> None:
    if len(overlay.rows) and int(overlay.rows[-1]) >= len(keys):
        what = f"it names row {overlay.rows[-1]}, the index has {len(keys)}"
    elif not keys.take(pa.array(overlay.rows)).combine_chunks().equals(overlay.keys.combine_chunks()):
        what = "its keys lie in other rows"
    elif len(overlay.labels) and not 0 <= int(overlay.labels.min()) <= int(overlay.labels.max()) < num_classes:
        what = f"its labels go to {overlay.labels.max()}, the dataset has {num_classes} classes"
    else:
        return
    raise DatasetError(f"{overlay.file} is of another dataset: {what}. Remove it, and give its command again.")


def _schema(kind: Kind) -> pa.Schema:
    columns = [pa.field("row", pa.uint32(), nullable=False), pa.field("key", pa.string(), nullable=False)]
    return pa.schema([*columns, *([pa.field("label", pa.int32(), nullable=False)] if kind == Kind.RELABEL else [])])


def write_file(root: Path, kind: Kind, number: int, rows: Rows, keys: pa.Array, labels: Labels | None, reason: str) -> Path:
    """Writes what one command did; the file appears whole or not at all. rows: (n,), ascending; keys, labels: (n,), theirs."""
    columns = [pa.array(rows), keys, *([] if labels is None else [pa.array(labels)])]
    facts = {b"overlay": json.dumps({"version": FORMAT_VERSION, "reason": reason}).encode()}
    table = pa.table(columns, schema=_schema(kind).with_metadata(facts))
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, table.schema) as writer:
        writer.write_table(table)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:16]
    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"{number:06d}-{kind}-{digest}.arrow"
    with committed(path) as file:
        file.write(buffer.getvalue())
    return path
