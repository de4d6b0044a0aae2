"""One label file as a table of text, whatever its format. The format is told from the file's beginning, or stated by `data.format`.

csv, tsv, jsonl, parquet   columns path, label; optionally group, start_s, end_s, and any whose names start with "split"
kinetics, kinetics_whole   the official CSV: label, youtube_id, time_start, time_end, split
something                  Something-Something: V2's JSON of {id, template}, V1's lines `id;label`
list                       no header: `path label` (PySlowFast, MMAction2) or `frame-folder num_frames label` (MMAction2)
ava, ava_cut               AVA's CSV without a header: video, second, x1, y1, x2, y2 (fractions), action's number, person's number
boxes                      columns path (or video), frame, x1, y1, x2, y2 in pixels or x1_frac, ... in fractions, label; optionally person
classes                    not of videos: class names and their numbers. A JSON object, such as Something-Something's labels.json; AVA's
                           label map (.pbtxt); CSV with id,name

CSV and lists are streamed; of JSON only what is used is kept while it is parsed. Nothing of a file is ever executed.
"""

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from pipeline.errors import ManifestError

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".mts", ".flv", ".wmv", ".3gp", ".ogv", ".ivf", ".mxf"}
)
FORMATS = {  # name -> for people
    "csv": "CSV with path,label",
    "tsv": "TSV with path,label",
    "jsonl": "JSON lines with path, label",
    "parquet": "Parquet with path,label",
    "kinetics": "official Kinetics list",
    "kinetics_whole": "official Kinetics list over whole videos, cut at time_start,time_end",
    "something": "Something-Something list",
    "list": "list of `path label` lines",
    "ava": "AVA list of boxes, seconds of the whole videos",
    "ava_cut": "AVA list of boxes, over videos that were cut at second 900",
    "boxes": "CSV of boxes by frame",
}
BOX_FORMATS = frozenset({"ava", "ava_cut", "boxes"})  # a row is one box of a keyframe and one of its labels
AVA_COLUMNS = ["path", "time", "x1", "y1", "x2", "y2", "label", "person"]
FOLDER_FORMATS = {  # without label files
    "folders": "class folders",
    "frames": "class folders of videos as folders of numbered pictures",
    "images": "class folders of pictures",
    "tars": "WebDataset tars",
}
HEAD_BYTES = 1 << 20  # in which the format is looked for
MAX_JSON_BYTES = 1 << 30  # a JSON list is parsed whole; the largest known ones have 60 MB
KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end")
KNOWN_COLUMNS = frozenset({"path", "label", "group", "start_s", "end_s"})
BOX_CORNERS = (("x1", "y1", "x2", "y2"), ("x1_frac", "y1_frac", "x2_frac", "y2_frac"))  # in pixels; in fractions of the frame
_AVA = re.compile(r"[^,/\s]+,\d+(\.\d*)?(,[-+.\deE]+){4},\d+(,\d+)?")
_ONE, _TWO = re.compile(r"(.+?)[ ,\t]+(\d+)$"), re.compile(r"(.+?)[ ,\t]+(\d+)[ ,\t]+(\d+)$")

