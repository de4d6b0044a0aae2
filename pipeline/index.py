"""Where the bytes are: `index.arrow` (one row per item, memory-mapped) beside `dataset.json`, which is written last.

A dataset that was appended to has another index, `index-000001.arrow`, so that replacing dataset.json is all that makes it the newer one.

An item is what a training position points at: a video, a time window of one, later a keyframe. Rows name the shard, the
byte range of the video member and its CRC-32, so that a reader needs no tar library and no shard header. Columns are plain
(no dictionaries, no nesting), the file uncompressed: all ranks of a node share one copy in the page cache.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import duplicates, overlay
from pipeline.durable import committed, sha256_of
from pipeline.errors import DatasetError
from pipeline.overlay import Overlay

FORMAT_VERSION = 1
SPLIT_PREFIX = "split:"  # a column per split column of the label file, int8 codes into DatasetInfo.splits
COLUMNS = (
    pa.field("key", pa.string(), nullable=False),  # WebDataset key: unique, no dot in its last part
    pa.field("source", pa.string(), nullable=False),  # path relative to the videos folder, for people
    pa.field("group", pa.string(), nullable=False),  # label file's group (person, scene), "" without one
    pa.field("label", pa.int32(), nullable=False),  # index into DatasetInfo.classes
    pa.field("shard", pa.int32(), nullable=False),  # index into DatasetInfo.shards
    pa.field("offset", pa.int64(), nullable=False),  # of the video member's data in the tar, in bytes
    pa.field("size", pa.int64(), nullable=False),  # of the same, in bytes
    pa.field("crc32", pa.uint32(), nullable=False),  # of the same bytes (zlib.crc32)
    pa.field("begin", pa.int32(), nullable=False),  # the item is frames [begin, end) of the member
    pa.field("end", pa.int32(), nullable=False),
    pa.field("fps", pa.float64(), nullable=False),
    pa.field("width", pa.int32(), nullable=False),  # of the stored video, in pixels
    pa.field("height", pa.int32(), nullable=False),
    pa.field("codec", pa.string(), nullable=False),  # "h264", "vp9", "mjpeg": FFmpeg's names
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """One tar: `file` relative to the dataset folder, its size in bytes, SHA-256 and number of items."""

    file: str
    size: int
    sha256: str
    num_items: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInfo:
    """`dataset.json`: what the dataset is. `fingerprint` covers the index, the shards and the classes.

    splits: split column -> its names, in the order of the index's codes (-1 there: in none).
    build: the options that shaped the bytes. libraries: versions that did. generation: how often it was appended to.
    likeness_sha256: of the digests by which duplicates are found, "" where it was built without them.
    """

    version: int = FORMAT_VERSION
    fingerprint: str = ""
    generation: int = 0
    classes: list[str]
    splits: dict[str, list[str]]
    num_items: int
    num_quarantined: int
    num_frames: int
    index_sha256: str
    index_size: int
    shards: list[ShardInfo]
    build: dict[str, object] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict)
    likeness_sha256: str = ""

    @property
    def is_layered(self) -> bool:
        """Whether frames 0, 4, 8, ... of its videos are a base layer (`EncodeOptions.form`)."""
        return self.build.get("encode.form") == "layered"

    @property
    def index_file(self) -> str:
        return _generation_name("index.arrow", self.generation)

    @property
    def likeness_file(self) -> str:
        return _generation_name("likeness.arrow", self.generation)

    @property
    def quarantine_file(self) -> str:
        return _generation_name("quarantine.parquet", self.generation)

    def with_fingerprint(self) -> "DatasetInfo":
        """The same with `fingerprint` computed from content alone (library versions and options are not content)."""
        content = {
            "version": self.version,
            "classes": self.classes,
            "splits": self.splits,
            "index": self.index_sha256,
            "shards": [shard.sha256 for shard in self.shards],
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return replace(self, fingerprint=digest[:32])

    def with_index(self, *, sha256: str, size: int, num_items: int, num_frames: int) -> "DatasetInfo":
        """The same with what is known once the index is written: its SHA-256, its size in bytes and what it counts."""
        counted = replace(self, index_sha256=sha256, index_size=size, num_items=num_items, num_frames=num_frames)
        return counted.with_fingerprint()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Self:
        """Raises DatasetError when the text is not a dataset.json of this version; `where` names the file."""
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise DatasetError(f"{where} is not valid JSON ({error}). Rebuild the dataset with the same command.") from None
        if not isinstance(raw, dict) or raw.get("version") != FORMAT_VERSION:
            got = raw.get("version") if isinstance(raw, dict) else type(raw).__name__
            raise DatasetError(f"{where}: format version {got}, expected {FORMAT_VERSION}. Rebuild, or install the version that wrote it.")
        try:
            shards = [ShardInfo(**shard) for shard in raw.pop("shards")]
            return cls(shards=shards, **raw)
        except (TypeError, KeyError) as error:
            raise DatasetError(f"{where} lacks or misnames a field ({error}). Rebuild the dataset with the same command.") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One row. `shard_file` is relative to the dataset folder; frames are [begin, end) of the stored member."""

    row: int
    key: str
    label: int
    shard_file: str
    offset: int
    size: int
    crc32: int
    begin: int
    end: int
    fps: float
    width: int
    height: int
    codec: str

    @property
    def num_frames(self) -> int:
        return self.end - self.begin


