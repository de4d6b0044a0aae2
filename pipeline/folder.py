"""A folder of this machine, with those methods of `remote.RemoteFolder` that the small files beside a dataset's shards need."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from pipeline.durable import committed
from pipeline.location import Location
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
        """Name -> size in bytes of the files in `prefix`, a folder that may not be there."""
        folder = self.path / prefix
        if not folder.is_dir():
            return {}
        found = {}
        with os.scandir(folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # what was removed meanwhile is not there
                    if entry.is_file():
                        found[f"{prefix}/{entry.name}"] = entry.stat().st_size
        return found

    def create(self, name: str, data: bytes) -> None:
        """Writes a file, whole or not at all, in a folder that is made if missing."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        with committed(path) as file:
            file.write(data)

    def delete(self, names: Sequence[str]) -> None:
        """Removes files; those that are not there are no error."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)


Folder: TypeAlias = LocalFolder | RemoteFolder


def folder_at(place: Location) -> Folder:
    """Raises StorageError for a URL of a kind that is not known."""
    return RemoteFolder(place) if isinstance(place, str) else LocalFolder(place)