Record = tuple[int, Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A label file. columns: those that are used. records: (number of its line, row or entry; a text per column), read when asked for.

    unit: "line", "row" or "entry". Iterating raises ManifestError.
    """

    format: str
    columns: list[str]
    unit: str
    records: Iterator[Record]


def open_table(path: Path, stated: str = "auto") -> Table:
    """The table in a label file; stated: one of FORMATS, or "auto". Raises ManifestError, as iterating the records does."""
    if not path.is_file():
        raise ManifestError(f"{path} is not a file. data.labels must name a CSV, TSV, JSONL or Parquet file with columns path and label, "
                            "or a list of Kinetics, Something-Something, PySlowFast or MMAction2.")  # fmt: skip
    kind = detect(path) if stated == "auto" else stated
    if kind == "parquet":
        return _checked(path, kind, "row", *_read_parquet(path))
    if kind == "something":
        return Table(format=kind, columns=["path", "label"], unit=_something_unit(path), records=_explained(path, _read_something(path)))
    if kind == "list":
        return Table(format=kind, columns=["path", "num_frames", "label"], unit="line", records=_explained(path, _read_list(path)))
    if kind in ("ava", "ava_cut"):
        return Table(format=kind, columns=AVA_COLUMNS, unit="line", records=_explained(path, _read_ava(path)))
    if kind == "boxes":
        return _checked_boxes(path, *read_csv(path, ","))
    return _checked(path, kind, "line", *(_read_jsonl(path) if kind == "jsonl" else read_csv(path, "\t" if kind == "tsv" else ",")))


def detect(path: Path) -> str:
    """Which of FORMATS, or "classes", the beginning of a file looks like; "csv" where nothing else fits."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(b"PAR1") or path.suffix.lower() in (".parquet", ".pq"):
        return "parquet"
    lines = head.decode("utf-8-sig", errors="replace").split("\n")
    first = next((line.strip("\r ") for line in lines if line.strip()), "")
    if first.startswith("["):
        return "something"
    if first.startswith("{"):
        return "jsonl" if _is_row(first) else "classes"
    if path.suffix.lower() == ".pbtxt" or re.match(r"(item|label)\s*\{", first):
        return "classes"
    names = set(_names(first, ","))
    if "youtube_id" in names:
        return "kinetics"
    if names in ({"id", "name"}, {"label_id", "name"}):
        return "classes"
    if {"frame", "label"} <= names and any(set(corners) <= names for corners in BOX_CORNERS):
        return "boxes"
    if _AVA.fullmatch(first):
        return "ava"
    for kind, delimiter in (("csv", ","), ("tsv", "\t")):
        if {"path", "label"} <= set(_names(first, delimiter)):
            return kind
    if re.match(r"(\d+|id);.", first):
        return "something"
    if _ONE.fullmatch(first):
        return "list"
    return "tsv" if "\t" in first and path.suffix.lower() == ".tsv" else "csv"


def _names(line: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:  # no line of a table, for example one that never ends
        return []


def _is_row(line: str) -> bool:
    """Whether a line that begins like a JSON object is one of JSON lines, and not the beginning of a file of classes."""
    try:
        values = json.loads(line)
    except ValueError:
        return False
    return isinstance(values, dict) and not all(re.fullmatch(r"\d+", str(value)) for value in values.values())


def _checked(path: Path, kind: str, unit: str, columns: list[str], records: Iterator[Record]) -> Table:
    """The table cut down to the columns that are used. Raises ManifestError when one is lacking."""
    needed = set(KINETICS_COLUMNS if kind.startswith("kinetics") else ("path", "label"))
    lacking = needed - set(columns)
    if lacking:
        raise ManifestError(f"{path} lacks the column {' and '.join(sorted(lacking))}; it has {', '.join(columns) or 'none'}.")
    wanted = needed if kind.startswith("kinetics") else KNOWN_COLUMNS
    kept = [name for name in columns if name in wanted or name.startswith("split")]
    places = [columns.index(name) for name in kept]
    cut = ((number, [record[place] for place in places]) for number, record in records)
    return Table(format=kind, columns=kept, unit=unit, records=_explained(path, cut))


def _checked_boxes(path: Path, columns: list[str], records: Iterator[Record]) -> Table:
    """The table cut down to the columns that are used, `video` as `path`. Raises ManifestError when one is lacking."""
    columns = ["path" if name == "video" and "path" not in columns else name for name in columns]
    both = [corners for corners in BOX_CORNERS if set(corners) <= set(columns)]
    lacking = sorted({"path", "frame", "label"} - set(columns))
    if len(both) != 1 or lacking:
        what = f"lacks the column {' and '.join(lacking)}" if lacking else "must have the corners of its boxes once, in pixels or fractions"
        raise ManifestError(
            f"{path} {what}; it has {', '.join(columns) or 'none'}. A list of boxes has path (or video), frame, label, and x1,y1,x2,y2 in "
            "pixels or x1_frac,y1_frac,x2_frac,y2_frac in fractions of the frame; optionally person, group and columns of splits."
        )
    wanted = {"path", "frame", "label", "person", "group", *both[0]}
    kept = [name for name in columns if name in wanted or name.startswith("split")]
    places = [columns.index(name) for name in kept]
    cut = ((number, [record[place] for place in places]) for number, record in records)
    return Table(format="boxes", columns=kept, unit="line", records=_explained(path, cut))


def _read_ava(path: Path) -> Iterator[Record]:
    """AVA_COLUMNS; person is "" where there is none."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, record in enumerate(csv.reader(file), 1):
            if not record:
                continue
            if len(record) not in (7, 8):
                raise ManifestError(
                    f"{path}, line {number} has {len(record)} fields, expected video,second,x1,y1,x2,y2,action and optionally person."
                )
            yield number, [*record, ""][:8]


def _explained(path: Path, records: Iterator[Record]) -> Iterator[Record]:
    try:
        yield from records
    except (UnicodeDecodeError, csv.Error, pa.ArrowInvalid) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception) -> ManifestError:
    return ManifestError(f"{path} cannot be read: {error}. Expected CSV in UTF-8 with a header line, TSV, JSON or a list, or Parquet.")


def read_csv(path: Path, delimiter: str) -> tuple[list[str], Iterator[Record]]:
    def rows() -> Iterator[Record]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            header = next(reader, [])
            yield reader.line_num, [name.strip() for name in header]
            for record in reader:
                if not record:
                    continue
                if len(record) != len(header):
                    raise csv.Error(f"line {reader.line_num} has {len(record)} fields, the header {len(header)}")
                yield reader.line_num, record

    records = _explained(path, rows())
    return list(next(records)[1]), records


def _read_jsonl(path: Path) -> tuple[list[str], Iterator[Record]]:
    """Columns are the keys of the first line; every line must have them. null is an empty cell."""

    def objects() -> Iterator[tuple[int, dict[str, object]]]:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                except ValueError as error:
                    raise ManifestError(f"{path}, line {number} is not a JSON object: {error}.") from None
                if not isinstance(values, dict):
                    raise ManifestError(f"{path}, line {number}: got a {type(values).__name__}, expected a JSON object.")
                yield number, values

    def rows(first: tuple[int, dict[str, object]], rest: Iterator[tuple[int, dict[str, object]]]) -> Iterator[Record]:
        for number, values in chain([first], rest):
            if lacking := [name for name in columns if name not in values]:
                raise ManifestError(f"{path}, line {number} lacks '{lacking[0]}', which line {first[0]} has. null is an empty value.")
            cells = [values[name] for name in columns]
            if any(isinstance(cell, dict | list) for cell in cells):
                raise ManifestError(f"{path}, line {number}: a value is a list or an object, expected text or a number.")
            yield number, ["" if cell is None else str(cell) for cell in cells]

    lines = objects()
    try:
        first = next(lines, None)
    except UnicodeDecodeError as error:
        raise unreadable(path, error) from None
    columns = [name for name in (first[1] if first else {}) if name in KNOWN_COLUMNS or name.startswith("split")]
    return columns, iter(()) if first is None else rows(first, lines)


def _read_parquet(path: Path) -> tuple[list[str], Iterator[Record]]:
    try:
        table = pyarrow.parquet.read_table(path)
    except pa.ArrowInvalid as error:
        raise unreadable(path, error) from None
    names = list(table.column_names)
    used = [name in KNOWN_COLUMNS or name.startswith("split") for name in names]

    def rows() -> Iterator[Record]:
        number = 0
        for batch in table.to_batches(max_chunksize=1 << 16):
            cells = [column.to_pylist() if use else [None] * len(column) for use, column in zip(used, batch.columns, strict=True)]
            for record in zip(*cells, strict=True):
                yield number, ["" if value is None else str(value) for value in record]
                number += 1

    return names, rows()


def _something_unit(path: Path) -> str:
    with path.open("rb") as file:
        return "entry" if file.read(HEAD_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[") else "line"


def _read_something(path: Path) -> Iterator[Record]:
    """(video's id, template without its brackets)."""
    if _something_unit(path) == "line":
        yield from _read_semicolons(path)
        return
    # Each object shrinks to two strings while the rest is still being parsed.
    entries = parsed_json(path, lambda entry: (str(entry.get("id", "")), str(entry.get("template", ""))))
    assert isinstance(entries, list)
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, tuple) or not all(entry):
            what = f"(id {entry[0]}) has no template" if isinstance(entry, tuple) and entry[0] else "has no id"
            raise ManifestError(
                f"{path}, entry {number} {what}. Expected objects with id and template; lists of the test split have no labels: "
                "leave them out, or give the file with their answers."
            )
        yield number, [entry[0], re.sub(r"[\[\]]", "", entry[1])]


def _read_semicolons(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            name, separator, label = line.strip().partition(";")
            if not line.strip() or (number == 1 and name == "id"):
                continue
            if not separator or not label:
                raise ManifestError(f"{path}, line {number}: got '{line.strip()[:60]}', expected id;label.")
            yield number, [name, re.sub(r"[\[\]]", "", label)]


def parsed_json(path: Path, shrink: object) -> object:
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ManifestError(f"{path} has {size} bytes, a JSON list may have {MAX_JSON_BYTES}. Give JSON lines, CSV or Parquet instead.")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_hook=shrink)  # type: ignore[arg-type]
    except json.JSONDecodeError as error:
        raise ManifestError(f"{path}, line {error.lineno} is not valid JSON: {error.msg} (column {error.colno}).") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise unreadable(path, error) from None


def _read_list(path: Path) -> Iterator[Record]:
    """(path, number of frames or "", label)."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            text = line.strip()
            if not text:
                continue
            one, two = _ONE.fullmatch(text), _TWO.fullmatch(text)
            if two is not None and os.path.splitext(two[1])[1].lower() in VIDEO_SUFFIXES:
                raise ManifestError(f"{path}, line {number}: '{text[:80]}' has more than one label. A video has one here.")
            if one is None:
                raise ManifestError(
                    f"{path}, line {number}: got '{text[:80]}', expected `path label` or `frame-folder num_frames label`, "
                    "separated by space or comma; the label is a whole number."
                )
            yield number, [two[1], two[2], two[3]] if two is not None else [one[1], "", one[2]]
