"""A folder in an object store: ranges, whole files, uploads, each tried again after errors that pass. The only file that knows fsspec.

Credentials and endpoints come from the usual environment variables of each store (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, …); nothing of them is kept here. An object appears when its upload is complete, whole or not at all.
fsspec is imported when the first folder is made: who has paths alone does not wait for it.
"""

import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pipeline.durable import commit, temporary_name
from pipeline.errors import PipelineError, StorageError
from pipeline.options import RemoteOptions

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # of the project: scheme -> what pip installs for it
PART_BYTES = 16 << 20  # a whole file is fetched in such ranges, some at a time
PARTS_IN_FLIGHT = 4
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
CONNECT_S = 10.0
# Errors of botocore that no repetition mends; its classes are not imported, since it is there with the extra only.
LASTING = frozenset({"NoCredentialsError", "PartialCredentialsError", "NoRegionError", "ParamValidationError", "ProfileNotFound"})

Result = TypeVar("Result")


class RemoteFolder:
    """Names below `url`, from any number of threads."""

    def __init__(self, url: str, options: RemoteOptions | None = None) -> None:
        self.url = url
        self._options = options or RemoteOptions()
        self._fs = _filesystem(url, self._options)
        self._root = str(self._fs._strip_protocol(url)).rstrip("/")

    def __str__(self) -> str:
        return self.url

    def read(self, name: str, begin: int, end: int, stop: threading.Event | None = None) -> bytes:
        """The bytes [begin, end) of an object, fewer only where the object ends before.

        stop: once set, a failed attempt is the last one. Raises FileNotFoundError, and StorageError when the store fails for longer than
        `retries` allow.
        """

        def once() -> bytes:
            data = self._ranged(name, begin, end)
            if len(data) < end - begin and self._size(name) >= end:
                raise EOFError(f"the answer was cut after {len(data)} of {end - begin} bytes")
            return data[: end - begin]

        return self._tried(once, name, f"reading bytes {begin} to {end}", stop)

    def _ranged(self, name: str, begin: int, end: int) -> bytes:
        path = self._path(name)
        if self._fs.async_impl:
            from fsspec.asyn import sync

            return bytes(sync(self._fs.loop, self._fs._cat_file, path, start=begin, end=end, timeout=self._options.timeout_s))
        return bytes(self._fs.cat_file(path, start=begin, end=end))

    def read_all(self, name: str, limit: int) -> bytes:
        """A small object as a whole. Raises as `read`, and StorageError when it has more than `limit` bytes."""
        size = self.size(name)
        if size is None:
            raise FileNotFoundError(self._where(name))
        if size > limit:
            raise StorageError(f"{self._where(name)} has {size} bytes, expected at most {limit}.")
        return self.read(name, 0, size) if size else b""

    def fetch(self, name: str, target: Path, size: int) -> None:
        """Copies the first `size` bytes of an object to `target`, which appears whole or not at all. Raises as `read`, and OSError."""
        temporary = temporary_name(target)
        ranges = [(begin, min(begin + PART_BYTES, size)) for begin in range(0, size, PART_BYTES)]
        try:
            with temporary.open("xb") as file, ThreadPoolExecutor(PARTS_IN_FLIGHT) as pool:
                for first in range(0, len(ranges), PARTS_IN_FLIGHT):  # so many parts in memory, and no more
                    group = ranges[first : first + PARTS_IN_FLIGHT]
                    for (begin, end), data in zip(group, pool.map(lambda part: self.read(name, *part), group), strict=True):
                        if len(data) != end - begin:
                            raise StorageError(f"{self._where(name)} ends at byte {begin + len(data)}, expected {size} or more.")
                        file.write(data)
            commit(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Name -> size in bytes of everything below `prefix`, a folder."""
        found = self._tried(lambda: self._fs.find(self._path(prefix), detail=True), prefix, "listing it")
        return {name[len(self._root) + 1 :]: int(facts["size"]) for name, facts in found.items()}

    def size(self, name: str = "") -> int | None:
        """In bytes; None when there is no such object. 0 of a folder, which is there when an object is in it."""
        try:
            return self._tried(lambda: self._size(name), name, "asking for its size")
        except FileNotFoundError:
            return None

    def upload(self, file: Path, name: str) -> None:
        """One PUT, or a multipart upload that counts when it is completed; then the store is asked for the size."""
        self._tried(lambda: self._fs.put_file(str(file), self._path(name)), name, "uploading it")
        expected, found = file.stat().st_size, self.size(name)
        if found != expected:
            raise StorageError(f"{self._where(name)} has {found} bytes after its upload, expected {expected}. Run the same command again.")

    def create(self, name: str, data: bytes) -> bool:
        """Writes an object unless there is one; whether it did. Stores without conditional writes replace it."""
        try:
            self._tried(lambda: self._fs.pipe_file(self._path(name), data, mode="create"), name, "writing it")
        except FileExistsError:
            # An attempt whose answer was lost may have written it.
            return self.size(name) == len(data) and self.read(name, 0, len(data)) == data
        return True

    def delete(self, names: Sequence[str]) -> None:
        """Removes objects; those that are not there are no error."""
        for name in names:
            try:
                self._tried(partial(self._fs.rm_file, self._path(name)), name, "removing it")
            except FileNotFoundError:
                continue

    def _size(self, name: str) -> int:
        size = self._fs.info(self._path(name))["size"]
        if size is None:
            raise NotImplementedError("it does not say how long an object is")
        return int(size)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _where(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _tried(self, call: Callable[[], Result], name: str, doing: str, stop: threading.Event | None = None) -> Result:
        stop = stop or threading.Event()
        began = time.monotonic()
        for attempt in range(self._options.retries + 1):
            try:
                return call()
            except (FileNotFoundError, FileExistsError):
                raise
            except PermissionError as error:
                raise StorageError(f"{self._where(name)}: {doing} is not allowed ({_text(error)}). {_ADVICE}") from None
            except NotImplementedError as error:
                text = f"{self._where(name)}: {doing} is not what this kind of store can do ({_text(error)}). Known to work: s3://, gs://."
                raise StorageError(text) from None
            except Exception as error:  # each store and HTTP library has a tree of its own
                if isinstance(error, PipelineError | TypeError):
                    raise
                last = error
                if type(error).__name__ in LASTING:
                    break
            if attempt < self._options.retries and stop.wait(_pause_s(attempt, name)):
                break
        seconds = time.monotonic() - began
        raise StorageError(
            f"{self._where(name)}: {doing} failed {attempt + 1} times in {seconds:.1f} s, the last time by {_text(last)}. {_ADVICE}"
        ) from None


_ADVICE = (
    "Check the URL, the network and the credentials in the environment; loader.remote.retries and timeout_s say for how long it is tried. "
    "The same command goes on."
)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _pause_s(attempt: int, name: str) -> float:
    """Twice as long each time; spread by name and thread, so that many readers do not come back together."""
    spread = zlib.crc32(f"{name} {threading.get_ident()} {attempt}".encode()) / 2**33  # 0 to 0.5
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**attempt) * (0.75 + spread)


def _filesystem(url: str, options: RemoteOptions) -> Any:
    """The store's own retries are off: ours count all attempts, with a message at the end."""
    import fsspec

    scheme = url.partition("://")[0]
    settings: dict[str, object] = {"use_listings_cache": False}
    if scheme in ("s3", "s3a"):
        settings["config_kwargs"] = {
            "connect_timeout": min(CONNECT_S, options.timeout_s),
            "read_timeout": options.timeout_s,
            "max_pool_connections": options.requests,
            "retries": {"total_max_attempts": 1},
        }
    try:
        filesystem = fsspec.filesystem(scheme, **settings)
    except ImportError as error:
        what = f"'posmlp-video[{EXTRAS[scheme]}]'" if scheme in EXTRAS else f"the fsspec file system for {scheme}:// ({error})"
        raise StorageError(f"{url}: {scheme}:// needs a package that is not installed. Run: pip install {what}") from None
    except ValueError as error:
        raise StorageError(f"{url}: {error}. Known are s3://, gs:// and what fsspec knows.") from None
    if scheme in ("s3", "s3a"):
        filesystem.retries = 1
    return filesystem
