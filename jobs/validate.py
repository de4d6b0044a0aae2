"""posmlp data validate: every checksum, every tar member, and the index against the bytes. Reads everything, changes nothing."""

import hashlib
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jobs.progress import Progress
from pipeline.index import Dataset, Item, ShardInfo

THREADS = 4
BLOCK_BYTES = 4 << 20
SUFFIXES = ("mp4", "json", "cls")


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


def run(root: Path) -> list[Problem]:
    """All problems of a dataset, in the order of its files. Raises DatasetError when it cannot even be opened."""
    dataset = Dataset.open(root)
    problems = _of_index(dataset)
    shards = dataset.info.shards
    with (
        Progress("validating", total=sum(shard.size for shard in shards) >> 20, unit="MiB") as progress,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        numbers = range(len(shards))
        for shard, found in zip(shards, pool.map(lambda number: list(_of_shard(dataset, number)), numbers), strict=True):
            problems += found
            progress.advance(shard.size >> 20, shard.file)
    return problems + _strangers(dataset)


def _of_index(dataset: Dataset) -> list[Problem]:
    problems = []
    with (dataset.root / "index.arrow").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != dataset.info.index_sha256:
        problems.append(_problem("index.arrow", "", "SHA-256 (altered, or of another build)", dataset.info.index_sha256, digest))
    fingerprint = dataset.info.with_fingerprint().fingerprint
    if fingerprint != dataset.info.fingerprint:
        problems.append(_problem("dataset.json", "", "fingerprint", dataset.info.fingerprint, fingerprint))
    shard_numbers = dataset.column("shard")
    counts = np.bincount(shard_numbers.astype(np.int64), minlength=len(dataset.info.shards)) if len(dataset) else np.zeros(0, np.int64)
    for shard, count in zip(dataset.info.shards, counts.tolist(), strict=False):
        if shard.num_items != count:
            problems.append(_problem("index.arrow", "", f"number of rows of {shard.file}", str(shard.num_items), str(count)))
    return problems


def _of_shard(dataset: Dataset, number: int) -> Iterator[Problem]:
    shard = dataset.info.shards[number]
    path = dataset.root / shard.file
    if not path.is_file():
        yield _problem(shard.file, "", "file", f"{shard.size} bytes", "no such file")
        return
    size = path.stat().st_size
    if size != shard.size:
        yield _problem(shard.file, "", "size in bytes", str(shard.size), str(size))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != shard.sha256:
        yield _problem(shard.file, "", "SHA-256", shard.sha256, digest)
    items = [dataset.item(row) for row in np.flatnonzero(dataset.column("shard") == number).tolist()]
    yield from _members(dataset, shard, items, path)


def _members(dataset: Dataset, shard: ShardInfo, items: list[Item], path: Path) -> Iterator[Problem]:
    """Compares the tar's members with the index's rows of this shard."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = {member.name: member for member in tar}
    except (tarfile.TarError, EOFError) as error:
        yield _problem(shard.file, "", "tar headers", "readable", str(error))
        members = {}
    with path.open("rb") as file:
        for item in items:
            for suffix in SUFFIXES:
                if members and f"{item.key}.{suffix}" not in members:
                    yield _problem(shard.file, item.key, f"member .{suffix}", "present", "missing")
            video = members.get(f"{item.key}.mp4")
            if video is not None and (video.offset_data, video.size) != (item.offset, item.size):
                expected, got = (
                    f"bytes {item.offset} to {item.offset + item.size}",
                    f"{video.offset_data} to {video.offset_data + video.size}",
                )
                yield _problem(shard.file, item.key, "place of the video in the tar", expected, got)
            found = _crc32(file, item.offset, item.size)
            if found != item.crc32:
                yield _problem(shard.file, item.key, "CRC-32 of the video", f"{item.crc32:08x}", f"{found:08x}")
            label = members.get(f"{item.key}.cls")
            if label is not None:
                file.seek(label.offset_data)
                text = file.read(min(label.size, 32)).decode("ascii", errors="replace").strip()
                if text != str(item.label):
                    yield _problem(shard.file, item.key, "class in .cls", str(item.label), text)
    known = {f"{item.key}.{suffix}" for item in items for suffix in SUFFIXES}
    for name in members.keys() - known:
        yield _problem(shard.file, name, "member", "a row of the index", "none")


def _crc32(file: BinaryIO, offset: int, size: int) -> int:
    file.seek(offset)
    value, left = 0, size
    while left and (block := file.read(min(left, BLOCK_BYTES))):
        value, left = zlib.crc32(block, value), left - len(block)
    return value


def _strangers(dataset: Dataset) -> list[Problem]:
    """Tars that no row of the index points at."""
    known = {shard.file for shard in dataset.info.shards}
    found = sorted(path.relative_to(dataset.root).as_posix() for path in (dataset.root / "shards").glob("*.tar"))
    return [_problem(file, "", "shard", "listed in dataset.json", "not listed") for file in found if file not in known]


def _problem(file: str, key: str, what: str, expected: str, got: str) -> Problem:
    return Problem(file=file, key=key, what=what, expected=expected, got=got)
