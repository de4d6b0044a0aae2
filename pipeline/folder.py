"""A folder of this machine, with those methods of `remote.RemoteFolder` that the files beside a dataset's shards and checkpoints need."""

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from pipeline.durable import committed
from pipeline.errors import StorageError
from pipeline.location import Location
from pipeline.options import RemoteOptions
from pipeline.remote import RemoteFolder


class LocalFolder:
    """Names below `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str, begin: int, end: int) -> bytes:
        """The bytes [begin, end) of a file, fewer only where it ends before. Raises FileNotFoundError."""
        with (self.path / name).open("rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Name -> size in bytes of the files below `prefix`, a folder that may not be there."""
        found = {}
        for folder, _, names in os.walk(self.path / prefix):
            for path in (Path(folder, name) for name in names):
                with suppress(FileNotFoundError):  # what was removed meanwhile is not there
                    if path.is_file():
                        found[path.relative_to(self.path).as_posix()] = path.stat().st_size
        return found

    def read_all(self, name: str, limit: int) -> bytes:
        """A small file as a whole. Raises FileNotFoundError, and StorageError when it has more than `limit` bytes."""
        size = (self.path / name).stat().st_size
        if size > limit:
            raise StorageError(f"{self.path / name} has {size} bytes, expected at most {limit}.")
        return self.read(name, 0, size)

    def fetch(self, name: str, target: Path, size: int) -> None:
        """Copies a file of `size` bytes to `target`, which appears whole or not at all. Raises StorageError where it has another size."""
        with (self.path / name).open("rb") as source, committed(target) as copy:
            shutil.copyfileobj(source, copy)
            if copy.tell() != size:
                raise StorageError(f"{self.path / name} has {copy.tell()} bytes, expected {size}.")

    def upload(self, file: Path, name: str) -> None:
        """Copies `file` here, whole or not at all, into a folder that is made if missing."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as source, committed(path) as copy:
            shutil.copyfileobj(source, copy)

    def create(self, name: str, data: bytes) -> None:
        """Writes a file, whole or not at all, in a folder that is made if missing."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with committed(path) as file:
            file.write(data)

    def delete(self, names: Sequence[str]) -> None:
        """Removes files, and folders below `path` that are empty then; those that are not there are no error."""
        for name in names:
            path = self.path / name
            path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty, or gone
                if path.parent != self.path:
                    path.parent.rmdir()


Folder: TypeAlias = LocalFolder | RemoteFolder


def folder_at(place: Location, options: RemoteOptions | None = None) -> Folder:
    """options: of a store. Raises StorageError for a URL of a kind that is not known."""
    return RemoteFolder(place, options) if isinstance(place, str) else LocalFolder(place)
