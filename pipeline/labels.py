"""What is said of each video: by the rows of label files, or by the folders that the videos lie in.

Several label files are one list; each that has no split column of its own is a split, named by the user or by the file's name.
"""

import math
import re
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.box_labels import BoxLabels, VideoBoxes, read_excluded
from pipeline.boxes import Boxes
from pipeline.class_file import read_classes
from pipeline.downloads import Downloads, clip_names
from pipeline.errors import ManifestError
from pipeline.frame_folder import IMAGE_SUFFIXES
from pipeline.label_file import BOX_FORMATS, FOLDER_FORMATS, FORMATS, VIDEO_SUFFIXES, Table, detect, open_table
from pipeline.tar_source import videos_of
from pipeline.video_folder import Videos

LabelFiles: TypeAlias = "Path | Sequence[Path] | Mapping[str, Path] | None"  # a mapping: split -> file
SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
AROUND_S = 5  # seconds of a long video that are kept before its first keyframe and after its last
SPLIT_WORDS = {**SPLIT_FOLDERS, "training": "train", "validate": "val", "valid": "val", "testing": "test"}  # in names of label files


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a label file, still as text. splits: a name per split column.

    file, unit, number: where it stands; without a unit, `file` is the folder in which `path` was found.
    part: (tar, offset, size in bytes) of a video in a tar. boxes: of a list of boxes, whose row is a video with all that the list says of
    it; their labels are numbers of `Labels.classes`.
    """

    file: str
    unit: str
    number: int
    path: str
    label: str
    splits: tuple[str, ...] = ()
    group: str = ""
    start_s: str = ""
    end_s: str = ""
    num_frames: str = ""
    part: tuple[str, int, int] | None = None
    boxes: Boxes | None = None

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.file}, {self.unit} {self.number}" if self.unit else f"{self.file}/{self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What is said of all videos. format: one of FORMATS or FOLDER_FORMATS, or several of FORMATS. split_columns: sorted.

    classes: all that a file of classes names, in its order; without one all of a list of boxes, otherwise None.
    by_id: files named by a YouTube id alone of which nobody has said whether they are clips or whole videos.
    """

    rows: list[Row]
    split_columns: list[str]
    format: str
    classes: list[str] | None = None
    by_id: Sequence[str] = ()


def read_labels(videos: Videos, labels: LabelFiles, stated: str = "auto") -> Labels:
    """What the label files, or else the folders, say of the videos. stated: the format, or "auto". Raises ManifestError."""
    files = _files(labels)
    if files and stated in FOLDER_FORMATS:
        raise ManifestError(f"data.format={stated} is for folders without label files, but data.labels names {names_of(labels)}.")
    if not files and stated in FORMATS:
        raise ManifestError(f"data.format={stated} is a format of label files. Set data.labels.")
    if not files:
        return rows_of_folder(videos, stated)
    class_files = [path for _, path in files if path.is_file() and detect(path) == "classes"]
    files = [(split, path) for split, path in files if path not in class_files]
    if not files or len(class_files) > 1:
        given = " and ".join(str(path) for path in class_files)
        raise ManifestError(f"{given} numbers classes and names no video. Give one such file at most, and label files beside it.")
    classes = read_classes(class_files[0]) if class_files else None
    if stated in BOX_FORMATS or (stated == "auto" and any(path.is_file() and detect(path) in BOX_FORMATS for _, path in files)):
        return _read_boxes(videos, files, stated, classes)
    tables = [(split, path, open_table(path, stated)) for split, path in files]
    columns = _split_columns(tables)
    rows: list[Row] = []
    by_id: list[str] = []
    downloads = Downloads(videos.walk()) if any(table.format.startswith("kinetics") for _, _, table in tables) else None
    for split, path, table in tables:
        named = split or (_split_of(path) if len(tables) > 1 and not _own_splits(table) else "")
        made = _rows(table, str(path), columns, named)
        if table.format.startswith("kinetics"):
            assert downloads is not None
            made = _located(made, downloads, by_id, whole=table.format == "kinetics_whole")
        rows.extend(made if classes is None else _numbered(made, classes))
    kinds = list(dict.fromkeys(table.format for _, _, table in tables))
    names = None if classes is None else list(classes.values())
    return Labels(rows=rows, split_columns=columns, format=" and ".join(kinds), classes=names, by_id=by_id if stated == "auto" else ())


