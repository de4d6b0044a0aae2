"""Where the bytes are: `index.arrow` (one row per item, memory-mapped) beside `dataset.json`, which is written last.

A dataset that was appended to has another index, `index-000001.arrow`, so that replacing dataset.json is all that makes it the newer one.

An item is what a training position points at: a video, a time window of one, a keyframe. Rows name the shard, the
byte range of the video member and its CRC-32, so that a reader needs no tar library and no shard header. Columns are plain
(no dictionaries, no nesting), the file uncompressed: all ranks of a node share one copy in the page cache.

Of a dataset at a URL both files are copied to this machine's cache, the index once for all its processes, and mapped from there.
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
from pipeline.boxes import BoxTable, open_table
from pipeline.cache import CacheFolder
from pipeline.durable import commit, committed, sha256_of, sync
from pipeline.errors import DatasetError
from pipeline.folder import Folder, LocalFolder
from pipeline.location import Location
from pipeline.options import RemoteOptions
from pipeline.overlay import Overlay
from pipeline.remote import RemoteFolder

FORMAT_VERSION = 1
MAX_INFO_BYTES = 256 << 20  # of a dataset.json from a store
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

KEYFRAME = pa.field("keyframe", pa.int32(), nullable=False)  # behind COLUMNS where items are keyframes: a frame of [begin, end)


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxesInfo:
    """What dataset.json says of the boxes of keyframes: SHA-256 and size in bytes of their file, and how many boxes it holds.

    most_classes: the most classes that the boxes of one item have.
    """

    sha256: str
    size: int
    num_boxes: int
    most_classes: int


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
    likeness_sha256: of the digests by which duplicates are found, "" where it was built without them. boxes: where items are keyframes,
    of which several share a video; otherwise None.
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
    boxes: BoxesInfo | None = None

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
    def boxes_file(self) -> str:
        return _generation_name("boxes.arrow", self.generation)

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
        if self.boxes is not None:
            content["boxes"] = self.boxes.sha256
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return replace(self, fingerprint=digest[:32])

    def with_index(self, *, sha256: str, size: int, num_items: int, num_frames: int) -> "DatasetInfo":
        """The same with what is known once the index is written: its SHA-256, its size in bytes and what it counts."""
        counted = replace(self, index_sha256=sha256, index_size=size, num_items=num_items, num_frames=num_frames)
        return counted.with_fingerprint()

    def to_json(self) -> str:
        values = asdict(self)
        if self.boxes is None:  # so that datasets without boxes are what they were before there were any
            del values["boxes"]
        return json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

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
            boxes = raw.pop("boxes", None)
            return cls(shards=shards, boxes=None if boxes is None else BoxesInfo(**boxes), **raw)
        except (TypeError, KeyError) as error:
            raise DatasetError(f"{where} lacks or misnames a field ({error}). Rebuild the dataset with the same command.") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One row. `shard_file` is relative to the dataset folder; frames are [begin, end) of the stored member.

    keyframe: the frame of these that the item is about; None where it is about all.
    """

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
    keyframe: int | None = None

    @property
    def num_frames(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a dataset at a URL comes from, and what this machine keeps of it."""

    folder: RemoteFolder
    cache: CacheFolder

    def kept(self, file: str, size: int | None, sha256: str) -> Path:
        """A file of the dataset in the cache; the first process that asks for it fetches it. size: None for no such file.

        Raises DatasetError, StorageError.
        """
        where = f"{self.folder}/{file}"
        if size is None:
            raise DatasetError(f"{where} is missing. Run 'posmlp data validate {self.folder}'.")

        def fetch(path: Path) -> None:
            part = path.with_suffix(".part")  # gets its name when it is checked and synced: from then on its size is all that is looked at
            for _ in range(2):  # what was only changed on its way comes otherwise the next time
                try:
                    self.folder.fetch(file, part, size)
                except FileNotFoundError:
                    raise DatasetError(f"{where} is missing. Run 'posmlp data validate {self.folder}'.") from None
                if sha256_of(part) == sha256:
                    sync(part)
                    commit(part, path)
                    return
            part.unlink()
            raise DatasetError(f"{where} is not the one of its dataset.json. Run 'posmlp data validate {self.folder}'.")

        return self.cache.once(file, size, fetch, sound=lambda path: path.is_file() and path.stat().st_size == size)


class Dataset:
    """A built dataset, opened by memory map. Cheap to open per process; columns are zero-copy NumPy views.

    Its overlays are applied: `info.fingerprint` is of both, labels are the corrected ones, and items that are left out are in no split.
    They keep their rows: a row number means the same with and without.

    root: the folder with dataset.json and the index; of a dataset at a URL the one in this machine's cache, without shards. origin: None
    for a local one.
    """

    def __init__(
        self, root: Path, info: DatasetInfo, table: pa.Table, overlay: Overlay | None = None, origin: Origin | None = None
    ) -> None:
        self.root = root
        self.overlay = overlay or Overlay()
        self.info = replace(info, fingerprint=self.overlay.fingerprint(info.fingerprint))
        self.origin = origin
        self._table = table

    @classmethod
    def open(cls, place: Location | os.PathLike[str], options: RemoteOptions | None = None, *, overlays: bool = True) -> Self:
        """place: a folder, or the URL of one as `location` gives it. options: for a URL. overlays: False opens the dataset as it was built.

        Raises DatasetError when `place` holds no finished dataset, or its index or an overlay does not fit its dataset.json; StorageError.
        """
        if isinstance(place, str) and "://" in place:
            built = cls._open_remote(place, options or RemoteOptions())
        else:
            root = Path(place)
            info = read_info(root)
            built = cls(root, info, _mapped(root / info.index_file, info, root))
        files = overlay.read_files(built.folder) if overlays else []
        if not files:
            return built
        labels = built.column("label").astype(np.int32, copy=False)
        combined = overlay.combine(files, built.table.column("key"), labels, len(built.info.classes))
        return cls(built.root, built.info, built.table, combined, built.origin)

    @classmethod
    def _open_remote(cls, url: str, options: RemoteOptions) -> Self:
        folder = RemoteFolder(url, options)
        text, info = _read_manifest(folder)
        name = hashlib.sha256(text).hexdigest()[:32]  # what is in dataset.json decides what is in all files but the overlays
        cache = CacheFolder.open(Path(options.cache_dir).expanduser(), name, int(options.cache_gib * 2**30))
        origin = Origin(folder=folder, cache=cache)
        index = origin.kept(info.index_file, info.index_size, info.index_sha256)
        return cls(cache.path, info, _mapped(index, info, url), origin=origin)

    @property
    def where(self) -> Location:
        """Where the dataset lies, for people and commands: a folder or a URL."""
        return self.origin.folder.url if self.origin else self.root

    @property
    def folder(self) -> Folder:
        """The same, to list, read and write in it."""
        return self.origin.folder if self.origin else LocalFolder(self.root)

    def copied(self, file: str) -> Path:
        """The newest state of a small file of the dataset, on this machine; it does not exist when the dataset has none."""
        path = self.root / file
        if self.origin is not None:
            size = self.origin.folder.size(file)
            if size is None:
                path.unlink(missing_ok=True)
            else:
                self.origin.folder.fetch(file, path, size)
        return path

    @property
    def table(self) -> pa.Table:
        """All rows as they were built, of `index_schema`."""
        return self._table

    def likeness(self) -> pa.Table | None:
        """The digests of all rows and which are the same, see `duplicates.read_table`, mapped; None where there are none.

        Raises DatasetError when they do not fit the index.
        """
        file = self.info.likeness_file
        if not self.info.likeness_sha256:
            return None
        path = self.root / file
        if self.origin is not None:
            path = self.origin.kept(file, self.origin.folder.size(file), self.info.likeness_sha256)
        try:
            table = duplicates.read_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise DatasetError(f"{path} is damaged or missing ({error}). Run 'posmlp data validate {self.where}'.") from None
        if table is not None and table.num_rows != len(self):
            raise DatasetError(f"{path} has {table.num_rows} rows, expected {len(self)}. Run 'posmlp data validate {self.where}'.")
        return table

    def boxes(self) -> BoxTable | None:
        """The boxes of all items, mapped; None where items are no keyframes. Raises DatasetError when they do not fit dataset.json."""
        path = self.boxes_path()
        return None if path is None else open_table(path, len(self), len(self.info.classes))

    def boxes_path(self) -> Path | None:
        """Their file on this machine, of the size that dataset.json says. Raises DatasetError, StorageError."""
        if self.info.boxes is None:
            return None
        path, expected = self.root / self.info.boxes_file, self.info.boxes
        if self.origin is not None:
            path = self.origin.kept(path.name, self.origin.folder.size(path.name), expected.sha256)
        if not path.is_file() or path.stat().st_size != expected.size:
            raise DatasetError(f"{path} is missing or not {expected.size} bytes long. Run 'posmlp data validate {self.where}'.")
        return path

    @property
    def num_kept(self) -> int:
        """How many items no overlay leaves out."""
        return len(self) - len(self.overlay.excluded)

    def kept(self) -> npt.NDArray[np.bool_]:
        """Which items no overlay leaves out, (num_items,)."""
        mask = np.ones(len(self), dtype=np.bool_)
        mask[self.overlay.excluded] = False
        return mask

    def videos(self) -> npt.NDArray[np.bool_]:
        """Which kept items stand for the stored videos, (num_items,): all or, of keyframes of one video, the first."""
        mask = self.kept()
        if self.info.boxes is not None:
            rows = np.flatnonzero(mask)
            places = np.stack([self.column(name)[rows].astype(np.int64) for name in ("shard", "offset")], axis=1)
            mask[:] = False
            mask[rows[np.unique(places, axis=0, return_index=True)[1]]] = True
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
        values = {name: self._table.column(name)[row].as_py() for name in self._table.column_names if name in Item.__dataclass_fields__}
        values["label"] = self.overlay.label(row, values["label"])
        shard = self.info.shards[self._table.column("shard")[row].as_py()]
        return Item(row=row, shard_file=shard.file, **values)

    @property
    def parts(self) -> list["Dataset"]:
        """Itself, as the only dataset in a mixture of one."""
        return [self]

    def part(self, row: int) -> int:
        """0, as the number of the only dataset in a mixture of one."""
        return 0

    def rows(self, split_column: str, split: str) -> npt.NDArray[np.uint32]:
        """Rows of one split without those left out, ascending, shape (n,). Raises DatasetError naming what there is instead."""
        names = self.info.splits.get(split_column)
        if names is None:
            raise DatasetError(
                f"{self.where} has no split column '{split_column}'; it has {sorted(self.info.splits)}. Set data.split_column."
            )
        if split not in names:
            raise DatasetError(
                f"{self.where}: split column '{split_column}' has {names}, not '{split}'. Set data.train_split or data.val_split."
            )
        wanted = self.column(SPLIT_PREFIX + split_column) == names.index(split)
        wanted[self.overlay.excluded] = False
        return np.flatnonzero(wanted).astype(np.uint32)


def _generation_name(name: str, generation: int) -> str:
    stem, _, suffix = name.partition(".")
    return f"{stem}-{generation:06d}.{suffix}" if generation else name


def _mapped(path: Path, info: DatasetInfo, where: Location) -> pa.Table:
    """The index, which must be as dataset.json says."""
    if not path.is_file() or path.stat().st_size != info.index_size:
        raise DatasetError(f"{path} is missing or not {info.index_size} bytes long. Run 'posmlp data validate {where}'.")
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except pa.ArrowInvalid as error:
        raise DatasetError(f"{path} is damaged ({error}). Run 'posmlp data validate {where}'.") from None
    expected = [column.name for column in index_schema(list(info.splits), keyframes=info.boxes is not None)]
    if table.column_names != expected or table.num_rows != info.num_items:
        raise DatasetError(f"{path}: {table.num_rows} rows of {table.column_names}, expected {info.num_items} of {expected}.")
    return table


def read_info(place: Location) -> DatasetInfo:
    """`dataset.json` of the dataset in `place`. Raises DatasetError when there is none, or it cannot be read; StorageError."""
    if isinstance(place, str):
        return _read_manifest(RemoteFolder(place))[1]
    manifest = place / "dataset.json"
    if not manifest.is_file():
        state = "an unfinished build: run the build command again to finish it" if (place / "build").is_dir() else "no dataset"
        raise DatasetError(f"{place} holds {state} (there is no dataset.json in it).")
    return DatasetInfo.from_json(manifest.read_text(encoding="utf-8"), str(manifest))


def _read_manifest(folder: RemoteFolder) -> tuple[bytes, DatasetInfo]:
    """`dataset.json` as it is and as it reads; once more where what came is no such file, since there is no checksum of it."""

    def read() -> tuple[bytes, DatasetInfo]:
        text = folder.read_all("dataset.json", MAX_INFO_BYTES)
        return text, DatasetInfo.from_json(text.decode(errors="replace"), f"{folder}/dataset.json")

    try:
        try:
            text, info = read()
        except DatasetError:
            return read()
        return (text, info) if info.with_fingerprint().fingerprint == info.fingerprint else read()
    except FileNotFoundError:
        raise DatasetError(f"{folder} holds no finished dataset (there is no dataset.json in it).") from None


def index_schema(split_columns: list[str], *, keyframes: bool = False) -> pa.Schema:
    """The columns of `index.arrow`, in order; one more int8 column per split column. keyframes: whether items are keyframes."""
    columns = [*COLUMNS, KEYFRAME] if keyframes else COLUMNS
    return pa.schema([*columns, *(pa.field(SPLIT_PREFIX + name, pa.int8(), nullable=False) for name in split_columns)])


def write_index(path: Path, tables: Iterable[pa.Table]) -> tuple[str, int]:
    """Writes rows, in the order given, as one uncompressed record batch (so that columns map without a copy).

    tables: of `index_schema`. Returns the file's SHA-256 and size in bytes; the file appears whole or not at all.
    """
    whole = pa.concat_tables(tables).combine_chunks()
    with committed(path) as file, pa.ipc.new_file(file, whole.schema.remove_metadata()) as writer:
        writer.write_table(whole.replace_schema_metadata(None))
    return sha256_of(path), path.stat().st_size
