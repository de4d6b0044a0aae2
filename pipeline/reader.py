"""An item's bytes, straight from their place in the shard, checked on every read.

The index knows the byte range of each video, so no tar is parsed and nothing before it is read. Neither FFmpeg nor DALI notices
flipped bits; the CRC-32 that the build recorded does.
"""

import os
import threading
import zlib
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from pipeline.errors import ChecksumError, DatasetError, SampleError
from pipeline.index import Dataset, Item

MAX_OPEN = 64  # file descriptors one reader keeps; processes are commonly allowed 1024


class _Shard:
    """An open file that closes when its last user lets go, so that a shard may be evicted while another thread reads from it."""

    __slots__ = ("fd",)

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class Reader:
    """Reads items of one dataset from any number of threads, keeping at most `max_open` shards open (least recently used go first)."""

    def __init__(self, root: Path, *, max_open: int = MAX_OPEN) -> None:
        self._root, self._max_open = root, max_open
        self._shards: OrderedDict[str, _Shard] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, item: Item) -> bytes:
        """The stored video of `item`.

        Raises ChecksumError when the bytes are not those that were built, SampleError when the shard cannot be opened or read, and
        DatasetError when the dataset names a shard outside its own folder.
        """
        try:
            shard = self._open(item.shard_file)
            data = _read_range(shard.fd, item.offset, item.size)
        except OSError as error:
            text = f"cannot read {self._root / item.shard_file}: {error.strerror}"
            raise SampleError(text, key=item.key, shard=item.shard_file) from error
        if len(data) != item.size:
            text = f"the shard ends at byte {item.offset + len(data)}, expected {item.offset + item.size} or more"
            raise ChecksumError(text, key=item.key, shard=item.shard_file)
        found = zlib.crc32(data)
        if found != item.crc32:
            text = f"bytes {item.offset} to {item.offset + item.size} have CRC-32 {found:08x}, expected {item.crc32:08x}"
            raise ChecksumError(text, key=item.key, shard=item.shard_file)
        return data

    def _open(self, file: str) -> _Shard:
        with self._lock:
            shard = self._shards.get(file)
            if shard is None:
                path = PurePosixPath(file)
                if path.is_absolute() or ".." in path.parts:
                    raise DatasetError(f"{self._root / 'dataset.json'} names the shard '{file}', outside the dataset's folder.")
                shard = self._shards[file] = _Shard(self._root / path)
            self._shards.move_to_end(file)
            while len(self._shards) > self._max_open:
                self._shards.popitem(last=False)
            return shard

    def close(self) -> None:
        """Lets go of all shards. Reading again opens them again."""
        with self._lock:
            self._shards.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read(dataset: Dataset, item: Item) -> bytes:
    """One item's bytes, with the checks of `Reader.read`; keep a `Reader` to read many."""
    with Reader(dataset.root) as reader:
        return reader.read(item)


def _read_range(fd: int, offset: int, size: int) -> bytes:
    """The bytes [offset, offset + size) of a file, fewer when it ends before. The kernel hands out at most 2 GiB at once."""
    data = os.pread(fd, size, offset)
    if len(data) == size or not data:
        return data
    parts, have = [data], len(data)
    while have < size and (data := os.pread(fd, size - have, offset + have)):
        parts.append(data)
        have += len(data)
    return b"".join(parts)