def _read_boxes(videos: Videos, files: Sequence[tuple[str, Path]], stated: str, classes: dict[int, str] | None) -> Labels:
    """Lists of boxes, all of one format; beside AVA's may lie lists of excluded timestamps."""
    kinds = {path: detect(path) for _, path in files if path.is_file()}
    ava = stated in ("ava", "ava_cut") or "ava" in kinds.values()
    excluded = frozenset(each for _, path in files if ava and kinds.get(path) == "list" for each in read_excluded(path))
    tables = [(split, path, open_table(path, stated)) for split, path in files if not ava or kinds.get(path) != "list"]
    formats = list(dict.fromkeys(table.format for _, _, table in tables))
    if len(formats) > 1:
        raise ManifestError(f"Lists of boxes cannot be mixed with others: got {' and '.join(formats)}. Build a dataset of each.")
    columns, reader = _split_columns(tables), BoxLabels(excluded)
    known = None if classes is None else {*classes.values(), *map(str, classes)}
    found: list[tuple[Path, VideoBoxes]] = []
    for split, path, table in tables:
        named = split or (_split_of(path) if len(tables) > 1 and not _own_splits(table) else "")
        found += [(path, each) for each in reader.read(table, path, columns, named, known)]
    named_classes = {} if classes is None else classes
    labels = [_class_name(name, named_classes, set(named_classes.values())) for name in reader.names]
    names = ordered_classes(set(labels)) if classes is None else list(classes.values())
    places = {name: place for place, name in enumerate(names)}
    numbers = np.array([places[label] for label in labels], dtype=np.int32)
    downloads = Downloads(videos.walk()) if ava else None
    rows = [_video_row(path, each, numbers, names, downloads, whole=formats[0] == "ava") for path, each in found]
    return Labels(rows=rows, split_columns=columns, format=formats[0], classes=names)


def _class_name(label: str, classes: Mapping[int, str], known: Container[str]) -> str:
    """The name of a class that is given by its name, one of `known`, or its number."""
    return label if label in known or not label.isdecimal() else classes.get(int(label), label)


def _video_row(
    path: Path, found: VideoBoxes, numbers: npt.NDArray[np.int32], names: Sequence[str], downloads: Downloads | None, *, whole: bool
) -> Row:
    """whole: of the video only what lies around its keyframes is wanted: AVA's films are hours long, its labels a quarter of one."""
    boxes, where = found.boxes.relabelled(numbers), f"{path}, line {found.line}"
    video = found.video if downloads is None else downloads.named(where, found.video) or found.video
    first, last = found.time_range()
    cut = (f"{max(0.0, math.floor(first) - AROUND_S):g}", f"{math.ceil(last) + AROUND_S:g}") if whole else ("", "")
    label = names[int(np.bincount(boxes.rows["label"]).argmax())]
    return Row(str(path), "line", found.line, video, label, found.splits, found.group, *cut, boxes=boxes)


