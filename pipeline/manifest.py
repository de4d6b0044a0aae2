"""What the user has: videos in a folder and what is known of each, as one ordered list that depends on nothing else.

With a label file every row is an item, otherwise every video is and its class is its subfolder. Keys name items in tars, logs and
ledgers, so they are made here, once: the relative path without its extension, safe for WebDataset.
"""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.boxes import Boxes
from pipeline.errors import ManifestError
from pipeline.label_file import VIDEO_SUFFIXES
from pipeline.labels import LabelFiles, Labels, Row, described, names_of, ordered_classes, read_labels
from pipeline.location import Location
from pipeline.video_folder import Videos, videos_at

SHOWN = 5  # offenders named in a message
WINDOW_MARK = "~"  # in keys of a long video's windows, between the video's key, which never has it, and the window's number


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One item to build. path: relative to the videos folder, with slashes. splits: one name per split column, "" for none.

    size: of the file in bytes. start_s, end_s: the wanted window in seconds, None for the video's own start and end.
    num_frames: of a folder of numbered pictures, as listed or else as found; None for a file.
    tar, offset: of a video in a tar, where it is: relative to the videos folder, in bytes.
    boxes: of a video whose keyframes are the items; their labels are indices into `Manifest.classes`, and `label` is the most frequent.
    """

    key: str
    path: str
    label: str
    splits: tuple[str, ...]
    group: str
    size: int
    start_s: float | None
    end_s: float | None
    num_frames: int | None = None
    tar: str = ""
    offset: int = 0
    boxes: Boxes | None = None

    @property
    def file(self) -> str:
        """What is there to be opened: the tar, or the path itself."""
        return self.tar or self.path


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All items, sorted by key. classes: in the order of their indices. split_columns: names, sorted. missing: paths without a file.

    drawn: whether splits were drawn here because the labels name none. format: as what the labels were read, for people.
    """

    sources: list[Source]
    classes: list[str]
    split_columns: list[str]
    missing: list[str]
    drawn: bool
    format: str

    @property
    def box_classes(self) -> list[str] | None:
        """What the labels of boxes mean where items are keyframes, None where they are videos."""
        return self.classes if self.sources and self.sources[0].boxes is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """What labels list: `present` with a file, `absent` without one (whose key is "" and size 0)."""

    labels: Labels
    present: list[Source]
    absent: list[Source]


def read_manifest(
    videos: Location,
    labels: LabelFiles,
    *,
    format: str = "auto",
    allow_missing: bool = False,
    val_fraction: float = 0.2,
    seed: int = 0,
    held_groups: Mapping[str, bool] | None = None,
) -> Manifest:
    """What `videos`, a folder or a URL, holds and `labels` says of it.

    labels, format: see `label_file`; without a label file, class = subfolder, below train/ and val/ where these are the top folders.
    val_fraction: without any split, this share of each class is held out, drawn by (seed, group or key). held_groups: groups of which
    it is decided already whether they are held out.
    Raises ManifestError naming what does not fit, StorageError.
    """
    listed = list_videos(videos, labels, format)
    sources, named = listed.present, names_of(labels)
    missing = [source.path for source in listed.absent]
    if missing and not allow_missing:
        raise ManifestError(
            f"{named}: {len(missing)} of {len(listed.labels.rows)} videos are not in {videos}, first {', '.join(missing[:SHOWN])}. "
            "Add them, or set data.allow_missing=true to build without them."
        )
    if not sources:
        where = f"named by {named}" if labels is not None else f"with a suffix such as {', '.join(sorted(VIDEO_SUFFIXES)[:4])}"
        raise ManifestError(f"{videos} holds no video {where}.")
    _refuse_unclear(listed.labels)
    sources, classes = _classified(sources, listed.labels.classes)
    split_columns, drawn = listed.labels.split_columns, not listed.labels.split_columns
    if drawn:
        sources, split_columns = _with_split(sources, val_fraction, seed, held_groups or {}), ["split"]
    sources.sort(key=lambda source: source.key)
    return Manifest(
        sources=sources,
        classes=classes,
        split_columns=split_columns,
        missing=missing,
        drawn=drawn,
        format=described(listed.labels),
    )


