"""Which video lies in which tar, and writing that tar: plain WebDataset, readable by anything, byte for byte repeatable.

A video is three members that follow each other: `<key>.cls` (the class index as text), `<key>.json` (what is known of it) and
`<key>.mp4`. Tar headers carry no time, owner or mode of this machine. Offsets and checksums are taken while the bytes go out, so
the index never has to be read back from a tar.
"""

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from pipeline.durable import commit, temporary_name
from pipeline.manifest import Source

BLOCK = 512  # bytes of a tar block; a tar ends with two empty ones
MEMBER_BYTES = 4 * BLOCK  # about what an item weighs beside its video
COPY_BYTES = 1 << 20
MIN_SHARDS, MIN_VIDEOS = 16, 4  # so many shards, if each gets so many videos: shards are what a build does in parallel
NAME = "shards/shard-{:06d}.tar"


def deal(sources: Sequence[Source], *, ratio: float, shard_bytes: int, seed: int) -> list[list[Source]]:
    """Sources per shard. A keyed shuffle, then cuts at equal estimated bytes: any shard is a fair sample of the whole.

    ratio: estimated bytes of the canonical form per byte of source. shard_bytes: wanted size of a tar. The order of `sources` is
    of no importance, and no shard is empty.
    """
    windows: dict[str, int] = {}
    for source in sources:
        windows[source.path] = windows.get(source.path, 0) + 1
    weights = {source.key: max(1.0, source.size * ratio / windows[source.path]) + MEMBER_BYTES for source in sources}
    total = sum(weights[key] for key in sorted(weights))
    count = max(-(-total // shard_bytes), min(MIN_SHARDS, len(sources) // MIN_VIDEOS), 1)
    shards: dict[int, list[Source]] = {}
    before = 0.0
    for source in sorted(sources, key=lambda source: (_rank(seed, source.key), source.key)):
        middle = before + weights[source.key] / 2
        shards.setdefault(min(int(middle / total * count), int(count) - 1), []).append(source)
        before += weights[source.key]
    return [shards[number] for number in sorted(shards)]


def sample(sources: Sequence[Source], count: int, seed: int) -> list[Source]:
    """At most `count` sources, drawn by key, whatever the order of `sources`."""
    return sorted(sources, key=lambda source: (_rank(seed, f"sample of {source.key}"), source.key))[:count]


def _rank(seed: int, text: str) -> bytes:
    return hashlib.blake2b(text.encode(), key=f"deal {seed}".encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """Where a member's data lies in the tar, in bytes, and its CRC-32."""

    offset: int
    size: int
    crc32: int


class ShardWriter:
    """Writes one tar under a temporary name beside `path`; it gets its name when the block ends without an error.

    size and sha256 (of the whole file) are there after the block.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.sha256 = ""
        self._digest = hashlib.sha256()
        self._temporary = temporary_name(path)

    def add(self, key: str, label: int, facts: dict[str, object], video: Path) -> Member:
        """Adds the three members of one video and returns where the video is."""
        self._add_bytes(f"{key}.cls", str(label).encode("ascii"))
        self._add_bytes(f"{key}.json", json.dumps(facts, sort_keys=True, ensure_ascii=False).encode())
        size = video.stat().st_size
        self._write(_header(f"{key}.mp4", size))
        offset, crc32 = self.size, 0
        with video.open("rb") as file:
            while block := file.read(COPY_BYTES):
                crc32 = zlib.crc32(block, crc32)
                self._write(block)
        assert self.size == offset + size, "the video changed while it was copied"
        self._pad()
        return Member(offset=offset, size=size, crc32=crc32)

    def _add_bytes(self, name: str, data: bytes) -> None:
        self._write(_header(name, len(data)))
        self._write(data)
        self._pad()

    def _pad(self) -> None:
        self._write(bytes(-self.size % BLOCK))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def __enter__(self) -> Self:
        self._file: BinaryIO = self._temporary.open("xb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._write(bytes(2 * BLOCK))
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
        if kind is None:
            commit(self._temporary, self.path)
            self.sha256 = self._digest.hexdigest()
        else:
            self._temporary.unlink(missing_ok=True)


def _header(name: str, size: int) -> bytes:
    """Header blocks of a regular file: POSIX pax, with an extended header only for names that plain tar cannot hold."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