class Dataset:
    """A built dataset, opened by memory map. Cheap to open per process; columns are zero-copy NumPy views.

    Its overlays are applied: `info.fingerprint` is of both, labels are the corrected ones, and items that are left out are in no split.
    They keep their rows: a row number means the same with and without.
    """

    def __init__(self, root: Path, info: DatasetInfo, table: pa.Table, overlay: Overlay | None = None) -> None:
        self.root = root
        self.overlay = overlay or Overlay()
        self.info = replace(info, fingerprint=self.overlay.fingerprint(info.fingerprint))
        self._table = table

    @classmethod
    def open(cls, root: str | os.PathLike[str], *, overlays: bool = True) -> Self:
        """overlays: False opens the dataset as it was built.

        Raises DatasetError when `root` holds no finished dataset, or its index or an overlay does not fit its dataset.json."""
        root = Path(root)
        info = read_info(root)
        path = root / info.index_file
        if not path.is_file() or path.stat().st_size != info.index_size:
            raise DatasetError(f"{path} is missing or not {info.index_size} bytes long. Run 'posmlp data validate {root}'.")
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except pa.ArrowInvalid as error:
            raise DatasetError(f"{path} is damaged ({error}). Run 'posmlp data validate {root}'.") from None
        expected = [column.name for column in index_schema(list(info.splits))]
        if table.column_names != expected or table.num_rows != info.num_items:
            raise DatasetError(f"{path}: {table.num_rows} rows of {table.column_names}, expected {info.num_items} of {expected}.")
        built = cls(root, info, table)
        files = overlay.read_files(root) if overlays else []
        if not files:
            return built
        labels = built.column("label").astype(np.int32, copy=False)
        return cls(root, info, table, overlay.combine(files, table.column("key"), labels, len(info.classes)))

    @property
    def table(self) -> pa.Table:
        """All rows as they were built, of `index_schema`."""
        return self._table

    def likeness(self) -> pa.Table | None:
        """The digests of all rows and which are the same, see `duplicates.read_table`, mapped; None where there are none.

        Raises DatasetError when they do not fit the index.
        """
        path = self.root / self.info.likeness_file
        try:
            table = duplicates.read_table(path) if self.info.likeness_sha256 else None
        except (pa.ArrowInvalid, OSError) as error:
            raise DatasetError(f"{path} is damaged or missing ({error}). Run 'posmlp data validate {self.root}'.") from None
        if table is not None and table.num_rows != len(self):
            raise DatasetError(f"{path} has {table.num_rows} rows, expected {len(self)}. Run 'posmlp data validate {self.root}'.")
        return table

    @property
    def num_kept(self) -> int:
        """How many items no overlay leaves out."""
        return len(self) - len(self.overlay.excluded)

    def kept(self) -> npt.NDArray[np.bool_]:
        """Which items no overlay leaves out, (num_items,)."""
        mask = np.ones(len(self), dtype=np.bool_)
        mask[self.overlay.excluded] = False
        return mask

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def column(self, name: str) -> npt.NDArray[np.generic]:
        """A numeric column as an array of shape (num_items,), read-only and without a copy; a copy of corrected labels."""
        chunked = self._table.column(name)
        dtype = np.dtype(chunked.type.to_pandas_dtype())
        if chunked.num_chunks == 0:
            return np.empty(0, dtype=dtype)
        # Not `to_numpy`: it imports pandas, which takes half a second and 30 MB of every rank.
        values = np.frombuffer(chunked.chunk(0).buffers()[1], dtype=dtype, count=len(chunked))
        if name == "label" and len(self.overlay.relabelled):
            values = values.copy()
            values[self.overlay.relabelled] = self.overlay.labels
        return values

    def text(self, name: str, row: int) -> str:
        """One cell of a text column."""
        return str(self._table.column(name)[row].as_py())

    def item(self, row: int) -> Item:
        values = {name: self._table.column(name)[row].as_py() for name in Item.__dataclass_fields__ if name not in ("row", "shard_file")}
        values["label"] = self.overlay.label(row, values["label"])
        shard = self.info.shards[self._table.column("shard")[row].as_py()]
        return Item(row=row, shard_file=shard.file, **values)

    def part(self, row: int) -> int:
        """0, as the number of the only dataset in a mixture of one."""
        return 0

    def rows(self, split_column: str, split: str) -> npt.NDArray[np.uint32]:
        """Rows of one split without those left out, ascending, shape (n,). Raises DatasetError naming what there is instead."""
        names = self.info.splits.get(split_column)
        if names is None:
            raise DatasetError(
                f"{self.root} has no split column '{split_column}'; it has {sorted(self.info.splits)}. Set data.split_column."
            )
        if split not in names:
            raise DatasetError(
                f"{self.root}: split column '{split_column}' has {names}, not '{split}'. Set data.train_split or data.val_split."
            )
        wanted = self.column(SPLIT_PREFIX + split_column) == names.index(split)
        wanted[self.overlay.excluded] = False
        return np.flatnonzero(wanted).astype(np.uint32)


