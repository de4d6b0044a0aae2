"""What the user has: videos in a folder and what is known of each, as one ordered list that depends on nothing else.

With a label file every row is an item, otherwise every video is and its class is its subfolder. Keys name items in tars, logs and
ledgers, so they are made here, once: the relative path without its extension, safe for WebDataset.
"""

import csv
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet

from pipeline.errors import ManifestError

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".mts", ".flv", ".wmv", ".3gp", ".ogv", ".ivf", ".mxf"}
)
SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
SHOWN = 5  # offenders named in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One item to build. path: relative to the videos folder, with slashes. splits: one name per split column, "" for none.

    size: of the file in bytes. start_s, end_s: the wanted window in seconds, None for the video's own start and end.
    """

    key: str
    path: str
    label: str
    splits: tuple[str, ...]
    group: str
    size: int
    start_s: float | None
    end_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All items, sorted by key. classes: in the order of their indices. split_columns: names. missing: paths without a file."""

    sources: list[Source]
    classes: list[str]
    split_columns: list[str]
    missing: list[str]


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of a label file, still as text. where: for messages."""

    where: str
    values: Mapping[str, str]


def read_manifest(videos: Path, labels: Path | None, *, allow_missing: bool = False, val_fraction: float = 0.2, seed: int = 0) -> Manifest:
    """What `videos` holds and `labels` says of it.

    labels: CSV or Parquet with columns path and label; optionally group, start_s, end_s, and any number of columns whose names start
    with "split"; others are ignored. Without one: class = subfolder, below train/ and val/ where these are the top folders.
    val_fraction: without any split, this share of each class is held out, drawn by (seed, group or key).
    Raises ManifestError naming what does not fit.
    """
    if not videos.is_dir():
        raise ManifestError(f"{videos} is not a folder. data.videos must name the folder that holds the videos.")
    rows = _rows_of_folder(videos) if labels is None else _rows_of_file(labels)
    split_columns = [name for name in (rows[0].values if rows else {}) if name.startswith("split")]
    sources, missing = _sources(videos, rows, split_columns)
    if missing and not allow_missing:
        listed = ", ".join(missing[:SHOWN])
        raise ManifestError(
            f"{labels}: {len(missing)} of {len(rows)} videos are not in {videos}, first {listed}. "
            "Add them, or set data.allow_missing=true to build without them."
        )
    if not sources:
        where = f"named by {labels}" if labels is not None else f"with a suffix such as {', '.join(sorted(VIDEO_SUFFIXES)[:4])}"
        raise ManifestError(f"{videos} holds no video {where}.")
    _check_labels(sources, labels)
    classes = _ordered({source.label for source in sources})
    if not split_columns:
        sources, split_columns = _with_split(sources, val_fraction, seed), ["split"]
    return Manifest(sources=sorted(sources, key=lambda source: source.key), classes=classes, split_columns=split_columns, missing=missing)


def _rows_of_folder(videos: Path) -> list[_Row]:
    paths = sorted(_walk(videos))
    tops = {PurePosixPath(path).parts[0] for path in paths}
    by_split = bool(tops) and tops <= SPLIT_FOLDERS.keys()
    rows = []
    for path in paths:
        parts = PurePosixPath(path).parts
        label = parts[1 if by_split else 0]
        if len(parts) < (3 if by_split else 2):
            raise ManifestError(
                f"{videos / path} lies in no class folder. Move each video into a subfolder named after its class, or give a label file."
            )
        values = {"path": path, "label": label, **({"split": SPLIT_FOLDERS[parts[0]]} if by_split else {})}
        rows.append(_Row(str(videos / path), values))
    return rows


def _walk(videos: Path) -> Iterator[str]:
    """Relative paths of all videos; hidden files and folders are not looked at, links to folders not followed."""
    for folder, folders, files in os.walk(videos):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES:
                yield (Path(folder) / name).relative_to(videos).as_posix()


def _rows_of_file(labels: Path) -> list[_Row]:
    if not labels.is_file():
        raise ManifestError(f"{labels} is not a file. data.labels must name a CSV or Parquet file with columns path and label.")
    try:
        columns, records = _read_parquet(labels) if labels.suffix.lower() in (".parquet", ".pq") else _read_csv(labels)
    except (UnicodeDecodeError, csv.Error, pa.ArrowInvalid) as error:
        raise ManifestError(f"{labels} cannot be read: {error}. Expected CSV in UTF-8 with a header line, or Parquet.") from None
    lacking = {"path", "label"} - set(columns)
    if lacking:
        raise ManifestError(f"{labels} lacks the column {' and '.join(sorted(lacking))}; it has {', '.join(columns) or 'none'}.")
    kept = [name for name in columns if name in ("path", "label", "group", "start_s", "end_s") or name.startswith("split")]
    return [_Row(f"{labels}, {where}", {name: record[columns.index(name)] for name in kept}) for where, record in records]


def _read_csv(labels: Path) -> tuple[list[str], list[tuple[str, Sequence[str]]]]:
    with labels.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        columns = [name.strip() for name in next(reader, [])]
        records: list[tuple[str, Sequence[str]]] = []
        for record in reader:
            if not record:
                continue
            if len(record) != len(columns):
                raise csv.Error(f"line {reader.line_num} has {len(record)} fields, the header {len(columns)}")
            records.append((f"line {reader.line_num}", record))
    return columns, records


def _read_parquet(labels: Path) -> tuple[list[str], list[tuple[str, Sequence[str]]]]:
    table = pyarrow.parquet.read_table(labels)
    columns = [["" if value is None else str(value) for value in column.to_pylist()] for column in table.columns]
    return list(table.column_names), [(f"row {number}", record) for number, record in enumerate(zip(*columns, strict=True))]


def _sources(videos: Path, rows: Sequence[_Row], split_columns: Sequence[str]) -> tuple[list[Source], list[str]]:
    sources, missing = [], []
    taken: set[str] = set()
    home = os.path.realpath(videos)
    seen: dict[tuple[str, float | None, float | None], _Row] = {}
    for row in sorted(rows, key=lambda row: (row.values["path"], row.values.get("start_s", ""), row.values.get("end_s", ""))):
        path = _relative(row, home)
        start_s, end_s = _seconds(row, "start_s"), _seconds(row, "end_s")
        if start_s is not None and end_s is not None and start_s >= end_s:
            raise ManifestError(f"{row.where}: start_s {start_s:g} is not before end_s {end_s:g}.")
        first = seen.setdefault((path, start_s, end_s), row)
        if first is not row:
            if first.values["label"] != row.values["label"]:
                raise ManifestError(
                    f"{path} has two labels: '{first.values['label']}' ({first.where}) and '{row.values['label']}' ({row.where})."
                )
            continue
        try:
            size = os.stat(os.path.join(home, path)).st_size
        except FileNotFoundError:
            missing.append(path)
            continue
        key = _key(path, start_s, end_s, taken)
        splits = tuple(row.values[name].strip() for name in split_columns)
        label, group = row.values["label"].strip(), row.values.get("group", "").strip()
        sources.append(Source(key=key, path=path, label=label, splits=splits, group=group, size=size, start_s=start_s, end_s=end_s))
    return sources, missing


def _relative(row: _Row, home: str) -> str:
    """The row's path below the videos folder. Raises ManifestError when it leads out of it, by itself or through a link."""
    text = row.values["path"].strip()
    path = os.path.normpath(text) if text else ""
    if not text or os.path.isabs(path) or path.split(os.sep)[0] == "..":
        raise ManifestError(f"{row.where}: path '{text}' must be relative to the videos folder and stay in it.")
    real = os.path.realpath(os.path.join(home, path))
    if real != home and not real.startswith(home + os.sep):
        raise ManifestError(f"{row.where}: path '{text}' is a link that leads out of the videos folder, to {real}.")
    return Path(path).as_posix()


