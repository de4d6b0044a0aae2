"""One raw video at a time as a file of this machine, wherever it lies: in a folder, in a tar there, or in an object store."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.frame_folder import IMAGE_SUFFIXES
from pipeline.label_file import VIDEO_SUFFIXES
from pipeline.location import Location
from pipeline.manifest import Source
from pipeline.options import LimitOptions
from pipeline.quarantine import Reason, RejectedError
from pipeline.remote import RemoteFolder
from pipeline.tar_source import copy_video


class SourceFiles:
    """The videos in the folder or at the URL `place`."""

    def __init__(self, place: Location, limits: LimitOptions) -> None:
        self._place, self._limits = place, limits
        self._remote = RemoteFolder(place) if isinstance(place, str) else None

    @contextmanager
    def local(self, source: Source, beside: Path) -> Iterator[Path]:
        """The video, or the folder of its frames, within the block. What has to be copied for it lies beside `beside` meanwhile.

        Raises RejectedError when it is gone or too large, StorageError, and OSError where it cannot be written.
        """
        if isinstance(self._place, Path) and not source.tar:
            yield self._place / source.path
            return
        suffix = Path(source.path).suffix  # by which pictures are known, and FFmpeg tells some formats
        copy = beside.with_name(f"source{suffix if suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES else ''}")  # never a name of theirs
        try:
            if isinstance(self._place, Path):
                copy_video(self._place / source.tar, source.offset, source.size, copy, self._limits)
            else:
                self._fetch(source, copy)
            yield copy
        finally:
            copy.unlink(missing_ok=True)

    def _fetch(self, source: Source, copy: Path) -> None:
        assert self._remote is not None
        if source.size > self._limits.max_bytes:
            raise RejectedError(Reason.TOO_MANY_BYTES, f"{source.size} bytes, limits.max_bytes is {self._limits.max_bytes}")
        try:
            self._remote.fetch(source.path, copy, source.size)
        except FileNotFoundError:
            raise RejectedError(Reason.MISSING) from None