def _generation_name(name: str, generation: int) -> str:
    stem, _, suffix = name.partition(".")
    return f"{stem}-{generation:06d}.{suffix}" if generation else name


def read_info(root: Path) -> DatasetInfo:
    """`dataset.json` of the dataset in `root`. Raises DatasetError when there is none, or it cannot be read."""
    manifest = root / "dataset.json"
    if not manifest.is_file():
        state = "an unfinished build: run the build command again to finish it" if (root / "build").is_dir() else "no dataset"
        raise DatasetError(f"{root} holds {state} (there is no dataset.json in it).")
    return DatasetInfo.from_json(manifest.read_text(encoding="utf-8"), str(manifest))


def index_schema(split_columns: list[str]) -> pa.Schema:
    """The columns of `index.arrow`, in order; one more int8 column per split column."""
    return pa.schema([*COLUMNS, *(pa.field(SPLIT_PREFIX + name, pa.int8(), nullable=False) for name in split_columns)])


def write_index(path: Path, tables: Iterable[pa.Table]) -> tuple[str, int]:
    """Writes rows, in the order given, as one uncompressed record batch (so that columns map without a copy).

    tables: of `index_schema`. Returns the file's SHA-256 and size in bytes; the file appears whole or not at all.
    """
    whole = pa.concat_tables(tables).combine_chunks()
    with committed(path) as file, pa.ipc.new_file(file, whole.schema.remove_metadata()) as writer:
        writer.write_table(whole.replace_schema_metadata(None))
    return sha256_of(path), path.stat().st_size