def _seconds(row: _Row, name: str) -> float | None:
    text = row.values.get(name, "").strip()
    if not text or text.lower() == "nan":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e7:
        raise ManifestError(f"{row.where}: {name} is '{text}', expected seconds from 0.")
    return value


def _key(path: str, start_s: float | None, end_s: float | None, taken: set[str]) -> str:
    """A unique WebDataset key: no dot in its last part (the rest of a member's name is its extension), no odd characters."""
    stem = PurePosixPath(path).with_suffix("").as_posix()
    folder, _, name = stem.rpartition("/")
    key = re.sub(r"[^\w/+=@ -]", "_", f"{folder}/{name.replace('.', '_')}".lstrip("/"))
    if start_s is not None or end_s is not None:
        window = [f"{round(1000 * value):09d}" if value is not None else "end" for value in (start_s or 0.0, end_s)]
        key += f"_{window[0]}_{window[1]}"
    unique, number = key, 1
    while unique in taken:
        number += 1
        unique = f"{key}-{number}"
    taken.add(unique)
    return unique


def _check_labels(sources: Sequence[Source], labels: Path | None) -> None:
    empty = [source.path for source in sources if not source.label]
    if empty:
        raise ManifestError(f"{labels}: {len(empty)} videos have an empty label, first {empty[0]}.")


def _ordered(labels: set[str]) -> list[str]:
    """Class names in the order of their indices: integers by value, text alphabetically."""
    if all(re.fullmatch(r"\d+", label) for label in labels):
        return sorted(labels, key=int)
    return sorted(labels)


def _with_split(sources: Sequence[Source], val_fraction: float, seed: int) -> list[Source]:
    """Holds out `val_fraction` of each class by whole groups, in the order of a keyed hash; a class of one group is not split."""
    members: dict[str, Counter[str]] = defaultdict(Counter)
    for source in sources:
        members[source.label][source.group or source.key] += 1

    def rank(unit: str) -> bytes:
        return hashlib.blake2b(f"{seed}:{unit}".encode(), digest_size=16).digest()

    held: set[str] = set()
    for _, units in sorted(members.items()):
        wanted = val_fraction * sum(units.values())
        order = sorted(units, key=rank)
        have = sum(units[unit] for unit in order if unit in held)  # a group may have videos of several classes
        for unit in order[: len(order) - 1]:
            if have >= wanted:
                break
            if unit not in held:
                held.add(unit)
                have += units[unit]
    return [replace(source, splits=("val" if (source.group or source.key) in held else "train",)) for source in sources]
