"""An item's bytes, straight from their place in the shard, checked on every read.

The index knows the byte range of each video, so no tar is parsed and nothing before it is read. Neither FFmpeg nor DALI notices
flipped bits; the CRC-32 that the build recorded does.

From an object store a read is one range request for exactly the video, whose bytes are kept in this machine's cache. Whole shards
would be wasted on our order: neighbours in it lie in different shards (docs/benchmarks.md has both).
"""

import os
import threading
import zlib
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from pipeline.errors import ChecksumError, DatasetError, SampleError, StorageError
from pipeline.index import Dataset, Item, Origin
from pipeline.location import Location, inside

ANSWERS = 8  # of a store that all differ and are all wrong, before an item counts as damaged
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
        fault = _fault(data, item)
        if fault:
            raise ChecksumError(fault, key=item.key, shard=item.shard_file)
        return data

    def _open(self, file: str) -> _Shard:
        with self._lock:
            shard = self._shards.get(file)
            if shard is None:
                _refuse_outside(file, self._root)
                shard = self._shards[file] = _Shard(self._root / file)
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


class RemoteReader:
    """Reads items of a dataset at a URL, from any number of threads, through this machine's cache.

    What fails its checksum, in the cache or as it came, is fetched again. It counts as damaged when the store gives the same wrong bytes
    twice: what was only changed on its way comes otherwise the next time, and must not replace a sample.
    """

    def __init__(self, origin: Origin) -> None:
        self._folder, self._cache = origin.folder, origin.cache
        self._closed = threading.Event()

    def read(self, item: Item) -> bytes:
        """As `Reader.read`; StorageError, which is no damage, when the store cannot be reached for longer than is tried again."""
        _refuse_outside(item.shard_file, self._folder.url)
        place = f"items/{PurePosixPath(item.shard_file).stem}/{item.offset}"  # not its row, which is another one in a mixture
        kept = self._cache.get(place)
        if kept is not None:
            if not _fault(kept, item):
                return kept
            self._cache.drop(place)
        fault = ""
        for _ in range(ANSWERS):
            before = fault
            try:
                data = self._folder.read(item.shard_file, item.offset, item.offset + item.size, self._closed)
            except FileNotFoundError:
                text = f"cannot read {self._folder.url}/{item.shard_file}: there is no such object"
                raise SampleError(text, key=item.key, shard=item.shard_file) from None
            except StorageError as error:
                raise StorageError(f"{error} (video '{item.key}' in {item.shard_file})") from None
            fault = _fault(data, item)
            if not fault:
                self._cache.add(place, data)
                return data
            if fault == before:
                break
        raise ChecksumError(fault, key=item.key, shard=item.shard_file)

    def close(self) -> None:
        """Ends reads that wait for another attempt."""
        self._closed.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_reader(dataset: Dataset) -> Reader | RemoteReader:
    """Reads items of `dataset` until it is closed."""
    return Reader(dataset.root) if dataset.origin is None else RemoteReader(dataset.origin)


def read(dataset: Dataset, item: Item) -> bytes:
    """One item's bytes, with the checks of `Reader.read`; keep a reader to read many."""
    with open_reader(dataset) as reader:
        return reader.read(item)


def _refuse_outside(file: str, root: Location) -> None:
    if not inside(file):
        raise DatasetError(f"{root}/dataset.json names the shard '{file}', outside the dataset's folder.")


def _fault(data: bytes, item: Item) -> str:
    """What is wrong with the bytes read for `item`; "" when they are those that were built."""
    if len(data) != item.size:
        return f"the shard ends at byte {item.offset + len(data)}, expected {item.offset + item.size} or more"
    found = zlib.crc32(data)
    if found != item.crc32:
        return f"bytes {item.offset} to {item.offset + item.size} have CRC-32 {found:08x}, expected {item.crc32:08x}"
    return ""


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
