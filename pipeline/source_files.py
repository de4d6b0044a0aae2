"""Raw videos as files of this machine, wherever they lie: in a folder, or in an object store, from where each is copied at its turn."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.location import Location
from pipeline.manifest import Source
from pipeline.quarantine import Reason, RejectedError
from pipeline.remote import RemoteFolder


class SourceFiles:
    """The videos below `place`. From a URL a file lives in the system's temporary folder as long as its block."""

    def __init__(self, place: Location) -> None:
        self._place = place
        self._remote = RemoteFolder(place) if isinstance(place, str) else None

    @contextmanager
    def local(self, source: Source, max_bytes: int) -> Iterator[Path]:
        """The video as a file of this machine. Raises RejectedError when it is gone or too large, StorageError."""
        if self._remote is None:
            yield Path(self._place) / source.path
            return
        if source.size > max_bytes:
            raise RejectedError(Reason.TOO_MANY_BYTES, f"{source.size} bytes, limits.max_bytes is {max_bytes}")
        with tempfile.TemporaryDirectory(prefix="posmlp-video-") as folder:
            path = Path(folder) / "source"
            try:
                self._remote.fetch(source.path, path, source.size)
            except FileNotFoundError:
                raise RejectedError(Reason.MISSING) from None
            yield path
