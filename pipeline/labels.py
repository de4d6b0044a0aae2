"""What is said of each video: by the rows of a label file, or by the folders that the videos lie in."""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from pipeline.errors import ManifestError
from pipeline.location import Location

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".mts", ".flv", ".wmv", ".3gp", ".ogv", ".ivf", ".mxf"}
)
SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a label file, still as text. where: for messages."""

    where: str
    values: Mapping[str, str]


def rows_of_folder(videos: Path) -> list[Row]:
    """Every video below `videos`, its class the subfolder, below train/ and val/ where these are the top folders. Raises ManifestError."""
    paths = sorted(_walk(videos))
    _refuse_empty(videos, paths, _by_split(paths))
    return _rows(videos, paths)


def rows_of_paths(url: str, paths: Sequence[str]) -> list[Row]:
    """The same of what a store lists below `url`."""
    shown = (path for path in paths if not any(part.startswith(".") for part in path.split("/")))
    return _rows(url, sorted(path for path in shown if os.path.splitext(path)[1].lower() in VIDEO_SUFFIXES))


def _by_split(paths: Sequence[str]) -> bool:
    tops = {path.partition("/")[0] for path in paths}
    return bool(tops) and tops <= SPLIT_FOLDERS.keys()


def _rows(videos: Location, paths: Sequence[str]) -> list[Row]:
    by_split = _by_split(paths)
    rows = []
    for path in paths:
        parts = path.split("/")
        label = parts[min(1 if by_split else 0, len(parts) - 1)]
        if len(parts) < (3 if by_split else 2):
            raise ManifestError(
                f"{videos}/{path} lies in no class folder. Move each video into a subfolder named after its class, or give a label file."
            )
        values = {"path": path, "label": label, **({"split": SPLIT_FOLDERS[parts[0]]} if by_split else {})}
        rows.append(Row(f"{videos}/{path}", values))
    return rows


def _refuse_empty(videos: Path, paths: Sequence[str], by_split: bool) -> None:
    """A class folder without a video is a mistake that would otherwise be seen when the class is missed."""
    depth = 2 if by_split else 1
    full = {"/".join(path.split("/")[:depth]) for path in paths}
    homes = sorted({path.partition("/")[0] for path in paths}) if by_split else ["."]
    folders = [path for home in homes for path in sorted((videos / home).iterdir()) if path.is_dir() and not path.name.startswith(".")]
    empty = [folder for folder in folders if folder.relative_to(videos).as_posix() not in full]
    if paths and empty:
        raise ManifestError(
            f"{empty[0]} holds no video, as {len(empty)} class folders in all. A subfolder is a class: put videos into it, remove it, "
            f"or give a label file. Videos are files that end in {', '.join(sorted(VIDEO_SUFFIXES))}."
        )


def _walk(videos: Path) -> Iterator[str]:
    """Relative paths of all videos; hidden files and folders are not looked at, links to folders not followed."""
    home = os.fspath(videos)
    for folder, folders, files in os.walk(home):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inner = os.path.relpath(folder, home).replace(os.sep, "/")
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES:
                yield name if inner == "." else f"{inner}/{name}"


def rows_of_file(labels: Path) -> list[Row]:
    """Every row of a CSV or Parquet file, its columns that are known. Raises ManifestError."""
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
    return [Row(f"{labels}, {where}", {name: record[columns.index(name)] for name in kept}) for where, record in records]


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