def ordered_classes(labels: set[str]) -> list[str]:
    """Class names in the order of their indices: integers by value, text alphabetically."""
    if all(re.fullmatch(r"\d+", label) for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def described(labels: Labels) -> str:
    """The format for people, with the key that states it."""
    kinds = labels.format.split(" and ")
    text = " and ".join({**FORMATS, **FOLDER_FORMATS}[kind] for kind in kinds)
    return f"{text} (data.format={kinds[0]})" if len(kinds) == 1 else text


def names_of(labels: LabelFiles) -> str:
    """The label files, for messages."""
    return ", ".join(str(path) for _, path in _files(labels))


def _files(labels: LabelFiles) -> list[tuple[str, Path]]:
    """(split or "", file) of each label file."""
    if labels is None:
        return []
    if isinstance(labels, Path):
        return [("", labels)]
    return list(labels.items()) if isinstance(labels, Mapping) else [("", path) for path in labels]


def _own_splits(table: Table) -> list[str]:
    return sorted(name for name in table.columns if name.startswith("split"))


def _split_columns(tables: Sequence[tuple[str, Path, Table]]) -> list[str]:
    """The split columns that all files have; "split" where a file is one. Raises ManifestError when files differ."""
    found = {}
    for split, path, table in tables:
        own = _own_splits(table)
        found[path] = own or (["split"] if split or len(tables) > 1 else [])
    (first, columns), *others = found.items()
    for path, other in others:
        if other != columns:
            raise ManifestError(f"{first} has the split columns {', '.join(columns)}, {path} {', '.join(other)}. Give all files the same.")
    return columns


def _split_words(name: str) -> set[str]:
    return {SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_WORDS}


def _split_of(path: Path) -> str:
    words = _split_words(path.stem)
    if len(words) != 1:
        raise ManifestError(
            f"{path} has no split column, and its name does not say train, val or test. State its split: --labels train={path.name}, "
            f"or in a recipe data.labels: {{train: {path.name}, ...}}."
        )
    return words.pop()


def _rows(table: Table, file: str, columns: Sequence[str], split: str) -> Iterator[Row]:
    """Rows as the table has them; of an official list, `path` is the YouTube id. split: that of the whole file, "" for none."""
    place = {name: number for number, name in enumerate(table.columns)}
    own = [place[name] for name in columns if name in place]
    path, label = place.get("path", place.get("youtube_id", 0)), place["label"]
    official = table.format.startswith("kinetics")
    optional = [place.get(name) for name in ("group", *(("time_start", "time_end") if official else ("start_s", "end_s")), "num_frames")]
    known: dict[tuple[str, ...], tuple[str, ...]] = {}  # equal texts are kept once: there may be millions of rows
    for number, record in table.records:
        splits = tuple(record[at].strip() for at in own) if own else (split,) * len(columns)
        if official:
            splits = tuple(SPLIT_WORDS.get(name, name) for name in splits)
        if own and split and splits[0] != split:
            raise ManifestError(f"{file}, {table.unit} {number}: its split is '{splits[0]}', but the file was stated to be all '{split}'.")
        splits, name = known.setdefault(splits, splits), sys.intern(record[label].strip())
        group, start_s, end_s, num_frames = (record[at].strip() if at is not None else "" for at in optional)
        yield Row(file, table.unit, number, record[path].strip(), name, splits, sys.intern(group), start_s, end_s, num_frames)


def _located(rows: Iterator[Row], downloads: Downloads, by_id: list[str], *, whole: bool) -> Iterator[Row]:
    """Rows of an official list with the paths of their files; a clip without a file gets the path that it would have.

    whole: files named by the id alone are whole videos, of which the clip is the stated part. Their paths are added to `by_id`.
    """
    for row in rows:
        try:
            start, end = float(row.start_s), float(row.end_s)
        except ValueError:
            start, end = 0.0, -1.0
        if not 0 <= start < end < 1e6 or not row.path or "/" in row.path:
            got = f"youtube_id '{row.path}', time_start '{row.start_s}', time_end '{row.end_s}'"
            raise ManifestError(f"{row.where}: {got}; expected an id, and times in seconds with time_start before time_end.")
        found, alone = downloads.find(row.where, row.path, start, end, row.label)
        if found is not None and alone:
            by_id.append(found)
        cut = (row.start_s, row.end_s) if alone and whole else ("", "")
        path = found or f"{row.label}/{clip_names(row.path, start, end)[0]}"
        yield Row(row.file, row.unit, row.number, path, row.label, row.splits, row.group, *cut)


def _numbered(rows: Iterator[Row], classes: Mapping[int, str]) -> Iterator[Row]:
    """Rows whose label is a class's name, from rows that have its name or its number."""
    known = set(classes.values())
    for row in rows:
        label = _class_name(row.label, classes, known)
        if label not in known:
            raise ManifestError(f"{row.where}: label '{row.label}' is not one of the {len(classes)} classes of the file that numbers them.")
        yield Row(row.file, row.unit, row.number, row.path, label, row.splits, row.group, row.start_s, row.end_s, row.num_frames)


def rows_of_folder(videos: Videos, stated: str = "auto") -> Labels:
    """Every video below `videos`, its class the subfolder, below train/ and val/ where these are the top folders.

    Without a video file, pictures in class folders are items, and folders of pictures in class folders are videos; stated: one of
    FOLDER_FORMATS, or "auto". WebDataset tars are looked for where there is neither. Raises ManifestError.
    """
    paths, kind = _items(videos, stated)
    if kind == "tars":
        return _rows_of_tars(videos, paths)
    if kind == "frames" and paths:
        videos.on_disk(paths[0], "folders of pictures")
    tops = {path.partition("/")[0] for path in paths}
    by_split = bool(tops) and tops <= SPLIT_FOLDERS.keys()
    _refuse_empty(videos, paths, by_split)
    rows = []
    for path in paths:
        parts = path.split("/")
        label = parts[min(1 if by_split else 0, len(parts) - 1)]
        if len(parts) < (3 if by_split else 2):
            raise ManifestError(
                f"{videos}/{path} lies in no class folder. Move each video into a subfolder named after its class, or give a label file."
            )
        splits = (SPLIT_FOLDERS[parts[0]],) if by_split else ()
        rows.append(Row(str(videos), "", 0, path, sys.intern(label.strip()), splits))
    return Labels(rows=rows, split_columns=["split"] if by_split else [], format=kind)


def _refuse_empty(videos: Videos, paths: Sequence[str], by_split: bool) -> None:
    """A class folder without a video is a mistake that would otherwise be seen when the class is missed."""
    depth = 2 if by_split else 1
    full = {"/".join(path.split("/")[:depth]) for path in paths}
    homes = sorted({path.partition("/")[0] for path in paths}) if by_split else ["."]
    empty = [folder for home in homes for folder in videos.subfolders(home) if folder not in full]
    if paths and empty:
        raise ManifestError(
            f"{videos}/{empty[0]} holds no video, as {len(empty)} class folders in all. A subfolder is a class: put videos into it, "
            f"remove it, or give a label file. Videos are files that end in {', '.join(sorted(VIDEO_SUFFIXES))}."
        )


def _rows_of_tars(videos: Videos, tars: Sequence[str]) -> Labels:
    """Every video in the tars. Its split is what its `.json` says, or else the tar's name or folder, where all tars have one."""
    named = {tar: words.pop() for tar in tars if len(words := _split_words(tar)) == 1}
    rows, stated = [], True
    for tar in tars:
        for video in videos_of(videos.on_disk(tar, "WebDataset tars")):
            stated = stated and bool(video.split)
            part = (tar, video.offset, video.size)
            rows.append(Row(str(videos), "", 0, f"{tar}/{video.name}", sys.intern(video.label), (video.split,), video.group, part=part))
    if rows and stated:
        return Labels(rows=rows, split_columns=["split"], format="tars")
    by_name = len(named) == len(tars)
    again = [replace(row, splits=(named[row.part[0]],) if by_name else ()) for row in rows if row.part]
    return Labels(rows=again, split_columns=["split"] if by_name and tars else [], format="tars")


def _items(videos: Videos, stated: str) -> tuple[list[str], str]:
    """(paths of what are items, which of FOLDER_FORMATS they are)."""
    paths = sorted(videos.walk()) if stated in ("auto", "folders") else []
    if paths or stated == "folders":
        return paths, "folders"
    tars = sorted(videos.walk({".tar"}))
    if stated == "tars":
        return tars, "tars"
    homes = {path.rpartition("/")[0] for path in videos.walk(IMAGE_SUFFIXES)}
    if tars and not homes and stated == "auto":
        return tars, "tars"
    by_split = {home.partition("/")[0] for home in homes} <= SPLIT_FOLDERS.keys()
    deep = {home.count("/") > by_split for home in homes}
    if stated == "auto" and len(deep) > 1:
        raise ManifestError(
            f"{videos} holds pictures in class folders and in subfolders of them. Say what they are: data.format=images, one item "
            "each, or data.format=frames, where a folder of numbered pictures is a video."
        )
    if stated == "frames" or deep == {True}:
        return sorted(homes), "frames"
    return sorted(videos.walk(IMAGE_SUFFIXES)), "images" if homes or stated == "images" else "folders"
