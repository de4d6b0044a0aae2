"""posmlp data validate: every checksum, every tar member, index and overlays against the bytes. Reads everything, changes nothing.

Of a dataset at a URL each file is copied to a temporary one, some at a time.
"""

import json
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jobs.progress import Progress
from pipeline import boxes, overlay
from pipeline.boxes import video_key
from pipeline.durable import sha256_of
from pipeline.errors import DatasetError
from pipeline.folder import Folder, LocalFolder, folder_at
from pipeline.index import SPLIT_PREFIX, Dataset, DatasetInfo, Item, ShardInfo, index_schema, read_info
from pipeline.location import Location

THREADS = 4
BLOCK_BYTES = 4 << 20
SUFFIXES = ("mp4", "json", "cls")
MAX_FACTS_BYTES = 1 << 20
SHOWN = 20  # rows of the index named for one kind of problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that is not as it was built. file: relative to the dataset; key: of the video, "" when it concerns the whole file."""

    file: str
    key: str
    what: str
    expected: str
    got: str

    def __str__(self) -> str:
        where = f"{self.file}, video '{self.key}'" if self.key else self.file
        return f"{where}: {self.what}: got {self.got}, expected {self.expected}"


def run(root: Location) -> list[Problem]:
    """All problems of a dataset, in the order of its files. Raises DatasetError when there is no dataset.json to compare with."""
    info = read_info(root)
    folder = folder_at(root)
    try:
        dataset = Dataset.open(root, overlays=False)
    except DatasetError as error:  # the index cannot be used, so the shards are compared with dataset.json alone
        dataset = Dataset(Path(root), info, index_schema(list(info.splits), keyframes=info.boxes is not None).empty_table())
        problems = [_problem(info.index_file, "", "index", "as built", str(error))]
    else:
        problems = [*_of_index(dataset, folder), *_of_likeness(dataset, folder)]
        problems += [*_of_boxes(dataset, folder), *_of_overlays(dataset, folder)]
    shards = info.shards
    with (
        Progress("validating", total=sum(shard.size for shard in shards) >> 20, unit="MiB") as progress,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        numbers = range(len(shards))
        for shard, found in zip(shards, pool.map(lambda number: list(_of_shard(dataset, folder, number)), numbers), strict=True):
            problems += found
            progress.advance(shard.size >> 20, shard.file)
    return problems + _strangers(info, folder)


def _of_index(dataset: Dataset, folder: Folder) -> list[Problem]:
    problems = []
    index = dataset.info.index_file
    with _local(folder, index) as path:
        digest = sha256_of(path) if path.is_file() else "no such file"
    if digest != dataset.info.index_sha256:
        problems.append(_problem(index, "", "SHA-256 (altered, or of another build)", dataset.info.index_sha256, digest))
    info = dataset.info
    fingerprint = info.with_fingerprint().fingerprint
    if fingerprint != info.fingerprint:
        problems.append(_problem("dataset.json", "", "fingerprint", info.fingerprint, fingerprint))
    bounds = {
        "shard": len(info.shards),
        "label": len(info.classes),
        **{SPLIT_PREFIX + name: len(names) for name, names in info.splits.items()},
    }
    for name, bound in bounds.items():
        values = dataset.column(name).astype(np.int64)
        wrong = np.flatnonzero((values < (-1 if name.startswith(SPLIT_PREFIX) else 0)) | (values >= bound))
        problems += [_problem(index, dataset.text("key", row), name, f"below {bound}", str(values[row])) for row in wrong[:SHOWN].tolist()]
    empty = np.flatnonzero(dataset.column("end").astype(np.int64) <= dataset.column("begin").astype(np.int64))
    problems += [_problem(index, dataset.text("key", row), "frames", "at least one", "none") for row in empty[:SHOWN].tolist()]
    shard_numbers = dataset.column("shard").astype(np.int64)
    for number, shard in enumerate(info.shards):
        count = int((shard_numbers == number).sum())
        if shard.num_items != count:
            problems.append(_problem(index, "", f"number of rows of {shard.file}", str(shard.num_items), str(count)))
    return problems


def _of_likeness(dataset: Dataset, folder: Folder) -> list[Problem]:
    """The digests by which duplicates are found; datasets that were built without them have none."""
    file, expected = dataset.info.likeness_file, dataset.info.likeness_sha256
    if not expected:
        return []
    with _local(folder, file) as path:
        if not path.is_file():
            return [_problem(file, "", "file", "present", "no such file")]
        digest = sha256_of(path)
    return [] if digest == expected else [_problem(file, "", "SHA-256", expected, digest)]


def _of_boxes(dataset: Dataset, folder: Folder) -> list[Problem]:
    """The boxes of keyframes, and that each keyframe is a frame of its item."""
    info = dataset.info
    if info.boxes is None:
        return []
    file = info.boxes_file
    with _local(folder, file) as path:
        digest = sha256_of(path) if path.is_file() else "no such file"
        if digest != info.boxes.sha256:
            return [_problem(file, "", "SHA-256 (altered, or of another build)", info.boxes.sha256, digest)]
        try:
            table = boxes.open_table(path, len(dataset), len(info.classes))
        except DatasetError as error:
            return [_problem(file, "", "boxes", "as built", str(error))]
        wrong = list(islice(boxes.checked(table, len(info.classes)), SHOWN))
        problems = [_problem(file, dataset.text("key", row), what, expected, got) for row, what, expected, got in wrong]
        if len(table) != info.boxes.num_boxes:
            problems.append(_problem(file, "", "number of boxes", str(info.boxes.num_boxes), str(len(table))))
    begin, end, frame = (dataset.column(name).astype(np.int64) for name in ("begin", "end", "keyframe"))
    for row in np.flatnonzero((frame < begin) | (frame >= end))[:SHOWN].tolist():
        expected = f"from {begin[row]}, below {end[row]}"
        problems.append(_problem(info.index_file, dataset.text("key", row), "keyframe", expected, str(frame[row])))
    return problems


def _of_overlays(dataset: Dataset, folder: Folder) -> list[Problem]:
    """Each overlay by itself, and that each file in their folder is one."""
    problems = []
    labels = dataset.column("label").astype(np.int32, copy=False)
    for file, size in sorted(folder.sizes(overlay.FOLDER).items()):
        try:
            read = overlay.read_file(folder, file, size)
            overlay.combine([read], dataset.table.column("key"), labels, len(dataset.info.classes))
        except DatasetError as error:
            problems.append(_problem(file, "", "overlay", "as it was written, for this dataset", str(error)))
    return problems


@contextmanager
def _local(folder: Folder, file: str) -> Iterator[Path]:
    """A file of the dataset on this machine within the block; it does not exist when the dataset has none."""
    if isinstance(folder, LocalFolder):
        yield folder.path / file
        return
    with tempfile.TemporaryDirectory(prefix="posmlp-validate-") as work:
        path, size = Path(work) / "file", folder.size(file)
        if size is not None:
            folder.fetch(file, path, size)
        yield path


def _of_shard(dataset: Dataset, folder: Folder, number: int) -> Iterator[Problem]:
    with _local(folder, dataset.info.shards[number].file) as path:
        yield from _of_file(dataset, number, path)


def _of_file(dataset: Dataset, number: int, path: Path) -> Iterator[Problem]:
    shard = dataset.info.shards[number]
    if not path.is_file():
        yield _problem(shard.file, "", "file", f"{shard.size} bytes", "no such file")
        return
    size = path.stat().st_size
    if size != shard.size:
        yield _problem(shard.file, "", "size in bytes", str(shard.size), str(size))
    digest = sha256_of(path)
    if digest != shard.sha256:
        yield _problem(shard.file, "", "SHA-256", shard.sha256, digest)
    if len(dataset):
        items = [dataset.item(row) for row in np.flatnonzero(dataset.column("shard") == number).tolist()]
        yield from _members(shard, items, path)


def _members(shard: ShardInfo, items: list[Item], path: Path) -> Iterator[Problem]:
    """Compares the tar's members with the index's rows of this shard."""
    members: dict[str, tarfile.TarInfo] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                members[member.name] = member
    except (tarfile.TarError, EOFError, ValueError) as error:
        yield _problem(shard.file, "", "tar headers", "readable", f"{error}, after {len(members)} members")
    keys = [item.key if item.keyframe is None else video_key(item.key) for item in items]
    with path.open("rb") as file:
        looked_at: set[tuple[str, int, int, int, int]] = set()
        for item, key in zip(items, keys, strict=True):
            stored = (key, item.offset, item.size, item.crc32, item.end)
            if stored in looked_at:  # keyframes of one video share its members
                continue
            looked_at.add(stored)
            for suffix in SUFFIXES:
                if f"{key}.{suffix}" not in members:
                    yield _problem(shard.file, item.key, f"member .{suffix}", "present", "missing")
            video = members.get(f"{key}.mp4")
            if video is not None and (video.offset_data, video.size) != (item.offset, item.size):
                expected = f"bytes {item.offset} to {item.offset + item.size}"
                got = f"bytes {video.offset_data} to {video.offset_data + video.size}"
                yield _problem(shard.file, item.key, "place of the video in the tar", expected, got)
            found = _crc32(file, item.offset, item.size)
            if found != item.crc32:
                yield _problem(shard.file, item.key, "CRC-32 of the video", f"{item.crc32:08x}", f"{found:08x}")
            yield from _facts(shard, item, key, members, file)
    known = {f"{key}.{suffix}" for key in keys for suffix in SUFFIXES}
    for name in sorted(members.keys() - known):
        yield _problem(shard.file, name, "member", "a row of the index", "none")


def _facts(shard: ShardInfo, item: Item, key: str, members: Mapping[str, tarfile.TarInfo], file: BinaryIO) -> Iterator[Problem]:
    """Compares what the `.cls` and `.json` members say with the index. key: of the members; their label is a video's, no keyframe's."""
    expected = {"num_frames": item.num_frames, "fps": item.fps, "width": item.width, "height": item.height, "codec": item.codec}
    label = {"label": item.label} if item.keyframe is None else {}
    for suffix, values in (("cls", label), ("json", label | expected)):
        member = members.get(f"{key}.{suffix}")
        if member is None:
            continue
        file.seek(member.offset_data)
        text = file.read(min(member.size, MAX_FACTS_BYTES)).decode("utf-8", errors="replace")
        try:
            facts = {"label": int(text)} if suffix == "cls" else json.loads(text)
        except ValueError:
            facts = None
        if not isinstance(facts, dict):
            yield _problem(shard.file, item.key, f"member .{suffix}", "a number" if suffix == "cls" else "a JSON object", text[:40])
            continue
        for name, value in values.items():
            if facts.get(name) != value:
                yield _problem(shard.file, item.key, f"{name} in .{suffix}", str(value), str(facts.get(name)))


def _crc32(file: BinaryIO, offset: int, size: int) -> int:
    file.seek(offset)
    value, left = 0, size
    while left and (block := file.read(min(left, BLOCK_BYTES))):
        value, left = zlib.crc32(block, value), left - len(block)
    return value


def _strangers(info: DatasetInfo, folder: Folder) -> list[Problem]:
    """Tars that no row of the index points at."""
    known = {shard.file for shard in info.shards}
    found = sorted(name for name in folder.sizes("shards") if name.endswith(".tar"))
    return [_problem(file, "", "shard", "listed in dataset.json", "not listed") for file in found if file not in known]


def _problem(file: str, key: str, what: str, expected: str, got: str) -> Problem:
    return Problem(file=file, key=key, what=what, expected=expected, got=got)