def summary(manifest: Manifest) -> str:
    """One line: as what the labels were read, and what they gave."""
    missing = f", {len(manifest.missing)} that they list are missing" if manifest.missing else ""
    times = [source.boxes.rows["time"] for source in manifest.sources if source.boxes is not None]
    keyframes = f"{sum(len(np.unique(each)) for each in times)} keyframes in {len(times)} videos"
    items = keyframes if times else f"{len(manifest.sources)} items"
    return f"labels: {manifest.format}: {items}, {len(manifest.classes)} classes{missing}"


def _classified(sources: list[Source], named: Sequence[str] | None) -> tuple[list[Source], list[str]]:
    """(the sources, labels of their boxes as indices into the classes; the classes that they have). named: all classes in their order."""
    labels = [source.boxes.rows["label"] for source in sources if source.boxes is not None]
    if named is None or not labels:
        found = {source.label for source in sources}
        return sources, ordered_classes(found) if named is None else [name for name in named if name in found]
    used = np.unique(np.concatenate([np.unique(each) for each in labels]))
    places = np.full(len(named), -1, dtype=np.int32)
    places[used] = np.arange(len(used), dtype=np.int32)
    boxed = [replace(source, boxes=source.boxes.relabelled(places)) for source in sources if source.boxes is not None]
    return boxed, [named[place] for place in used]


def list_videos(videos: Location, labels: LabelFiles, format: str = "auto") -> Listed:
    """What the labels list, found in `videos` or not. Raises ManifestError for what cannot be right in any case, StorageError."""
    folder = videos_at(videos)
    said = read_labels(folder, labels, format)
    present, absent = _sources(folder, said)
    return Listed(labels=said, present=present, absent=absent)


def _refuse_unclear(labels: Labels) -> None:
    """An official list's clip and the whole video that it is a part of may both be called <id>.mp4; to guess would be to train on junk."""
    if labels.by_id:
        raise ManifestError(
            f"{len(labels.by_id)} files are named by their YouTube id alone, first {labels.by_id[0]}: clips, or whole videos? "
            "Say which: data.format=kinetics for clips that are used as they are, data.format=kinetics_whole for whole videos that are "
            "cut at time_start and time_end."
        )


def _sources(folder: Videos, labels: Labels) -> tuple[list[Source], list[Source]]:
    """(those with a file, those without)."""
    present: list[Source] = []
    absent: list[Source] = []
    taken: set[str] = set()
    seen: dict[tuple[str, float | None, float | None], Row] = {}
    for row in sorted(labels.rows, key=lambda row: (row.path, row.start_s, row.end_s)):
        if row.part is None:
            path, size, num_frames = folder.find(row.path, row.where)
        else:  # its name in the tar is a name alone
            path, size, num_frames = "".join(letter if letter.isprintable() else "_" for letter in row.path), row.part[2], None
        start_s, end_s = _seconds(row, "start_s", row.start_s), _seconds(row, "end_s", row.end_s)
        if start_s is not None and end_s is not None and start_s >= end_s:
            raise ManifestError(f"{row.where}: start_s {start_s:g} is not before end_s {end_s:g}.")
        if not row.label:
            raise ManifestError(f"{row.where}: {path} has an empty label.")
        first = seen.setdefault((path, start_s, end_s), row)
        if first is not row and row.boxes is not None:
            raise ManifestError(f"{row.where}: {path} has boxes at {first.where} too, under another name or in another file.")
        if first is not row:
            _refuse_contradiction(path, first, row, labels.split_columns)
            continue
        source = Source(
            key=_key(path, start_s, end_s, taken) if size is not None else "",
            path=path,
            label=row.label,
            splits=row.splits,
            group=row.group,
            size=size or 0,
            start_s=start_s,
            end_s=end_s,
            num_frames=int(row.num_frames) if row.num_frames and num_frames is not None else num_frames,
            tar=row.part[0] if row.part else "",
            offset=row.part[1] if row.part else 0,
            boxes=row.boxes,
        )
        (absent if size is None else present).append(source)
    return present, absent


def _refuse_contradiction(path: str, first: Row, second: Row, split_columns: Sequence[str]) -> None:
    names = ["label", *split_columns]
    for name, one, other in zip(names, [first.label, *first.splits], [second.label, *second.splits], strict=True):
        if one != other:
            raise ManifestError(
                f"{path} has two values of '{name}': '{one}' ({first.where}) and '{other}' ({second.where}). "
                "Remove one of the rows, or give them different start_s and end_s."
            )


def _seconds(row: Row, name: str, text: str) -> float | None:
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
