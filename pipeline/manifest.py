"""What the user has: videos in a folder and what is known of each, as one ordered list that depends on nothing else.

With a label file every row is an item, otherwise every video is and its class is its subfolder. Keys name items in tars, logs and
ledgers, so they are made here, once: the relative path without its extension, safe for WebDataset.
"""

import hashlib
import os
import re
import stat
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import ManifestError
from pipeline.labels import VIDEO_SUFFIXES, Row, rows_of_file, rows_of_folder

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
    """All items, sorted by key. classes: in the order of their indices. split_columns: names, sorted. missing: paths without a file.

    drawn: whether splits were drawn here because the labels name none.
    """

    sources: list[Source]
    classes: list[str]
    split_columns: list[str]
    missing: list[str]
    drawn: bool


def read_manifest(
    videos: Path,
    labels: Path | None,
    *,
    allow_missing: bool = False,
    val_fraction: float = 0.2,
    seed: int = 0,
    held_groups: Mapping[str, bool] | None = None,
) -> Manifest:
    """What `videos` holds and `labels` says of it.

    labels: CSV or Parquet with columns path and label; optionally group, start_s, end_s, and any number of columns whose names start
    with "split"; others are ignored. Without one: class = subfolder, below train/ and val/ where these are the top folders.
    val_fraction: without any split, this share of each class is held out, drawn by (seed, group or key). held_groups: groups of which
    it is decided already whether they are held out.
    Raises ManifestError naming what does not fit.
    """
    if not videos.is_dir():
        raise ManifestError(f"{videos} is not a folder. data.videos must name the folder that holds the videos.")
    rows = rows_of_folder(videos) if labels is None else rows_of_file(labels)
    split_columns = sorted(name for name in (rows[0].values if rows else {}) if name.startswith("split"))
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
    classes = ordered_classes({source.label for source in sources})
    drawn = not split_columns
    if drawn:
        sources, split_columns = _with_split(sources, val_fraction, seed, held_groups or {}), ["split"]
    sources.sort(key=lambda source: source.key)
    return Manifest(sources=sources, classes=classes, split_columns=split_columns, missing=missing, drawn=drawn)


def _sources(videos: Path, rows: Sequence[Row], split_columns: Sequence[str]) -> tuple[list[Source], list[str]]:
    sources, missing = [], []
    taken: set[str] = set()
    folder = _Folder(os.path.realpath(videos))
    seen: dict[tuple[str, float | None, float | None], Row] = {}
    for row in sorted(rows, key=lambda row: (row.values["path"], row.values.get("start_s", ""), row.values.get("end_s", ""))):
        path, size = folder.find(row)
        start_s, end_s = _seconds(row, "start_s"), _seconds(row, "end_s")
        if start_s is not None and end_s is not None and start_s >= end_s:
            raise ManifestError(f"{row.where}: start_s {start_s:g} is not before end_s {end_s:g}.")
        first = seen.setdefault((path, start_s, end_s), row)
        if first is not row:
            _refuse_contradiction(path, first, row, ["label", *split_columns])
            continue
        if size is None:
            missing.append(path)
            continue
        key = _key(path, start_s, end_s, taken)
        splits = tuple(sys.intern(row.values[name].strip()) for name in split_columns)
        label, group = sys.intern(row.values["label"].strip()), sys.intern(row.values.get("group", "").strip())
        sources.append(Source(key=key, path=path, label=label, splits=splits, group=group, size=size, start_s=start_s, end_s=end_s))
    return sources, missing


def _refuse_contradiction(path: str, first: Row, second: Row, columns: Sequence[str]) -> None:
    for name in columns:
        if first.values[name] != second.values[name]:
            raise ManifestError(
                f"{path} has two values of '{name}': '{first.values[name]}' ({first.where}) and '{second.values[name]}' ({second.where}). "
                "Remove one of the rows, or give them different start_s and end_s."
            )


class _Folder:
    """Looks up files below `home`, a real path; what it learns of subfolders is kept, so that a file costs one system call."""

    def __init__(self, home: str) -> None:
        self._home = home
        self._inside: dict[str, bool] = {}

    def find(self, row: Row) -> tuple[str, int | None]:
        """The row's path, normalised, and its size in bytes, None for no such file. Raises ManifestError when it leads out of here."""
        text = row.values["path"].strip()
        path = os.path.normpath(text) if text else ""
        if not text or os.path.isabs(path) or path.split(os.sep)[0] == "..":
            raise ManifestError(f"{row.where}: path '{text}' must be relative to the videos folder and stay in it.")
        if any("\ud800" <= character <= "\udfff" for character in path):  # bytes that Python could not read as text
            raise ManifestError(f"{row.where}: path {text!a} is not a name in UTF-8. Rename the file.")
        full = os.path.join(self._home, path)
        folder = os.path.dirname(full)
        if folder not in self._inside:
            self._inside[folder] = self._holds(os.path.realpath(folder))
        try:
            status = os.lstat(full)
            if not self._inside[folder] or (stat.S_ISLNK(status.st_mode) and not self._holds(os.path.realpath(full))):
                real = os.path.realpath(full)
                raise ManifestError(f"{row.where}: path '{text}' is a link that leads out of the videos folder, to {real}.")
            size = os.stat(full).st_size if stat.S_ISLNK(status.st_mode) else status.st_size
        except (FileNotFoundError, NotADirectoryError):
            return path.replace(os.sep, "/"), None
        return path.replace(os.sep, "/"), size

    def _holds(self, real: str) -> bool:
        return real == self._home or real.startswith(self._home.rstrip(os.sep) + os.sep)


def _seconds(row: Row, name: str) -> float | None:
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
    folder, _, name = os.path.splitext(path)[0].rpartition("/")
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


def ordered_classes(labels: set[str]) -> list[str]:
    """Class names in the order of their indices: integers by value, text alphabetically."""
    if all(re.fullmatch(r"\d+", label) for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def _with_split(sources: Sequence[Source], val_fraction: float, seed: int, held_groups: Mapping[str, bool]) -> list[Source]:
    """Holds out `val_fraction` of each class by whole groups; see `held_out`."""
    members: dict[str, Counter[str]] = defaultdict(Counter)
    for source in sources:
        members[source.label][source.group or source.key] += 1
    held = held_out(members, val_fraction, seed, held_groups)
    return [replace(source, splits=("val" if held[source.group or source.key] else "train",)) for source in sources]


def held_out(members: Mapping[str, Counter[str]], share: float, seed: int, held_groups: Mapping[str, bool]) -> dict[str, bool]:
    """Group -> whether it is held out: `share` of each class by whole groups, in the order of a keyed hash.

    members: class -> its samples in each group. held_groups: of groups that are decided already. A class of one group is not split;
    every class of two or more has both parts, unless groups are shared between classes in a way that does not allow it.
    """

    def rank(unit: str) -> bytes:
        return hashlib.blake2b(f"{seed}:{unit}".encode(), digest_size=16).digest()

    held = dict(held_groups)  # of units already decided: a group may have videos of several classes, and must not be torn apart
    for units in sorted(members.values(), key=lambda units: (len(units), sorted(units))):
        order = sorted(units, key=rank)
        wanted = share * sum(units.values())
        have = sum(units[unit] for unit in order if held.get(unit, False))
        free = [unit for unit in order if unit not in held]
        kept = len(order) > len(free) + sum(held.get(unit, False) for unit in order)  # a decided unit of this class is in train
        for place, unit in enumerate(free):
            last = place == len(free) - 1 and not kept
            held[unit] = have < wanted and not last
            have += units[unit] * held[unit]
    return held
